"""The routes that move files: pictures out, pictures in, and a safetensors header. They refuse to leave their folders."""

import asyncio
import io
import json
import mimetypes
import os
from pathlib import Path
from typing import Any

from aiohttp import web
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from local.engine.folders import ModelFileMissing, ModelFolders

# Browsers would run these; they are handed out as bytes.
ACTIVE_CONTENT = frozenset({"text/html", "text/html-sandboxed", "application/xhtml+xml", "text/javascript", "text/css"})
PREVIEW_QUALITY = 90
LARGEST_HEADER_BYTES = 1024 * 1024


class FileRoutes:
    def __init__(self, folders: ModelFolders) -> None:
        self._folders = folders

    async def view(self, request: web.Request) -> web.StreamResponse:
        """GET /view: a file of the output, input or temp folder, as it is (ranges allowed), as a preview, or one channel of it."""
        if "filename" not in request.query:
            return web.Response(status=404)
        located = self._locate(request.query["filename"], request.query.get("type", "output"), request.query.get("subfolder"))
        if isinstance(located, int):
            return web.Response(status=located)
        if not located.is_file():
            return web.Response(status=404)
        headers = {"Content-Disposition": f'filename="{located.name}"'}
        channel = request.query.get("channel", "")
        if "preview" in request.query:
            body, content_type = await asyncio.to_thread(_render_preview, located, request.query["preview"], channel)
            return web.Response(body=body, content_type=content_type, headers=headers)
        if channel in ("rgb", "a"):
            body = await asyncio.to_thread(_render_channel, located, channel)
            return web.Response(body=body, content_type="image/png", headers=headers)
        content_type = mimetypes.guess_type(located.name)[0] or "application/octet-stream"
        headers["Content-Type"] = "application/octet-stream" if content_type in ACTIVE_CONTENT else content_type
        return web.FileResponse(located, headers=headers)

    async def upload_image(self, request: web.Request) -> web.Response:
        """POST /upload/image: stores the form's file `image`; an other file of that name is kept unless `overwrite` says so."""
        return await self._upload(request, lambda form, data: data)

    async def upload_mask(self, request: web.Request) -> web.Response:
        """POST /upload/mask: stores the picture named by `original_ref` with the transparency of the uploaded one."""
        return await self._upload(request, self._merge_mask)

    async def view_metadata(self, request: web.Request) -> web.Response:
        """GET /view_metadata/{folder}: the free text part of a safetensors header, and nothing else of the file."""
        name = request.query.get("filename", "")
        if not name.endswith(".safetensors"):
            return web.Response(status=404)
        try:
            path = self._folders.path(request.match_info["folder"], name)
        except (ModelFileMissing, KeyError):
            return web.Response(status=404)
        metadata = await asyncio.to_thread(_read_safetensors_metadata, path)
        return web.Response(status=404) if metadata is None else web.json_response(metadata)

    def _locate(self, filename: str, kind: str, subfolder: str | None) -> Path | int:
        """The path of an output item, or the status that refuses it."""
        bare, directory = self._folders.split_annotation(filename)
        directory = directory or self._folders.directory(kind)
        if not bare or bare.startswith("/") or ".." in bare or directory is None:
            return 400
        if subfolder is not None:
            inside = Path(os.path.abspath(directory / subfolder))
            if not inside.is_relative_to(directory):
                return 403
            directory = inside
        return directory / os.path.basename(bare)

    async def _upload(self, request: web.Request, prepare: Any) -> web.Response:
        form = await request.post()
        kind = str(form.get("type", "input"))
        directory = self._folders.directory(kind)
        if directory is None:
            raise ValueError(f"type {kind!r} is not one of input, output, temp")  # ComfyUI answers 500 too
        image = form.get("image")
        if not image:
            return web.Response(status=400)
        if not isinstance(image, web.FileField):
            raise TypeError("the field image holds no file")
        subfolder = str(form.get("subfolder", ""))
        folder = _upload_folder(directory, subfolder, image.filename)
        if folder is None:
            return web.Response(status=400)
        data = await asyncio.to_thread(prepare, form, image.file.read())
        name = await asyncio.to_thread(_store, folder, image.filename, data, form.get("overwrite") in ("true", "1"))
        return web.json_response({"name": name, "subfolder": subfolder, "type": kind})

    def _merge_mask(self, form: Any, mask: bytes) -> bytes:
        reference = json.loads(form["original_ref"])
        located = self._locate(reference["filename"], reference.get("type", "output"), reference.get("subfolder"))
        if isinstance(located, int):
            raise FileNotFoundError(f"original_ref {reference} leads nowhere")
        with Image.open(located) as original:
            texts = dict(original.text) if isinstance(getattr(original, "text", None), dict) else {}  # type: ignore[attr-defined]
            merged = original.convert("RGBA")
        with Image.open(io.BytesIO(mask)) as picture:
            merged.putalpha(picture.convert("RGBA").getchannel("A"))
        chunks = PngInfo()
        for key, value in texts.items():
            chunks.add_text(key, value)
        buffer = io.BytesIO()
        merged.save(buffer, format="PNG", compress_level=4, pnginfo=chunks)
        return buffer.getvalue()


def _upload_folder(directory: Path, subfolder: str, filename: str) -> Path | None:
    """Where an upload goes, or None when it would leave the directory."""
    folder = Path(os.path.abspath(directory / subfolder))
    return folder if Path(os.path.abspath(folder / filename)).is_relative_to(directory) else None


def _store(folder: Path, filename: str, data: bytes, overwrite: bool) -> str:
    """Writes the file and returns the name it got: `a (1).png` when another `a.png` is there already."""
    folder.mkdir(parents=True, exist_ok=True)
    stem, suffix = os.path.splitext(filename)
    name = filename
    number = 1
    while not overwrite and (folder / name).exists():
        if (folder / name).read_bytes() == data:
            return name
        name = f"{stem} ({number}){suffix}"
        number += 1
    (folder / name).write_bytes(data)
    return name


def _render_preview(path: Path, wish: str, channel: str) -> tuple[bytes, str]:
    """`wish` is `webp` or `jpeg`, optionally `;quality`; anything else is webp."""
    image_format, *rest = wish.split(";")
    if image_format not in ("webp", "jpeg") or "a" in channel:
        image_format = "webp"
    quality = int(rest[-1]) if rest and rest[-1].isdigit() else PREVIEW_QUALITY
    buffer = io.BytesIO()
    with Image.open(path) as picture:
        rendered = picture.convert("RGB") if image_format == "jpeg" or channel == "rgb" else picture
        rendered.save(buffer, format=image_format, quality=quality)
    return buffer.getvalue(), f"image/{image_format}"


def _render_channel(path: Path, channel: str) -> bytes:
    buffer = io.BytesIO()
    with Image.open(path) as picture:
        if channel == "rgb":
            picture.convert("RGB").save(buffer, format="PNG")
        else:
            alpha = Image.new("RGBA", picture.size)
            alpha.putalpha(picture.getchannel("A") if picture.mode == "RGBA" else Image.new("L", picture.size, 255))
            alpha.save(buffer, format="PNG")
    return buffer.getvalue()


def _read_safetensors_metadata(path: Path) -> dict[str, Any] | None:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > LARGEST_HEADER_BYTES:
            return None
        try:
            header = json.loads(file.read(length))
        except ValueError:
            return None
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    return metadata if isinstance(metadata, dict) else None
