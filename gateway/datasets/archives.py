"""Zip files from strangers: what may be taken out of one, entry by entry, or the refusal of the whole.

Nothing is ever written under a name that stands in an archive. It knows names, sizes and flags; what an entry holds is others' business.
"""

from __future__ import annotations

import stat
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from gateway.errors import Unprocessable

MAX_ENTRIES = 4000  # a picture and a caption each, folders, and what systems add
MAX_UNPACKED_BYTES = 1 << 30
# Pictures and clips are compressed already: 1.0 to 1.1. Deflate itself ends at 1032.
MAX_RATIO = 100
RATIO_FREE_BYTES = 1 << 20
# A real one has about 100 bytes an entry; its whole length is read into memory.
MAX_DIRECTORY_BYTES = 2 << 20
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
JUNK_FOLDERS = {"__MACOSX", ".git", ".ipynb_checkpoints", "@eaDir"}
JUNK_NAMES = {".ds_store", "thumbs.db", "desktop.ini"}
_ENCRYPTED = 0x1


@dataclass(frozen=True, slots=True)
class Entry:
    """A file in an archive. `path` is as it stands there, with `/` between folders; it has been checked."""

    path: str
    size_bytes: int
    info: zipfile.ZipInfo


class Seekable(Protocol):
    """As much of a file as reading an archive takes."""

    def read(self, size: int = ..., /) -> bytes: ...
    def seek(self, offset: int, whence: int = ..., /) -> int: ...
    def tell(self) -> int: ...


class _Guarded:
    """A file that refuses one read of more than a directory's worth, for as long as the directory is read."""

    def __init__(self, file: Seekable) -> None:
        self._file = file
        self.limit: int | None = MAX_DIRECTORY_BYTES

    def read(self, size: int = -1) -> bytes:
        if self.limit is None:
            return self._file.read(size)
        body = self._file.read(size if 0 <= size <= self.limit else self.limit + 1)
        if len(body) > self.limit:
            raise refuse("archive_too_many", "Its list of entries is too long.", f"Send at most {MAX_ENTRIES} entries at once.")
        return body

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def seekable(self) -> bool:
        return True


def refuse(code: str, message: str, remedy: str, path: str | None = None) -> Unprocessable:
    """The refusal of a whole archive: what cheats in one place is not trusted in another."""
    details = {"parameter": "files", "value": (path or "the archive").encode("utf-8", "backslashreplace").decode()[:200], "allowed": remedy}
    return Unprocessable(f"The zip cannot be taken: {message}", code=code, hint=remedy, details=details)


class Archive:
    """An opened zip. Raises Unprocessable for one that is broken or hostile; reads may be made from several threads."""

    def __init__(self, file: Seekable) -> None:
        guarded = _Guarded(file)
        try:
            self._zip = zipfile.ZipFile(guarded)
        except (zipfile.BadZipFile, RuntimeError, ValueError, OSError, EOFError) as fault:
            raise refuse("archive_broken", str(fault) or type(fault).__name__, "Make the zip again.") from fault
        guarded.limit = None
        self.entries = list(_check_entries(self._zip.infolist()))

    def read(self, entry: Entry) -> bytes:
        """An entry's bytes. What it says of its size has been checked, and more than that is never read."""
        try:
            with self._zip.open(entry.info) as file:
                body = file.read(entry.size_bytes + 1)
        except (zipfile.BadZipFile, RuntimeError, OSError, EOFError, ValueError, zlib.error) as fault:
            raise refuse("archive_broken", f"{entry.path}: {fault}", "Make the zip again.", entry.path) from fault
        if len(body) != entry.size_bytes:
            raise refuse("archive_broken", f"{entry.path} has not the size it says.", "Make the zip again.", entry.path)
        return body


def _check_entries(infos: list[zipfile.ZipInfo]) -> Iterator[Entry]:
    if len(infos) > MAX_ENTRIES:
        raise refuse("archive_too_many", f"It has {len(infos)} entries.", f"Send at most {MAX_ENTRIES} entries at once.")
    total, seen = 0, set[str]()
    for info in infos:
        path = check_path(info.orig_filename)
        _check_kind(info, path)
        if info.is_dir() or is_junk(path):
            continue
        if path in seen:
            raise refuse("archive_ambiguous", f"{path} is in it twice.", "Make the zip again.", path)
        seen.add(path)
        total += info.file_size
        if total > MAX_UNPACKED_BYTES:
            remedy = f"Send at most {MAX_UNPACKED_BYTES >> 20} MiB at once, and more with PUT."
            raise refuse("archive_too_large", "Unpacked it is too large.", remedy, path)
        _check_ratio(info, path)
        yield Entry(path, info.file_size, info)


def check_path(path: str) -> str:
    """The path, if it leads to a place below the archive's own folder on every system. Raises Unprocessable."""
    parts = path.removesuffix("/").split("/")
    is_strange = (
        not path.isprintable()
        or "\\" in path
        or ":" in path
        or any(part in ("", ".", "..") or part != part.strip() for part in parts)
        or any("\ud800" <= letter <= "\udfff" for letter in path)
    )
    if is_strange or len(path) > 1024:
        remedy = "Zip a plain folder of pictures: relative names, no '..', backslash, colon, blank edge or control character."
        raise refuse("archive_path", f"the name {ascii(path)[:200]} could lead out of its folder or means another elsewhere.", remedy, path)
    return path


def _check_kind(info: zipfile.ZipInfo, path: str) -> None:
    mode = info.external_attr >> 16
    if stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise refuse("archive_link", f"{path} is a link or a device.", "Put the file itself into the zip.", path)
    if info.flag_bits & _ENCRYPTED:
        raise refuse("archive_encrypted", f"{path} is encrypted.", "Make the zip without a password.", path)
    if info.compress_type not in METHODS:
        raise refuse("archive_method", f"{path} is packed in an unusual way.", "Make a plain zip (deflate).", path)


def _check_ratio(info: zipfile.ZipInfo, path: str) -> None:
    if info.file_size > RATIO_FREE_BYTES and info.file_size > MAX_RATIO * max(info.compress_size, 1):
        remedy = "Send the pictures themselves; a picture never shrinks that much."
        raise refuse("archive_bomb", f"{path} would grow more than {MAX_RATIO} times.", remedy, path)


def is_junk(path: str) -> bool:
    """What systems add to a folder by themselves. It is passed over in silence."""
    *folders, name = path.split("/")
    return bool(JUNK_FOLDERS & set(folders)) or name.startswith("._") or name.lower() in JUNK_NAMES
