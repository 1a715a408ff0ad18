"""What is made of all the pictures of a batch: contact sheets, a zip, and at last their absence."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import threading
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, NamedTuple

from gateway.batches.contact_sheet import Cell, draw_sheet, shrink
from gateway.errors import NotFound, RedisUnavailable, StorageUnavailable
from gateway.jobs.batch_records import LIVE, PACKET, WAITING, Archive, Batch, archive_key
from gateway.jobs.batches import BatchStore
from gateway.jobs.model import Job, JobSpec, now_ms
from gateway.jobs.store import JobStore
from gateway.storage import Reader, Storage

log = logging.getLogger(__name__)

PAGE, COLUMNS, MOST_COLUMNS = 100, 10, 16
FETCHES_AT_ONCE = 8
WATCH_S = 1.0
CHORE_LEASE_S = 30.0
MOST_TRIES = 5


class _Stopped(Exception):
    """The process goes away while a zip is made; another one begins it anew."""


class _Entry(NamedTuple):
    """An item with the job it became, if that is still there."""

    place: int
    spec: JobSpec
    job: Job | None


class BatchPictures:
    """Raises NotFound, RedisUnavailable, StorageUnavailable."""

    def __init__(self, store: BatchStore, jobs: JobStore, storage: Storage) -> None:
        self._store, self._jobs, self._storage = store, jobs, storage
        self._drawing = asyncio.Semaphore(1)

    # -- contact sheets ----------------------------------------------------------------------------------------

    async def contact_sheet(self, batch: Batch, page: int) -> dict[str, Any]:
        """`{url, page, pages, first, last, complete}`; a complete sheet is drawn once, another one at every call."""
        columns = _choose_columns(batch)
        per_page = columns * (PAGE // columns)
        pages = -(-len(batch.states) // per_page)
        if page > pages:
            details = {"parameter": "page", "value": page, "allowed": f"1 to {pages}"}
            raise NotFound(f"There is no page {page}.", code="page_not_found", details=details)
        first = (page - 1) * per_page
        last = min(first + per_page, len(batch.states)) - 1
        complete = not {WAITING, LIVE} & set(batch.states[first : last + 1])
        key = _sheet_key(batch.id, page, complete)
        if not complete or await self._storage.size_bytes(key) is None:
            async with self._drawing:
                cells = await self._cells(batch, await self._entries(batch, first, last + 1))
                title = f"{batch.id}, items {first} to {last} of {len(batch.states)}, page {page} of {pages}"
                title += f": {', '.join(batch.spec.sweep)}" if batch.spec.sweep else ""
                body = await asyncio.to_thread(draw_sheet, title, cells, columns)
            await self._storage.put(key, body, "image/jpeg")
        where = {"url": self._storage.sign(key), "content_type": "image/jpeg", "complete": complete}
        return {"object": "contact_sheet", "page": page, "pages": pages, "first": first, "last": last, **where}

    async def _cells(self, batch: Batch, entries: list[_Entry]) -> list[Cell]:
        turn = asyncio.Semaphore(FETCHES_AT_ONCE)
        varied = list(batch.spec.sweep or {})

        async def draw(entry: _Entry) -> Cell:
            shown = [str(entry.spec.parameters.get(name)) for name in varied] or [str(entry.spec.parameters.get("prompt", ""))]
            label = f"{entry.place}: {', '.join(shown)}"
            status = batch.item_status(entry.place, entry.spec.id)
            if entry.job is None or not entry.job.outputs:
                return Cell(None, status.value if status != "succeeded" else "deleted", label)
            async with turn:
                with suppress(StorageUnavailable):
                    body = await self._storage.get(entry.job.outputs[0].key)
                    picture = await asyncio.to_thread(shrink, body)
                    return Cell(picture, "no picture", label)
            return Cell(None, "unreadable", label)

        return list(await asyncio.gather(*(draw(entry) for entry in entries)))

    async def _entries(self, batch: Batch, start: int, stop: int) -> list[_Entry]:
        found = list[_Entry]()
        for number in range(start // PACKET, -(-stop // PACKET)):
            specs = [item.spec for item in await self._store.packet(batch.id, number)]
            within = [(index, spec) for index, spec in enumerate(specs, number * PACKET) if start <= index < stop]
            jobs = {job.id: job for job in await self._jobs.load_many(spec.id for _, spec in within)}
            found += [_Entry(index, spec, jobs.get(spec.id)) for index, spec in within]
        return found

    # -- chores ------------------------------------------------------------------------------------------------

    async def watch(self) -> None:
        """For ever: zip what is asked for and clear away what was deleted, one at a time, under a lease that others take over."""
        while True:
            with suppress(RedisUnavailable):
                while (batch_id := await self._store.claim_chore(CHORE_LEASE_S)) is not None:
                    await self._do(batch_id)
            await asyncio.sleep(WATCH_S)

    async def _do(self, batch_id: str) -> None:
        batch = await self._store.load(batch_id)
        renewing = asyncio.create_task(self._renew(batch_id))
        try:
            if batch is not None and batch.deleted:
                await self._clear_away(batch)
            elif batch is not None and batch.archive is not None and batch.archive.status == "building":
                await self._build(batch, batch.archive)
            await self._store.end_chore(batch_id)
        except StorageUnavailable as error:
            log.warning("left for another try", extra={"batch": batch_id, "error": error.message})
        finally:
            renewing.cancel()

    async def _renew(self, batch_id: str) -> None:
        while True:
            await asyncio.sleep(CHORE_LEASE_S / 3)
            with suppress(RedisUnavailable):
                await self._store.keep_chore(batch_id, now_ms() + int(CHORE_LEASE_S * 1000))

    async def _clear_away(self, batch: Batch) -> None:
        for start in range(0, len(batch.states), PACKET):
            for entry in await self._entries(batch, start, start + PACKET):
                if entry.job is not None:
                    await self._storage.delete([output.key for output in entry.job.outputs])
                    await self._jobs.delete(entry.job.id)
        columns = _choose_columns(batch)
        pages = range(1, -(-len(batch.states) // (columns * (PAGE // columns))) + 1)
        sheets = [_sheet_key(batch.id, page, complete) for page in pages for complete in (True, False)]
        await self._storage.delete([archive_key(batch.id), *sheets])
        await self._store.forget(batch.id)

    async def _build(self, batch: Batch, archive: Archive) -> None:
        entries = await self._entries(batch, 0, len(batch.states))
        making = _ZipOfPictures(batch, entries)
        telling = asyncio.create_task(self._tell(batch.id, making))
        try:
            await self._storage.put_made(archive_key(batch.id), making.pieces, "application/zip")
            archive = making.archive().model_copy(update={"status": "ready"})
        except StorageUnavailable as error:
            tries = archive.tries + 1
            archive = Archive(tries=tries, status="failed" if tries >= MOST_TRIES else "building", error=error.message[:500])
            if archive.status == "building":
                raise
        finally:
            making.stop()
            telling.cancel()
            await self._store.write_archive(batch.id, archive)

    async def _tell(self, batch_id: str, making: _ZipOfPictures) -> None:
        while True:
            await asyncio.sleep(WATCH_S)
            with suppress(RedisUnavailable):
                await self._store.write_archive(batch_id, making.archive())


class _ZipOfPictures:
    """The pictures and a table of the items. Its pieces are made in another thread while they are sent."""

    def __init__(self, batch: Batch, entries: list[_Entry]) -> None:
        self._batch, self._entries = batch, entries
        self._date = datetime.fromtimestamp(batch.spec.created_ms / 1000, UTC).timetuple()[:6]
        self._stopped = threading.Event()
        self._done = self._pictures = self._size_bytes = 0

    def stop(self) -> None:
        self._stopped.set()

    def archive(self) -> Archive:
        return Archive(done=self._done, pictures=self._pictures, size_bytes=self._size_bytes)

    def pieces(self, read: Reader) -> Iterator[bytes]:
        """The zip's bytes in order; nothing is compressed, as pictures are. Pictures that are gone are left out."""
        target, rows = _Drain(), list[str]()
        with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
            for entry in self._entries:
                files = list[str]()
                for name, key in _name_files(entry):
                    if self._stopped.is_set():
                        raise _Stopped
                    if (body := read(key)) is not None:
                        archive.writestr(zipfile.ZipInfo(name, self._date), body)
                        files.append(name)
                        yield self._count(target.take())
                self._done, self._pictures = self._done + 1, self._pictures + len(files)
                rows.append(self._describe(entry, files))
            archive.writestr(zipfile.ZipInfo("items.jsonl", self._date), "".join(rows))
        yield self._count(target.take())

    def _count(self, piece: bytes) -> bytes:
        self._size_bytes += len(piece)
        return piece

    def _describe(self, entry: _Entry, files: list[str]) -> str:
        spec, status = entry.spec, self._batch.item_status(entry.place, entry.spec.id)
        row = {"index": entry.place, "id": spec.id, "status": status.value, "files": files, "workflow": spec.workflow, "seed": spec.seed}
        return json.dumps({**row, "parameters": spec.parameters, "metadata": spec.metadata}, ensure_ascii=False) + "\n"


class _Drain(io.RawIOBase):
    """A file that is only written to, and emptied on the way."""

    def __init__(self) -> None:
        super().__init__()
        self._held = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._held += data
        return len(data)

    def take(self) -> bytes:
        taken, self._held = bytes(self._held), bytearray()
        return taken


def _name_files(entry: _Entry) -> Iterator[tuple[str, str]]:
    """(name in the zip, key in the bucket) of an item's pictures: names by index, so that they sort as the items do."""
    outputs = entry.job.outputs if entry.job else ()
    for output in outputs:
        part = f"-{output.index}" if len(outputs) > 1 else ""
        yield f"{entry.place:05}{part}.{output.key.rpartition('.')[2]}", output.key


def _choose_columns(batch: Batch) -> int:
    """A row for each round of the parameter that varies fastest, where it fits."""
    for values in reversed((batch.spec.sweep or {}).values()):
        count = len(values) if isinstance(values, list) else round((values["to"] - values["from"]) // values["step"]) + 1
        return count if 1 < count <= MOST_COLUMNS else COLUMNS
    return COLUMNS


def _sheet_key(batch_id: str, page: int, complete: bool) -> str:
    return f"batches/{batch_id}/sheet-{page}{'' if complete else '-so-far'}.jpg"
