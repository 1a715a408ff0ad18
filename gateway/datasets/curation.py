"""From an upload to a dataset: sort out, check, store in S3, record. It holds few files in memory at a time, whatever came.

An upload that cheats is refused whole; a file that cannot be used is named in the dataset and keeps it from being trained.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

from gateway.datasets.archives import Archive
from gateway.datasets.arrivals import MEDIA_EXTENSIONS, Sorted, Source, extension_of, sort_arrivals
from gateway.datasets.intake import CONTENT_TYPES, MAX_PICTURE_BYTES, MAX_VIDEO_BYTES, Media, Refused, read_picture, read_video
from gateway.datasets.records import Asset, Dataset, DatasetFile, DatasetHead, Problem, warning
from gateway.datasets.store import Change, DatasetStore, absent
from gateway.edge.multipart import Form, Part
from gateway.errors import FluxgateError, Unprocessable
from gateway.storage import Storage

# A picture of 64 megapixels takes half a gigabyte while it is converted.
AT_ONCE = 2
_ZIP_SIGNATURE = b"PK\x03\x04"
_EMPTY_ZIP_SIGNATURE = b"PK\x05\x06"


@dataclass(frozen=True, slots=True)
class Taken:
    """What came of an upload: names that were stored, names that were refused, and what else there is to say."""

    stored: list[str]
    refused: list[str]
    captions: list[str]
    notices: list[Problem]


class Curation:
    """Changes datasets. Raises Unprocessable for what cannot be taken, RedisUnavailable and StorageUnavailable."""

    def __init__(self, store: DatasetStore, storage: Storage) -> None:
        self._store, self._storage = store, storage
        self._turn = asyncio.Semaphore(AT_ONCE)

    async def create(self, head: DatasetHead, form: Form, captions: Mapping[str, str]) -> tuple[Dataset, Taken]:
        """A new dataset with its first files. When that fails nothing of it is left."""
        await self._store.create(head)
        try:
            return await self.add(Dataset(**head.model_dump(), updated_ms=head.created_ms), form, captions)
        except BaseException:  # boundary: also a cancelled request leaves nothing behind
            await asyncio.shield(self.delete(head))
            raise

    async def add(self, dataset: Dataset, form: Form, captions: Mapping[str, str]) -> tuple[Dataset, Taken]:
        """Add files, or replace those of the same names, all in one step at the end."""
        arrivals = await asyncio.to_thread(_sort, form, captions, [file.name for file in dataset.files])
        files = await self._store_all(dataset, arrivals)
        change = Change(files, arrivals.captions)
        try:
            unused = await self._store.commit(dataset.id, change)
        except FluxgateError:
            await self._drop(dataset.id, [file.key for file in files.values() if file.key])
            raise
        await self._drop(dataset.id, unused)
        current = await self._store.load(dataset.id)
        if current is None:
            raise absent(dataset.id)
        stored, refused = ([name for name, file in files.items() if (file.key is not None) is taken] for taken in (True, False))
        return current, Taken(stored, refused, sorted(arrivals.captions), arrivals.notices)

    async def _store_all(self, dataset: Dataset, arrivals: Sorted) -> dict[str, DatasetFile]:
        """Every file of an upload, or none: after the first that fails no other is begun, and what was stored is dropped."""
        waiting: Iterator[tuple[str, Source]] = iter(arrivals.media.items())
        found: dict[str, DatasetFile] = {}
        faults: list[FluxgateError] = []

        async def work() -> None:
            while not faults and (following := next(waiting, None)) is not None:
                try:
                    async with self._turn:
                        found[following[0]] = await self._store_one(dataset, *following)
                except FluxgateError as fault:
                    faults.append(fault)

        # Not a TaskGroup: it would cancel the other worker, whose object S3 may have taken all the same.
        await asyncio.gather(*(work() for _ in range(AT_ONCE)))
        if faults:
            await self._drop(dataset.id, [file.key for file in found.values() if file.key])
            raise faults[0]
        for name in [name for name, file in found.items() if _is_bystander(file)]:
            del found[name]
            remedy = "Nothing need be done; pictures, captions and nothing else belong into a dataset."
            arrivals.notices.append(warning("file_skipped", (name,), f"{name} is no picture; it was left out.", remedy))
        return {name: found[name] for name in arrivals.media if name in found}

    async def _store_one(self, dataset: Dataset, name: str, source: Source) -> DatasetFile:
        try:
            media = await asyncio.to_thread(_examine, name, source, dataset.asset)
        except Refused as refused:
            return DatasetFile(name=name, size_bytes=source.size_bytes, problems=(refused.problem,))
        # Equal pictures under two names are two objects: so each goes with its own name, whatever happens at the same time.
        key = f"datasets/{dataset.id}/{media.sha256[:32]}-{secrets.token_hex(4)}.{'jpg' if media.kind == 'jpeg' else media.kind}"
        await self._store.note_key(dataset.id, key)
        await self._storage.put(key, media.body, CONTENT_TYPES[media.kind])
        return DatasetFile(
            name=name,
            key=key,
            content_type=CONTENT_TYPES[media.kind],
            sha256=media.sha256,
            size_bytes=len(media.body),
            width=media.width,
            height=media.height,
            phash=media.phash,
            frames=media.frames,
            duration_s=media.duration_s,
            problems=media.problems,
        )

    async def remove(self, dataset: Dataset, name: str) -> bool:
        """Take a file out, with its caption; False when it is not there."""
        file = await self._store.remove(dataset.id, name)
        if file is not None and file.key is not None:
            await self._drop(dataset.id, [file.key])
        return file is not None

    async def delete(self, head: DatasetHead) -> None:
        """Forget a dataset, then its objects: also those of uploads that never came to their end."""
        await self._drop(head.id, await self._store.delete(head))

    async def _drop(self, dataset_id: str, keys: list[str]) -> None:
        if keys:
            await self._storage.delete(keys)
            await self._store.forget_keys(dataset_id, keys)


def _sort(form: Form, captions: Mapping[str, str], present: list[str]) -> Sorted:
    return sort_arrivals(list_sources(form), captions, present)


def list_sources(form: Form) -> list[Source]:
    """The files of a form, or of the one zip in it."""
    parts = [part for part in form.files if part.size_bytes or part.filename]
    if any(is_zip(form, part) for part in parts):
        if len(parts) > 1:
            hint = "Send the zip alone, and more with PUT."
            raise Unprocessable(
                "A zip came together with other files.", code="archive_not_alone", hint=hint, details={"parameter": "files"}
            )
        archive = Archive(form.open(parts[0]))
        return [Source(entry.path, entry.size_bytes, partial(archive.read, entry)) for entry in archive.entries]
    return [Source(part.filename, part.size_bytes, partial(_read, form, part)) for part in parts]


def _read(form: Form, part: Part) -> bytes:
    return form.open(part).read()


def is_zip(form: Form, part: Part) -> bool:
    return form.open(part).read(4) in (_ZIP_SIGNATURE, _EMPTY_ZIP_SIGNATURE) or extension_of(part.filename) == "zip"


def _examine(name: str, source: Source, asset: Asset) -> Media:
    """Raises Refused. Size first: nothing larger than is allowed is ever read."""
    most = MAX_PICTURE_BYTES if asset == "image" else MAX_VIDEO_BYTES
    if source.size_bytes > most:
        message = f"{name} has {source.size_bytes} bytes; at most {most} are allowed."
        raise Refused("file_too_large", name, message, "Scale it down, or save it as JPEG." if asset == "image" else "Cut it shorter.")
    if source.size_bytes == 0:
        raise Refused("file_empty", name, f"{name} is empty.", "Send it again.")
    body = source.read()
    if body.startswith(_ZIP_SIGNATURE):
        raise Refused("archive_nested", name, f"{name} is a zip inside of a zip.", "Unpack it, and send what is in it with PUT.")
    return read_picture(body, name) if asset == "image" else read_video(body, name)


def _is_bystander(file: DatasetFile) -> bool:
    """Whether it is something else that lay beside the pictures, not a picture that went wrong."""
    codes = {problem.code for problem in file.problems}
    return file.key is None and bool(codes & {"not_a_picture", "video_unsupported"}) and extension_of(file.name) not in MEDIA_EXTENSIONS
