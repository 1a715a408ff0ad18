"""The engine's extra node for benches: `python -m local.engine --nodes bench.nodes`."""

from __future__ import annotations

import time
from typing import Any

from PIL import Image

from local.engine.folders import ModelFolders
from local.engine.nodes import Node, NodeContext


class BenchPause(Node):
    """Hands its picture on after a while, without using the CPU: a GPU at work, as seen from outside."""

    CATEGORY = "bench"
    RETURN_TYPES = ("IMAGE",)

    @classmethod
    def INPUT_TYPES(cls, folders: ModelFolders) -> dict[str, dict[str, Any]]:
        return {"required": {"image": ("IMAGE",), "seconds": ("FLOAT", {"default": 0.15, "min": 0.0, "max": 60.0})}}

    def run(self, context: NodeContext, image: list[Image.Image], seconds: float) -> tuple[list[Image.Image]]:
        time.sleep(seconds)
        return (image,)


NODES: dict[str, type[Node]] = {"BenchPause": BenchPause}
