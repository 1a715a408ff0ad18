"""The node that saves pictures without holding up the executor: it copies pixels, reserves names, and leaves the rest to a thread."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Protocol

from . import host
from .encoding import EXTENSIONS, Pixels, collect_text, encode
from .files import reserve_number, write_reserved
from .writes import WriteQueue


class Tensor(Protocol):
    """What is used of one picture: float, (height, width, channels), 0 to 1."""

    shape: tuple[int, ...]

    def mul(self, other: float) -> Tensor: ...
    def clamp_(self, low: float, high: float) -> Tensor: ...
    def byte(self) -> Tensor: ...
    def cpu(self) -> Tensor: ...
    def numpy(self) -> Pixels: ...


def to_pixels(image: Tensor) -> Pixels:
    """Scaled on the device, where it is free, so that a quarter of the bytes is copied. Cuts fractions off as SaveImage does."""
    return image.mul(255.0).clamp_(0, 255).byte().cpu().numpy()


class FluxgateSaveImage:
    """Its output is SaveImage's; the files appear a little later: GET /fluxgate/view waits for them."""

    writes: ClassVar[WriteQueue]
    CATEGORY = "image"
    DESCRIPTION = "Saves the images to the output folder in the background, so that the next prompt starts at once."
    FUNCTION = "save"
    OUTPUT_NODE = True
    RETURN_TYPES = ()

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict[str, Any]]:
        return {
            "required": {
                "images": ("IMAGE", {"tooltip": "The images to save."}),
                "filename_prefix": ("STRING", {"default": "ComfyUI", "tooltip": "As in Save Image: a folder, a name, %width%, %date:...%"}),
                "format": (list(EXTENSIONS), {"default": "png"}),
                "quality": ("INT", {"default": 90, "min": 1, "max": 100, "tooltip": "For webp and jpeg."}),
                "compress_level": ("INT", {"default": 4, "min": 0, "max": 9, "tooltip": "For png: 1 is fast, 9 is small."}),
            },
            "hidden": {"prompt": "PROMPT", "extra_pnginfo": "EXTRA_PNGINFO"},
        }

    def save(
        self,
        images: Any,
        filename_prefix: str,
        format: str,
        quality: int,
        compress_level: int,
        prompt: Any = None,
        extra_pnginfo: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Raises for a prefix that leaves the output folder and for a folder that cannot be written, like SaveImage."""
        text = collect_text(prompt, extra_pnginfo) if host.writes_metadata() else {}
        height, width = images[0].shape[0], images[0].shape[1]
        find_names = host.find_attribute("folder_paths", "get_save_image_path")
        output_folder = host.find_attribute("folder_paths", "get_output_directory")()
        folder, stem, number, subfolder, _ = find_names(filename_prefix, output_folder, width, height)
        results = []
        for index, image in enumerate(images):
            pixels = to_pixels(image)
            encode_image = partial(encode, pixels, format, quality=quality, compress_level=compress_level, text=text)
            self.writes.wait_for_room(pixels.nbytes, host.stop_when_interrupted)
            named = stem.replace("%batch_num%", str(index))
            number, final = reserve_number(Path(folder), named, number, EXTENSIONS[format])
            self.writes.submit(final.resolve(), pixels.nbytes, partial(write_reserved, final, encode_image))
            results.append({"filename": final.name, "subfolder": subfolder, "type": "output"})
            number += 1
        return {"ui": {"images": results}}
