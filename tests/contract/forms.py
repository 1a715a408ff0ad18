"""Uploads as a browser sends them."""

import io
from typing import Any

import aiohttp
from PIL import Image

from tests.contract.wire import Answer, Wire


def encode_png(color: tuple[int, ...], *, mode: str = "RGB", size: tuple[int, int] = (32, 32)) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, color).save(buffer, format="PNG")
    return buffer.getvalue()


async def upload(wire: Wire, filename: str, data: bytes, *, path: str = "/upload/image", **fields: Any) -> Answer:
    """Posts the form with the name as it is: aiohttp would percent-encode it."""
    form = aiohttp.FormData(quote_fields=False)
    form.add_field("image", io.BytesIO(data), filename=filename, content_type="application/octet-stream")
    for name, value in fields.items():
        form.add_field(name, value)
    return await wire.post(path, data=form)
