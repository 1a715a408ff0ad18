"""Pixels to PNG, WebP or JPEG bytes with Pillow, which lets other threads run meanwhile."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

EXTENSIONS: dict[str, str] = {"png": "png", "webp": "webp", "jpeg": "jpg"}
Pixels = NDArray[np.uint8]


def collect_text(prompt: Any, extra_pnginfo: Mapping[str, Any] | None) -> dict[str, str]:
    """The text chunks that ComfyUI's own SaveImage writes: the graph as `prompt`, then each key of extra_pnginfo, all as JSON."""
    text = {} if prompt is None else {"prompt": json.dumps(prompt)}
    return text | {name: json.dumps(value) for name, value in (extra_pnginfo or {}).items()}


def encode(pixels: Pixels, picture_format: str, *, quality: int, compress_level: int, text: Mapping[str, str]) -> memoryview:
    """`pixels` is (height, width, 3 or 4). Quality is read by webp and jpeg, compress level and text by png alone."""
    image = Image.fromarray(pixels)
    buffer = io.BytesIO()
    if picture_format == "png":
        image.save(buffer, format="PNG", compress_level=compress_level, pnginfo=build_png_info(text))
    elif picture_format == "webp":
        image.save(buffer, format="WEBP", quality=quality)
    else:
        image.convert("RGB").save(buffer, format="JPEG", quality=quality)
    return buffer.getbuffer()


def build_png_info(text: Mapping[str, str]) -> PngInfo | None:
    if not text:
        return None
    info = PngInfo()
    for name, value in text.items():
        info.add_text(name, value)
    return info
