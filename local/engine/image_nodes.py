"""The image nodes: make, load, scale and save pictures with Pillow alone.
Names, inputs and file naming are ComfyUI's; it refuses to know models."""

import hashlib
import json
import os
import random
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image, ImageChops, ImageOps, ImageSequence
from PIL.PngImagePlugin import PngInfo

from local.engine.folders import ModelFolders, reserve_save_path
from local.engine.nodes import Node, NodeContext, NodeOutput

Images = list[Image.Image]

MAX_SIDE = 16384
SCALE_FILTERS = {
    "nearest-exact": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "area": Image.Resampling.BOX,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"})
GRAPH_IN_PNG = {"prompt": "PROMPT", "extra_pnginfo": "EXTRA_PNGINFO"}
EMPTY_MASK_SIZE = (64, 64)  # what LoadImage gives for a picture without alpha


class EmptyImage(Node):
    CATEGORY = "image"
    RETURN_TYPES = ("IMAGE",)
    DESCRIPTION = "A picture of one colour."

    @classmethod
    def INPUT_TYPES(cls, folders: ModelFolders) -> dict[str, dict[str, Any]]:
        side = {"default": 512, "min": 1, "max": MAX_SIDE, "step": 1}
        return {
            "required": {
                "width": ("INT", side),
                "height": ("INT", side),
                "batch_size": ("INT", {"default": 1, "min": 1, "max": 4096}),
                "color": ("INT", {"default": 0, "min": 0, "max": 0xFFFFFF, "step": 1, "display": "color"}),
            }
        }

    def run(self, context: NodeContext, width: int, height: int, batch_size: int, color: int) -> tuple[Images]:
        rgb = (color >> 16 & 0xFF, color >> 8 & 0xFF, color & 0xFF)
        return ([Image.new("RGB", (width, height), rgb)] * batch_size,)


class SaveImage(Node):
    CATEGORY = "image"
    OUTPUT_NODE = True
    TITLE = "Save Image"
    DESCRIPTION = "Writes PNG files into the output folder."
    COMPRESS_LEVEL: ClassVar[int] = 4

    @classmethod
    def INPUT_TYPES(cls, folders: ModelFolders) -> dict[str, dict[str, Any]]:
        return {"required": {"images": ("IMAGE", {}), "filename_prefix": ("STRING", {"default": "ComfyUI"})}, "hidden": GRAPH_IN_PNG}

    def run(self, context: NodeContext, images: Images, filename_prefix: str) -> NodeOutput:
        return self._save(context, images, context.folders.output, "output", filename_prefix)

    def _save(self, context: NodeContext, images: Images, directory: Path, kind: str, prefix: str) -> NodeOutput:
        folder, stem, counter, subfolder = reserve_save_path(directory, prefix)
        chunks = _text_chunks(context) if context.metadata_enabled else None
        items = []
        for number, image in enumerate(images):
            filename = f"{stem.replace('%batch_num%', str(number))}_{counter + number:05}_.png"
            image.save(folder / filename, pnginfo=chunks, compress_level=self.COMPRESS_LEVEL)
            items.append({"filename": filename, "subfolder": subfolder, "type": kind})
        return NodeOutput(ui={"images": items})


class PreviewImage(SaveImage):
    TITLE = "Preview Image"
    DESCRIPTION = "Writes PNG files into the temporary folder."
    COMPRESS_LEVEL = 1

    def __init__(self) -> None:
        # The counter restarts with temp/, so the name must differ from one node instance to the next.
        self._prefix = "ComfyUI_temp_" + "".join(random.choices("abcdefghijklmnopqrstuvwxyz", k=5))

    @classmethod
    def INPUT_TYPES(cls, folders: ModelFolders) -> dict[str, dict[str, Any]]:
        return {"required": {"images": ("IMAGE",)}, "hidden": GRAPH_IN_PNG}

    def run(self, context: NodeContext, images: Images) -> NodeOutput:  # type: ignore[override]
        return self._save(context, images, context.folders.temp, "temp", self._prefix)


class SaveImageWebsocket(Node):
    CATEGORY = "api/image"
    OUTPUT_NODE = True
    DESCRIPTION = "Sends each picture as a PNG frame over the socket; nothing is written to disk."
    PYTHON_MODULE = "custom_nodes.websocket_image_save"

    @classmethod
    def INPUT_TYPES(cls, folders: ModelFolders) -> dict[str, dict[str, Any]]:
        return {"required": {"images": ("IMAGE",)}}

    @classmethod
    def fingerprint(cls, folders: ModelFolders, *args: Any, **inputs: Any) -> object:
        return float("nan")  # a frame cannot be repeated from a cache

    def run(self, context: NodeContext, images: Images) -> NodeOutput:
        for number, image in enumerate(images):
            context.deliver(number, len(images), image)
        return NodeOutput()


class LoadImage(Node):
    CATEGORY = "image"
    RETURN_TYPES = ("IMAGE", "MASK")
    TITLE = "Load Image"
    DESCRIPTION = "A picture from the input folder and its transparency as a mask."

    @classmethod
    def INPUT_TYPES(cls, folders: ModelFolders) -> dict[str, dict[str, Any]]:
        return {"required": {"image": (_input_images(folders), {"image_upload": True})}}

    @classmethod
    def fingerprint(cls, folders: ModelFolders, image: str, **inputs: Any) -> object:
        return hashlib.sha256(folders.input_path(image).read_bytes()).hexdigest()

    @classmethod
    def validate(cls, folders: ModelFolders, image: str) -> str | None:
        return None if folders.input_path(image).exists() else f"Invalid image file: {image}"

    def run(self, context: NodeContext, image: str) -> tuple[Any, ...]:
        pictures: Images = []
        masks: Images = []
        with Image.open(context.folders.input_path(image)) as file:
            for frame in ImageSequence.Iterator(file):
                upright = ImageOps.exif_transpose(frame)
                if not pictures or upright.size == pictures[0].size:
                    pictures.append(upright.convert("RGB"))
                    masks.append(_transparency(upright))
        return pictures, masks


class LoadImageMask(Node):
    CATEGORY = "mask"
    RETURN_TYPES = ("MASK",)
    TITLE = "Load Image (as Mask)"
    DESCRIPTION = "One channel of a picture from the input folder."

    @classmethod
    def INPUT_TYPES(cls, folders: ModelFolders) -> dict[str, dict[str, Any]]:
        channels = ["alpha", "red", "green", "blue"]
        return {"required": {"image": (_input_images(folders), {"image_upload": True}), "channel": (channels,)}}

    @classmethod
    def fingerprint(cls, folders: ModelFolders, image: str, **inputs: Any) -> object:
        return LoadImage.fingerprint(folders, image)

    @classmethod
    def validate(cls, folders: ModelFolders, image: str) -> str | None:
        return LoadImage.validate(folders, image)

    def run(self, context: NodeContext, image: str, channel: str) -> tuple[Images]:
        with Image.open(context.folders.input_path(image)) as file:
            upright = ImageOps.exif_transpose(file).convert("RGBA")
        plane = upright.getchannel(channel[0].upper())
        return ([ImageChops.invert(plane) if channel == "alpha" else plane],)


class ImageScale(Node):
    CATEGORY = "image/upscaling"
    RETURN_TYPES = ("IMAGE",)
    TITLE = "Upscale Image"
    DESCRIPTION = "Resizes to a width and height; 0 keeps the aspect ratio."

    @classmethod
    def INPUT_TYPES(cls, folders: ModelFolders) -> dict[str, dict[str, Any]]:
        side = {"default": 512, "min": 0, "max": MAX_SIDE, "step": 1}
        return {
            "required": {
                "image": ("IMAGE",),
                "upscale_method": (list(SCALE_FILTERS),),
                "width": ("INT", side),
                "height": ("INT", side),
                "crop": (["disabled", "center"],),
            }
        }

    def run(self, context: NodeContext, image: Images, upscale_method: str, width: int, height: int, crop: str) -> tuple[Images]:
        if width == 0 and height == 0:
            return (image,)
        natural_width, natural_height = image[0].size
        width = width or max(1, round(natural_width * height / natural_height))
        height = height or max(1, round(natural_height * width / natural_width))
        kernel = SCALE_FILTERS[upscale_method]
        if crop == "center":
            return ([ImageOps.fit(picture, (width, height), kernel) for picture in image],)
        return ([picture.resize((width, height), kernel) for picture in image],)


class ImageScaleBy(Node):
    CATEGORY = "image/upscaling"
    RETURN_TYPES = ("IMAGE",)
    TITLE = "Upscale Image By"
    DESCRIPTION = "Resizes by a factor."

    @classmethod
    def INPUT_TYPES(cls, folders: ModelFolders) -> dict[str, dict[str, Any]]:
        factor = {"default": 1.0, "min": 0.01, "max": 8.0, "step": 0.01}
        return {"required": {"image": ("IMAGE",), "upscale_method": (list(SCALE_FILTERS),), "scale_by": ("FLOAT", factor)}}

    def run(self, context: NodeContext, image: Images, upscale_method: str, scale_by: float) -> tuple[Images]:
        size = (max(1, round(image[0].width * scale_by)), max(1, round(image[0].height * scale_by)))
        return ([picture.resize(size, SCALE_FILTERS[upscale_method]) for picture in image],)


class ImageInvert(Node):
    CATEGORY = "image"
    RETURN_TYPES = ("IMAGE",)
    TITLE = "Invert Image"
    DESCRIPTION = "The negative."

    @classmethod
    def INPUT_TYPES(cls, folders: ModelFolders) -> dict[str, dict[str, Any]]:
        return {"required": {"image": ("IMAGE",)}}

    def run(self, context: NodeContext, image: Images) -> tuple[Images]:
        return ([ImageChops.invert(picture) for picture in image],)


class RepeatImageBatch(Node):
    CATEGORY = "image/batch"
    RETURN_TYPES = ("IMAGE",)
    PYTHON_MODULE = "comfy_extras.nodes_images"
    DESCRIPTION = "The whole batch that often."

    @classmethod
    def INPUT_TYPES(cls, folders: ModelFolders) -> dict[str, dict[str, Any]]:
        return {"required": {"image": ("IMAGE",), "amount": ("INT", {"default": 1, "min": 1, "max": 4096})}}

    def run(self, context: NodeContext, image: Images, amount: int) -> tuple[Images]:
        return (image * amount,)


class ImageCompositeMasked(Node):
    CATEGORY = "image"
    RETURN_TYPES = ("IMAGE",)
    PYTHON_MODULE = "comfy_extras.nodes_mask"
    DESCRIPTION = "Lays one picture over another where the mask is white."

    @classmethod
    def INPUT_TYPES(cls, folders: ModelFolders) -> dict[str, dict[str, Any]]:
        place = ("INT", {"default": 0, "min": 0, "max": MAX_SIDE, "step": 1})
        pictures = {"destination": ("IMAGE",), "source": ("IMAGE",)}
        return {
            "required": {**pictures, "x": place, "y": place, "resize_source": ("BOOLEAN", {"default": False})},
            "optional": {"mask": ("MASK",)},
        }

    def run(
        self, context: NodeContext, destination: Images, source: Images, x: int, y: int, resize_source: bool, mask: Images | None = None
    ) -> tuple[Images]:
        made = []
        for number, below in enumerate(destination):
            above = source[number % len(source)]
            if resize_source:
                above = above.resize(below.size, Image.Resampling.BILINEAR)
            cover = mask[number % len(mask)].resize(above.size, Image.Resampling.BILINEAR) if mask else None
            result = below.copy()
            result.paste(above, (x, y), cover)
            made.append(result)
        return (made,)


def _text_chunks(context: NodeContext) -> PngInfo:
    chunks = PngInfo()
    chunks.add_text("prompt", json.dumps(context.prompt))
    for key, value in context.extra_pnginfo.items():
        chunks.add_text(key, json.dumps(value))
    return chunks


def _transparency(picture: Image.Image) -> Image.Image:
    if "A" in picture.getbands():
        return ImageChops.invert(picture.getchannel("A"))
    if picture.mode == "P" and "transparency" in picture.info:
        return ImageChops.invert(picture.convert("RGBA").getchannel("A"))
    return Image.new("L", EMPTY_MASK_SIZE, 0)


def _input_images(folders: ModelFolders) -> list[str]:
    with os.scandir(folders.input) as entries:
        return sorted(entry.name for entry in entries if os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES and entry.is_file())


NODES: dict[str, type[Node]] = {
    node.__name__: node
    for node in (
        EmptyImage, SaveImage, PreviewImage, SaveImageWebsocket, LoadImage, LoadImageMask, ImageScale, ImageScaleBy, ImageInvert,
        RepeatImageBatch, ImageCompositeMasked,
    )
}  # fmt: skip
