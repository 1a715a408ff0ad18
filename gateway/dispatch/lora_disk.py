"""Brings published LoRAs from S3 into ComfyUI's folder, and keeps that folder within its limit. It knows files, not graphs."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
from pathlib import Path

from gateway.errors import StorageUnavailable
from gateway.loras import Lora
from gateway.storage import Storage

log = logging.getLogger(__name__)

FREE_FLOOR_BYTES = 2 << 30


class LoraDisk:
    """One folder that instances list. Only files published by us are brought or taken away; others are never touched."""

    def __init__(self, folder: Path, storage: Storage, max_bytes: int) -> None:
        self._folder, self._storage, self._max_bytes = folder, storage, max_bytes

    async def bring(self, published: list[Lora]) -> None:
        """Every published LoRA that fits, the newest first. A file appears under its name only when it is whole."""
        await asyncio.to_thread(self._folder.mkdir, parents=True, exist_ok=True)
        room = self._max_bytes
        for lora in reversed(published):
            size = lora.size_bytes or 0
            path = self._folder / lora.file
            if size > room:
                await asyncio.to_thread(path.unlink, missing_ok=True)
                continue
            room -= size
            if not await asyncio.to_thread(path.exists) and await asyncio.to_thread(self._has_room, size):
                await self._fetch(lora, path)

    def _has_room(self, size_bytes: int) -> bool:
        return shutil.disk_usage(self._folder).free - size_bytes > FREE_FLOOR_BYTES

    async def _fetch(self, lora: Lora, path: Path) -> None:
        # ComfyUI lists half-written files by their extension: another one until it is whole.
        waiting = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        try:
            await self._storage.get_file(lora.key, waiting)
            await asyncio.to_thread(_settle, waiting, path)
            log.info("LoRA brought", extra={"file": lora.file})
        except StorageUnavailable as error:
            log.warning("LoRA not brought", extra={"file": lora.file, "error": error.message})
        finally:
            await asyncio.to_thread(waiting.unlink, missing_ok=True)


def _settle(waiting: Path, path: Path) -> None:
    with waiting.open("rb") as file:
        os.fsync(file.fileno())
    waiting.replace(path)
