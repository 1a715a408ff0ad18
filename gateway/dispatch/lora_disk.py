"""Brings published LoRAs from S3 into ComfyUI's folder, and keeps that folder within its limits. It knows files, not graphs."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from gateway.errors import StorageUnavailable
from gateway.loras.registry import Lora
from gateway.storage import Storage

log = logging.getLogger(__name__)

# A job that waits or runs touches its LoRAs every second; what was touched so lately is never taken away, whatever the limit.
HELD_MS = 60_000


def rank(published: Sequence[Lora], used: Mapping[str, int]) -> list[Lora]:
    """The most lately used first. One that was never used counts from its publication."""
    return sorted(published, key=lambda lora: (max(used.get(lora.file, 0), lora.created_ms or 0), lora.file), reverse=True)


def choose_kept(ranked: Sequence[Lora], used: Mapping[str, int], max_bytes: int, now_ms: int) -> list[Lora]:
    """Those that the folder shall hold, in the same order: as many as fit, and all that are held."""
    kept, room = [], max_bytes
    for lora in ranked:
        size = lora.size_bytes or 0
        if size <= room or is_held(lora, used, now_ms):
            kept.append(lora)
            room -= size
    return kept


def is_held(lora: Lora, used: Mapping[str, int], now_ms: int) -> bool:
    return now_ms - used.get(lora.file, 0) < HELD_MS


class LoraDisk:
    """One folder that instances list. Only files published by us are brought or taken away; others are never touched."""

    def __init__(self, folder: Path, storage: Storage, max_bytes: int, min_free_bytes: int) -> None:
        self._folder, self._storage, self._max_bytes, self._min_free_bytes = folder, storage, max_bytes, min_free_bytes
        self._without_room: set[str] = set()  # told once

    async def bring(self, published: Sequence[Lora], used: Mapping[str, int], now_ms: int) -> None:
        """Every published LoRA that fits, the last used first. A file appears under its name only when it is whole."""
        await asyncio.to_thread(self._folder.mkdir, parents=True, exist_ok=True)
        ranked = rank(published, used)
        kept = choose_kept(ranked, used, self._max_bytes, now_ms)
        for lora in ranked:
            if lora not in kept:
                await self._take_away(lora)
        for place, lora in enumerate(kept):
            if await asyncio.to_thread((self._folder / lora.file).exists):
                continue
            less_used = [other for other in reversed(kept[place + 1 :]) if not is_held(other, used, now_ms)]
            if await self._make_room(lora, less_used):
                await self._fetch(lora)

    async def _make_room(self, lora: Lora, less_used: Sequence[Lora]) -> bool:
        """Take away what is used less until the disk has room for this one; False when that is not enough."""
        waiting = list(less_used)
        while await asyncio.to_thread(self._free_bytes) - (lora.size_bytes or 0) < self._min_free_bytes:
            if not waiting:
                if lora.file not in self._without_room:
                    log.warning("no room for a LoRA", extra={"file": lora.file, "size_bytes": lora.size_bytes, "folder": str(self._folder)})
                self._without_room.add(lora.file)
                return False
            await self._take_away(waiting.pop(0))
        self._without_room.discard(lora.file)
        return True

    def _free_bytes(self) -> int:
        return shutil.disk_usage(self._folder).free

    async def _take_away(self, lora: Lora) -> None:
        path = self._folder / lora.file
        if await asyncio.to_thread(path.exists):
            await asyncio.to_thread(path.unlink, missing_ok=True)
            log.info("LoRA taken away", extra={"file": lora.file})

    async def _fetch(self, lora: Lora) -> None:
        path = self._folder / lora.file
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
