"""A multipart body into one temporary file, part after part, however many parts there are. It knows no dataset.

One descriptor a request, where a spooled file for each part would take hundreds; and pieces of it can be read from several threads.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import AsyncIterator, Collection
from dataclasses import dataclass, field
from typing import BinaryIO, cast

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect

from gateway.errors import BadRequest, PayloadTooLarge, UnsupportedMediaType

MAX_HEADER_BYTES = 16 << 10
BUFFER_BYTES = 1 << 20


class Slice:
    """A piece of a file, read as a file of its own. Readers share nothing but the descriptor."""

    def __init__(self, descriptor: int, start: int, size_bytes: int) -> None:
        self._descriptor, self._start, self.size_bytes = descriptor, start, size_bytes
        self._position = 0

    def read(self, size: int = -1) -> bytes:
        left = max(self.size_bytes - self._position, 0)
        count = left if size is None or size < 0 else min(size, left)
        body = os.pread(self._descriptor, count, self._start + self._position)
        self._position += len(body)
        return body

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.size_bytes}[whence]
        if base + offset < 0:
            raise OSError("seek before the beginning")
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def close(self) -> None:
        """Nothing: the descriptor is the form's. Who sends a file to S3 closes it."""


@dataclass(slots=True)
class Part:
    """A file of the form. `filename` is what the client says, `field` what it came as."""

    filename: str
    start: int
    size_bytes: int = 0
    field: str = "files"


@dataclass(slots=True)
class Form:
    """A body that has been read. Close it when its files are done with."""

    spool: BinaryIO
    fields: dict[str, str] = field(default_factory=dict)
    lists: dict[str, list[str]] = field(default_factory=dict)  # fields that may come several times
    files: list[Part] = field(default_factory=list)

    def open(self, part: Part) -> Slice:
        return Slice(self.spool.fileno(), part.start, part.size_bytes)

    def close(self) -> None:
        self.spool.close()


class _Reader:
    """The parser's callbacks: header lines, then data that goes to a field or behind the spool's end."""

    def __init__(self, form: Form, max_files: int, max_field_bytes: int, file_fields: Collection[str], lists: Collection[str]) -> None:
        self._file_fields, self._lists = file_fields, lists
        self.form, self._max_files, self._max_field_bytes = form, max_files, max_field_bytes
        self.buffer = bytearray()
        self._written = 0
        self._header_name, self._header_value, self._header_bytes = bytearray(), bytearray(), 0
        self._disposition = b""
        self._part: Part | None = None
        self._field: tuple[str, bytearray] = ("", bytearray())

    def on_part_begin(self) -> None:
        self._disposition, self._header_bytes = b"", 0

    def on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header_name += self._count(data[start:end])

    def on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += self._count(data[start:end])

    def _count(self, piece: bytes) -> bytes:
        self._header_bytes += len(piece)
        if self._header_bytes > MAX_HEADER_BYTES:
            raise BadRequest(f"A part's headers have more than {MAX_HEADER_BYTES} bytes.", code="invalid_multipart")
        return piece

    def on_header_end(self) -> None:
        if self._header_name.lower() == b"content-disposition":
            self._disposition = bytes(self._header_value)
        self._header_name.clear()
        self._header_value.clear()

    def on_headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition)
        name = _decode(options.get(b"name", b""))
        if not name:
            raise BadRequest("A part has no name.", code="invalid_multipart", hint='Send Content-Disposition: form-data; name="files".')
        if b"filename" not in options:
            if name in self.form.fields and name not in self._lists:
                raise BadRequest(f"The field {name!r} is there twice.", code="invalid_multipart", details={"parameter": name[:100]})
            self._part, self._field = None, (name, bytearray())
            return
        if name not in self._file_fields:
            details = {"parameter": name[:100], "value": "a file", "allowed": ", ".join(self._file_fields)}
            raise BadRequest(f"The field {name[:100]!r} takes no file.", code="invalid_multipart", details=details)
        if len(self.form.files) >= self._max_files:
            hint = "Send the rest with PUT, or as a zip."
            raise PayloadTooLarge(f"More than {self._max_files} files came at once.", hint=hint, details={"allowed": self._max_files})
        self._part = Part(_decode(options[b"filename"]), self._written + len(self.buffer), field=name)

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._part is not None:
            self.buffer += data[start:end]
            self._part.size_bytes += end - start
            return
        name, value = self._field
        value += data[start:end]
        if len(value) > self._max_field_bytes:
            raise PayloadTooLarge(
                f"The field {name[:100]!r} is larger than {self._max_field_bytes} bytes.", details={"parameter": name[:100]}
            )

    def on_part_end(self) -> None:
        if self._part is not None:
            self.form.files.append(self._part)
        else:
            name, value = self._field
            text = self.form.fields[name] = _decode(bytes(value))
            if name in self._lists:
                self.form.lists.setdefault(name, []).append(text)

    async def flush(self, at_least: int) -> None:
        """Write what has gathered, off the event loop, once it is worth a thread."""
        if len(self.buffer) >= at_least:
            piece, self.buffer = self.buffer, bytearray()
            self._written += len(piece)
            await asyncio.to_thread(self.form.spool.write, piece)


def _decode(raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw.decode("latin-1")


async def read_form(
    content_type: str,
    chunks: AsyncIterator[bytes],
    *,
    max_files: int,
    max_field_bytes: int,
    file_fields: Collection[str] = ("files", "file"),
    lists: Collection[str] = (),
) -> Form:
    """The whole body; `lists` are fields that may come several times.

    Raises UnsupportedMediaType for another type, BadRequest for a broken one, PayloadTooLarge for too many parts.
    """
    kind, options = parse_options_header(content_type.encode("latin-1"))
    boundary = options.get(b"boundary", b"")
    if kind != b"multipart/form-data" or not boundary:
        hint = "Send multipart/form-data: pictures, captions or one zip as `files`."
        raise UnsupportedMediaType("The body is not declared as multipart/form-data.", hint=hint)
    # Unbuffered: readers go by the descriptor.
    spool = cast(BinaryIO, tempfile.TemporaryFile(buffering=0))  # noqa: SIM115  closed by the form
    form = Form(spool)
    try:
        await _feed(_Reader(form, max_files, max_field_bytes, file_fields, lists), boundary, chunks)
    except BaseException:  # boundary: whatever ends the reading, the file goes with it
        form.close()
        raise
    return form


async def _feed(reader: _Reader, boundary: bytes, chunks: AsyncIterator[bytes]) -> None:
    names = ("part_begin", "header_field", "header_value", "header_end", "headers_finished", "part_data", "part_end")
    is_ended = False

    def on_end() -> None:
        nonlocal is_ended
        is_ended = True

    try:
        parser = MultipartParser(boundary, {**{f"on_{name}": getattr(reader, f"on_{name}") for name in names}, "on_end": on_end})  # type: ignore[arg-type]
        async for chunk in chunks:
            parser.write(chunk)
            await reader.flush(BUFFER_BYTES)
        parser.finalize()
    except ClientDisconnect as fault:
        raise BadRequest("The upload was broken off.", code="upload_broken_off") from fault
    except FormParserError as fault:
        raise BadRequest(f"The multipart body cannot be read: {fault}", code="invalid_multipart") from fault
    if not is_ended:
        raise BadRequest("The multipart body ends before its last boundary.", code="invalid_multipart")
    await reader.flush(1)
