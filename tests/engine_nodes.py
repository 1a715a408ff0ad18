"""Nodes for tests, loaded into an engine by `--nodes tests.engine_nodes`: one that takes its time and two that break.
They know nothing of models."""

from __future__ import annotations

import time
from typing import Any, ClassVar

from PIL import Image

from local.engine.folders import ModelFolders
from local.engine.nodes import Node, NodeContext

Images = list[Image.Image]


class SlowImage(Node):
    """Hands its pictures on after `steps` pauses of `delay_ms`, telling each step; a preview goes with it when they are on."""

    CATEGORY = "tests"
    RETURN_TYPES: ClassVar[tuple[str, ...]] = ("IMAGE",)

    @classmethod
    def INPUT_TYPES(cls, folders: ModelFolders) -> dict[str, dict[str, Any]]:
        return {
            "required": {
                "images": ("IMAGE",),
                "steps": ("INT", {"default": 5, "min": 1, "max": 10_000}),
                "delay_ms": ("INT", {"default": 50, "min": 0, "max": 60_000}),
            }
        }

    @classmethod
    def fingerprint(cls, folders: ModelFolders, *args: Any, **inputs: Any) -> object:
        return float("nan")  # a cached result would take no time

    def run(self, context: NodeContext, images: Images, steps: int, delay_ms: int) -> tuple[Images]:
        for step in range(1, steps + 1):
            time.sleep(delay_ms / 1000)
            context.progress(step, steps, images[0])
        return (images,)


class OutOfMemoryError(RuntimeError):
    """What torch raises when a GPU is full, by the name under which it travels."""

    __module__ = "torch"


class FailingImage(Node):
    """Raises: `error` a ValueError that quotes a path, `memory` what a full GPU raises."""

    CATEGORY = "tests"
    RETURN_TYPES: ClassVar[tuple[str, ...]] = ("IMAGE",)

    @classmethod
    def INPUT_TYPES(cls, folders: ModelFolders) -> dict[str, dict[str, Any]]:
        return {"required": {"images": ("IMAGE",), "kind": (["error", "memory"],)}}

    def run(self, context: NodeContext, images: Images, kind: str) -> tuple[Images]:
        if kind == "memory":
            raise OutOfMemoryError("Allocation on device 0 would exceed allowed memory.")
        raise ValueError("cannot read /srv/comfyui/models/secret/weights.bin")


NODES: dict[str, type[Node]] = {node.__name__: node for node in (SlowImage, FailingImage)}
