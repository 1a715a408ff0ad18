"""Between S3 and an instance: inputs go there before a prompt; its pictures are fetched, converted when asked to, and stored.

It knows no Redis.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import logging
import re
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from mimetypes import guess_type
from typing import Any, TypeAlias, TypeVar

from PIL import Image

from gateway.comfy.client import ComfyClient, OutputFile
from gateway.errors import InstanceError, OutputMissing, Unavailable
from gateway.jobs.model import JobSpec, Output
from gateway.moderation.verdicts import Moderation
from gateway.storage import Storage

T = TypeVar("T")

log = logging.getLogger(__name__)

_TYPES = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp", "mp4": "video/mp4", "webm": "video/webm", "gif": "image/gif"}
# What is opened and read to its end before it is stored; other files are stored as they come.
_PICTURES = ("png", "jpg", "jpeg", "webp", "gif", "bmp", "tif", "tiff")
# A PNG header is signature (8), chunk length and name (8), width and height (u32 each).
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Its last chunk, with its checksum: a file without it is cut short, or still being written.
_PNG_END = b"IEND\xaeB`\x82"


@dataclass(frozen=True, slots=True)
class Picture:
    body: bytes
    extension: str
    width: int | None
    height: int | None


Early: TypeAlias = asyncio.Task[Picture | None]


def convert(body: bytes, name: str, output_format: str, quality: int) -> Picture:
    """The picture in the format asked for, "" for any. One that already is goes through byte for byte, with ComfyUI's metadata in it.

    Raises OutputMissing when the bytes are not the picture they claim to be.
    """
    if body.startswith(_PNG_SIGNATURE) and output_format in ("png", ""):
        if _PNG_END not in body[-1024:]:
            raise OutputMissing(f"{name!r} is cut short after {len(body)} bytes")
        return Picture(body, "png", int.from_bytes(body[16:20], "big"), int.from_bytes(body[20:24], "big"))
    extension = name.rpartition(".")[2].lower()
    if extension in ("mp4", "webm") or (not output_format and extension not in _PICTURES):
        return Picture(body, extension if re.fullmatch("[a-z0-9]{1,8}", extension) else "bin", None, None)
    try:
        with Image.open(io.BytesIO(body)) as image:
            # Opening reads the header alone; what is cut short shows here.
            image.load()
            if not output_format or (image.format or "").lower() == output_format or getattr(image, "is_animated", False):
                return Picture(body, (image.format or extension).lower(), *image.size)
            target = io.BytesIO()
            picture = image.convert("RGB") if output_format == "jpeg" else image
            picture.save(target, output_format.upper(), quality=quality)
            return Picture(target.getvalue(), output_format, *image.size)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise OutputMissing(f"{name!r} is not a readable picture: {error}") from error


def _type_of(extension: str) -> str:
    """A content type that no browser runs."""
    guessed = _TYPES.get(extension) or guess_type(f"x.{extension}")[0] or ""
    return guessed if guessed.startswith(("image/", "video/", "audio/")) and "svg" not in guessed else "application/octet-stream"


async def _gather(works: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """All of them, to their ends; then the first error, if there was one."""
    all_works, done = list(works), list[T]()
    if len(all_works) == 1:
        return [await all_works[0]]
    for result in await asyncio.gather(*all_works, return_exceptions=True):
        if isinstance(result, BaseException):
            raise result
        done.append(result)
    return done


class Ingest:
    """Fetches and stores the outputs of finished prompts, a bounded number at a time, off the instance's critical path."""

    def __init__(self, storage: Storage, moderation: Moderation, *, tries: int, at_once: int = 8) -> None:
        self._storage, self.moderation = storage, moderation
        self._tries = tries
        self._turn, self._judging = asyncio.Semaphore(at_once), asyncio.Semaphore(at_once)

    async def bring(self, client: ComfyClient, spec: JobSpec) -> None:
        """Put a job's inputs where its graph will look for them. Raises StorageUnavailable, InstanceError."""
        for given in spec.inputs:
            body = await self._retry(partial(self._storage.get, given.key))
            await client.put_input(given.file, body, overwrite=True)

    async def take_away(self, client: ComfyClient, spec: JobSpec, *, companion: bool = False) -> None:
        """Nobody's picture stays on an instance. One that is out of reach keeps it: no more can be done."""
        for given in spec.inputs:
            try:
                await client.remove_input(given.file, companion=companion)
            except InstanceError as error:
                log.warning("input not removed", extra={"file": given.file, "error": error.message})

    def fetch_early(
        self, client: ComfyClient, spec: JobSpec, file: OutputFile, *, companion: bool, after: Callable[[], Awaitable[None]]
    ) -> Early:
        """Begin to fetch a picture whose prompt has not ended yet, `after` that. What goes wrong with it is tried again when it has."""

        async def fetch() -> Picture | None:
            await after()
            async with self._turn:
                try:
                    return await self._fetch(client, spec, file, companion)
                except Unavailable as error:
                    log.info("picture not fetched early", extra={"error": error.message})
                    return None

        return asyncio.create_task(fetch())

    async def store(
        self, client: ComfyClient, spec: JobSpec, files: list[OutputFile], early: Mapping[OutputFile, Early], *, companion: bool = False
    ) -> tuple[Output, ...]:
        """Every picture of a job, in order. Raises the last error when one cannot be stored: never a URL to nothing.

        Where pictures are judged none of a job is stored before all were. Raises Moderated.
        """
        judged: list[Picture] | list[None] = [None] * len(files)
        if self.moderation.judges_pictures:
            judged = await _gather(self._judge_one(client, spec, file, early.get(file), companion) for file in files)
        stores = (
            self._store_one(client, spec, index, file, early.get(file), companion, known)
            for index, (file, known) in enumerate(zip(files, judged, strict=True))
        )
        return tuple(await _gather(stores))

    async def _judge_one(self, client: ComfyClient, spec: JobSpec, file: OutputFile, early: Early | None, companion: bool) -> Picture:
        fetched = await early if early else None
        async with self._turn:
            picture = fetched if fetched else await self._retry(partial(self._fetch, client, spec, file, companion))
        # A slow judge holds up nobody's picture but this job's.
        async with self._judging:
            await self.moderation.require_picture(picture.body, _type_of(picture.extension), spec)
        return picture

    async def _store_one(
        self, client: ComfyClient, spec: JobSpec, index: int, file: OutputFile, early: Early | None, companion: bool, judged: Picture | None
    ) -> Output:
        known = judged if judged or early is None else await early
        async with self._turn:
            picture = known if known else await self._retry(partial(self._fetch, client, spec, file, companion))
            key = f"generations/{spec.id}/{index}.{picture.extension}"
            output = Output(
                index=index,
                key=key,
                content_type=_type_of(picture.extension),
                size_bytes=len(picture.body),
                sha256=hashlib.sha256(picture.body).hexdigest(),
                width=picture.width,
                height=picture.height,
                node_id=file.node_id,
                name=file.filename,
            )
            await self._retry(partial(self._storage.put, key, picture.body, output.content_type, output.sha256))
        return output

    async def _fetch(self, client: ComfyClient, spec: JobSpec, file: OutputFile, companion: bool) -> Picture:
        """The picture as it will be stored. One that comes broken is as good as none: it is fetched again."""
        body = await client.view(file, companion=companion)
        wanted = "" if spec.raw else str(spec.parameters.get("output_format", "png"))
        quality = int(spec.parameters.get("quality", 90))
        if wanted in ("png", "") and body.startswith(_PNG_SIGNATURE):
            return convert(body, file.filename, wanted, quality)
        return await asyncio.to_thread(convert, body, file.filename, wanted, quality)

    async def _retry(self, call: Callable[[], Awaitable[T]]) -> T:
        pause_s = 0.2
        for remaining in range(self._tries - 1, -1, -1):
            try:
                return await call()
            except Unavailable as error:
                if remaining == 0:
                    raise
                log.warning("ingest tried again", extra={"error": error.message, "pause_s": pause_s})
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 3, 10.0)
        raise AssertionError("unreachable: the last try returns or raises")
