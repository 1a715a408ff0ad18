"""Hashes of the base models' files in MODELS_DIR, for manifests of jobs: found beside the work, once for each content, kept in Redis."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import BinaryIO

from gateway.errors import FluxgateError
from gateway.instances import FileHash, InstanceRegistry
from gateway.jobs.model import now_ms
from gateway.models.folder import ModelFolder

log = logging.getLogger(__name__)

WATCH_S = 30.0
PIECE_BYTES = 16 << 20
# A file that was changed this lately may not be whole yet.
SETTLED_MS = 2000


class ModelHashes:
    """Of the files named `files` below a folder of a kind, as ComfyUI lists them: `vae/ae.safetensors` is its `ae.safetensors`."""

    def __init__(self, registry: InstanceRegistry, root: Path, files: Collection[str]) -> None:
        self._registry, self._folder, self._files = registry, ModelFolder(root), frozenset(files)
        # What was found here: several processes with several folders do not undo each other's work.
        self._known: dict[str, FileHash] = {}

    async def watch(self) -> None:
        """For ever. What cannot be read now is tried again later."""
        while True:
            is_whole = True
            try:
                is_whole = await self.look()
            except (FluxgateError, OSError) as error:
                log.warning("hashes of models not found", extra={"error": str(error)})
            await asyncio.sleep(WATCH_S if is_whole else SETTLED_MS / 1000)

    async def look(self) -> bool:
        """Once; False when a file was being written. Raises FluxgateError, OSError."""
        is_whole = True
        for place, path in await asyncio.to_thread(lambda: list(self._list())):
            now = _measure(path)
            if _is_of(self._known.get(place), now):
                continue
            known = (await self._registry.file_hashes()).get(place)
            if not _is_of(known, now) and (known := await self._find(place, path, now)):
                await self._registry.note_file_hash(place, known)
            if known is not None:
                self._known[place] = known
            is_whole = is_whole and known is not None
        return is_whole

    def _list(self) -> Iterator[tuple[str, Path]]:
        """(place, path); links are followed, as ComfyUI does."""
        root = self._folder.root
        for folder, inner, names in os.walk(root, followlinks=True):
            inner[:] = [name for name in inner if not name.startswith(".")]
            for path in (Path(folder, name) for name in names):
                place = path.relative_to(root).as_posix()
                # A link may lead to where only the instance can look.
                if place.partition("/")[2] in self._files and path.is_file():
                    yield place, path

    async def _find(self, place: str, path: Path, now: tuple[int, int]) -> FileHash | None:
        """None for a file that is being written."""
        size_bytes, mtime_ms = now
        if now_ms() - mtime_ms < SETTLED_MS:
            return None
        brought = (await asyncio.to_thread(self._folder.read)).files.get(place)
        if brought and brought.size_bytes == size_bytes and mtime_ms <= brought.brought_ms:
            return FileHash(sha256=brought.sha256, size_bytes=size_bytes, mtime_ms=mtime_ms)
        sha256 = await _hash(path)
        return FileHash(sha256=sha256, size_bytes=size_bytes, mtime_ms=mtime_ms) if _measure(path) == now else None


def _is_of(known: FileHash | None, now: tuple[int, int]) -> bool:
    return known is not None and (known.size_bytes, known.mtime_ms) == now


def _measure(path: Path) -> tuple[int, int]:
    """(size in bytes, time of the last change in ms)"""
    status = path.stat()
    return status.st_size, status.st_mtime_ns // 1_000_000


async def _hash(path: Path) -> str:
    """SHA-256, a piece at a time: a process that shall end does not wait for gigabytes."""
    digest = hashlib.sha256()

    def take(file: BinaryIO) -> bool:
        piece = file.read(PIECE_BYTES)
        digest.update(piece)
        return bool(piece)

    with await asyncio.to_thread(path.open, "rb") as file:
        while await asyncio.to_thread(take, file):
            pass
    return digest.hexdigest()
