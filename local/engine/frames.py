"""The binary frames of the socket: a picture, alone or with the node that made it."""

import io
import json
import struct
from typing import Any

from PIL import Image, ImageOps

PREVIEW_IMAGE = 1
PREVIEW_IMAGE_WITH_METADATA = 4
FORMAT_NUMBERS = {"JPEG": 1, "PNG": 2}
PREVIEW_SIDE = 512  # smaller pictures are enlarged to it, as ComfyUI does
PREVIEW_QUALITY = 95


def encode_picture(picture: Image.Image, *, full_size: bool) -> tuple[str, bytes]:
    """(Pillow format, file bytes): the untouched picture as PNG, or a preview as JPEG."""
    buffer = io.BytesIO()
    if full_size:
        picture.save(buffer, format="PNG", compress_level=1)
        return "PNG", buffer.getvalue()
    ImageOps.contain(picture, (PREVIEW_SIDE, PREVIEW_SIDE), Image.Resampling.BILINEAR).save(buffer, format="JPEG", quality=PREVIEW_QUALITY)
    return "JPEG", buffer.getvalue()


def pack_picture(image_format: str, data: bytes) -> bytes:
    """u32 type 1, u32 image format, image."""
    return struct.pack(">II", PREVIEW_IMAGE, FORMAT_NUMBERS[image_format]) + data


def pack_picture_with_metadata(image_format: str, data: bytes, metadata: dict[str, Any]) -> bytes:
    """u32 type 4, u32 length of the JSON, JSON, image."""
    header = json.dumps({**metadata, "image_type": f"image/{image_format.lower()}"}).encode()
    return struct.pack(">II", PREVIEW_IMAGE_WITH_METADATA, len(header)) + header + data
