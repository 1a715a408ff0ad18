"""Which file a request means, and how files are reserved, written and removed. Knows no ComfyUI."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PART_SUFFIX = ".part"
FindFolder = Callable[[str], Path | None]


class FileRefused(ValueError):
    """The name is malformed or leaves its folder."""


@dataclass(frozen=True)
class FileName:
    """A file as ComfyUI's history names it."""

    filename: str
    subfolder: str = ""
    type: str = "output"


def parse_file_name(item: Any) -> FileName:
    """From `{filename, subfolder?, type?}`. Raises FileRefused."""
    if not isinstance(item, dict):
        raise FileRefused(f"a file is an object with filename, subfolder and type, not {item!r}")
    name = FileName(item.get("filename", ""), item.get("subfolder", ""), item.get("type", "output"))
    for field, value in vars(name).items():
        if not isinstance(value, str):
            raise FileRefused(f"{field} is text, not {value!r}")
    return name


def resolve_file(name: FileName, find_folder: FindFolder) -> Path:
    """The path inside the folder of that type, links resolved; the file need not exist. Raises FileRefused."""
    folder = find_folder(name.type)
    if folder is None:
        raise FileRefused(f"type is output, temp or input, not {name.type!r}")
    if name.filename in ("", ".", "..") or any(sign in name.filename for sign in "/\\\0") or "\0" in name.subfolder:
        raise FileRefused(f"filename is a bare name, not {name.filename!r}")
    root = Path(os.path.realpath(folder))
    path = Path(os.path.realpath(root / name.subfolder / name.filename))
    if not path.is_relative_to(root) or path == root:
        raise FileRefused(f"{name.subfolder!r}/{name.filename!r} lies outside the {name.type} folder")
    return path


def resolve_entry(name: FileName, find_folder: FindFolder) -> Path:
    """As resolve_file, but the last part is not followed: what is removed is the link, never its target."""
    target = resolve_file(name, find_folder)
    folder = find_folder(name.type)
    if folder is None:
        return target
    entry = Path(os.path.realpath(folder / name.subfolder)) / name.filename
    if not entry.is_relative_to(os.path.realpath(folder)):
        raise FileRefused(f"{name.subfolder!r} lies outside the {name.type} folder")
    return entry


def reserve_number(folder: Path, stem: str, first: int, extension: str) -> tuple[int, Path]:
    """Creates `<stem>_<number>_.<extension>.part`, empty, with the first free number from `first`, and returns number and final path.
    ComfyUI counts the numbers it finds on disk by how names begin, so the part keeps the number for us and for SaveImage too."""
    for number in count_from(first):
        final = folder / f"{stem}_{number:05}_.{extension}"
        try:
            os.close(os.open(name_part(final), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        except FileExistsError:
            continue
        if not final.exists():
            return number, final
        name_part(final).unlink()
    raise AssertionError("unreachable: the numbers do not end")


def count_from(first: int) -> Iterator[int]:
    while True:
        yield first
        first += 1


def name_part(final: Path) -> Path:
    return final.with_name(final.name + PART_SUFFIX)


def write_reserved(final: Path, encode: Callable[[], bytes | memoryview]) -> None:
    """Fills the part and renames it, so that nobody ever reads half a picture. The part is gone afterwards, whatever happened."""
    part = name_part(final)
    try:
        part.write_bytes(encode())
        os.replace(part, final)
    finally:
        part.unlink(missing_ok=True)


def remove_entry(path: Path, *, empty_folder_of: Path | None = None) -> bool:
    """True when it was there. With `empty_folder_of` the file's own folder goes too once it is empty, but never that root."""
    try:
        path.unlink()
    except FileNotFoundError:
        return False
    if empty_folder_of is not None and path.parent != empty_folder_of and not any(path.parent.iterdir()):
        path.parent.rmdir()
    return True
