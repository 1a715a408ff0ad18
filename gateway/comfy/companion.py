"""What changes where an instance has our companion extension (docker/comfyui/custom_nodes/fluxgate). Pure; without it nothing does."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

SAVE_NODE = "FluxgateSaveImage"
# What ComfyUI's own SaveImage uses: the bytes stay comparable between instances with and without the extension.
COMPRESS_LEVEL = 4


def save_in_background(graph: Mapping[str, Any], output_format: str, quality: int) -> dict[str, Any]:
    """The graph with every SaveImage replaced by the node that encodes in a thread, straight into the format that was asked for."""
    changed = copy.deepcopy(dict(graph))
    for node in changed.values():
        if node.get("class_type") == "SaveImage":
            node["class_type"] = SAVE_NODE
            node["inputs"] |= {"format": output_format, "quality": quality, "compress_level": COMPRESS_LEVEL}
    return changed
