"""A node that takes time, for a real ComfyUI: copy this file into its custom_nodes folder before the suite runs against it.
Its twin for the engine is probe_nodes.py."""

import time
from typing import Any

import comfy.utils  # type: ignore[import-not-found]  # there only inside ComfyUI
from PIL import Image


class ProbeSteps:
    CATEGORY = "probe"
    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "run"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict[str, Any]]:
        return {
            "required": {
                "image": ("IMAGE",),
                "steps": ("INT", {"default": 3, "min": 1, "max": 10000}),
                "delay": ("FLOAT", {"default": 0.05, "min": 0.0, "max": 10.0}),
                "tag": ("STRING", {"default": ""}),
                "mode": (["ok", "preview", "quiet", "raise"],),
            }
        }

    def run(self, image: Any, steps: int, delay: float, tag: str, mode: str) -> tuple[Any]:
        preview = ("JPEG", Image.new("RGB", (64, 64), (200, 40, 40)), 512) if mode == "preview" else None
        bar = comfy.utils.ProgressBar(steps)
        for step in range(1, steps + 1):
            time.sleep(delay)
            if mode != "quiet":
                bar.update_absolute(step, steps, preview)
        if mode == "raise":
            raise ValueError(f"probe failure {tag}")
        return (image,)


NODE_CLASS_MAPPINGS: dict[str, type] = {"ProbeSteps": ProbeSteps}
