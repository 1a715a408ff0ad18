"""A node that takes time, for the engine: `python -m local.engine --nodes tests.contract.probe_nodes`.
Its twin for a real ComfyUI is comfyui_probe_node.py."""

import time
from typing import Any

from PIL import Image

from local.engine.folders import ModelFolders
from local.engine.nodes import Node, NodeContext


class ProbeSteps(Node):
    """Hands its picture on after `steps` times `delay` seconds. Modes: ok and preview report each step, quiet reports none,
    raise reports and then fails."""

    CATEGORY = "probe"
    RETURN_TYPES = ("IMAGE",)

    @classmethod
    def INPUT_TYPES(cls, folders: ModelFolders) -> dict[str, dict[str, Any]]:
        return {
            "required": {
                "image": ("IMAGE",),
                "steps": ("INT", {"default": 3, "min": 1, "max": 10000}),
                "delay": ("FLOAT", {"default": 0.05, "min": 0.0, "max": 10.0}),
                "tag": ("STRING", {"default": ""}),
                "mode": (["ok", "preview", "quiet", "raise"],),
            }
        }

    def run(
        self, context: NodeContext, image: list[Image.Image], steps: int, delay: float, tag: str, mode: str
    ) -> tuple[list[Image.Image]]:
        preview = Image.new("RGB", (64, 64), (200, 40, 40)) if mode == "preview" else None
        for step in range(1, steps + 1):
            time.sleep(delay)
            if mode != "quiet":
                context.progress(step, steps, preview)
        if mode == "raise":
            raise ValueError(f"probe failure {tag}")
        return (image,)


NODES: dict[str, type[Node]] = {"ProbeSteps": ProbeSteps}
