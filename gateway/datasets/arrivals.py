"""What came in one upload, sorted out by name: which are pictures, what each is called from now on, and which caption is whose.

It refuses to know what the files hold, and writes nothing.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from gateway.datasets.intake import Refused, clean_caption, read_caption, require_short
from gateway.datasets.records import Caption, Problem, warning

MAX_NAME_LENGTH = 200
# What asks to be looked at as a picture or clip; a file of another name is passed over when it is none.
PICTURE_EXTENSIONS = ("png", "jpg", "jpeg", "jpe", "jfif", "webp", "gif", "bmp", "tif", "tiff", "heic", "heif", "avif", "jxl", "psd", "dng")
MEDIA_EXTENSIONS = frozenset((*PICTURE_EXTENSIONS, "svg", "mp4", "m4v", "webm", "mov", "mkv", "avi"))


@dataclass(frozen=True, slots=True)
class Source:
    """A file that came. `path` is what the client calls it, folders included."""

    path: str
    size_bytes: int
    read: Callable[[], bytes]


@dataclass(slots=True)
class Sorted:
    """`media` by the name each gets; `captions` by the name of their picture; `notices` on all that was renamed or left out."""

    media: dict[str, Source] = field(default_factory=dict)
    captions: dict[str, Caption] = field(default_factory=dict)
    notices: list[Problem] = field(default_factory=list)


def sort_arrivals(sources: Sequence[Source], given: Mapping[str, str], present: Iterable[str]) -> Sorted:
    """Sort an upload. `given` is the captions map of the request, `present` the names the dataset has already.

    A caption belongs to the picture of the same path, else of the same name in any folder. The map goes before caption files.
    """
    result = Sorted()
    texts = [source for source in sources if extension_of(source.path) == "txt"]
    paths = {}
    for source in sources:
        if extension_of(source.path) != "txt":
            name = _name(source, result)
            result.media[name] = source
            paths[name] = split_path(source.path)
    known = {**{name: name for name in present}, **paths}
    for source in texts:
        _take_text(source, known, result)
    for key, text in given.items():
        names = _owners(split_path(key), known, is_whole=True) or _owners(split_path(key), known, is_whole=False)
        for name in names:
            result.captions[name] = clean_caption(text, name)
        if not names:
            result.notices.append(_ownerless(key))
    return result


def split_path(path: str) -> str:
    """A client's path with `/` between its parts and nothing that leads anywhere else."""
    parts = unicodedata.normalize("NFC", path.replace("\\", "/")).split("/")
    return "/".join(part for part in parts if part not in ("", ".", "..")) or "file"


def clean_name(path: str) -> str:
    """The last part of a path as a name of at most MAX_NAME_LENGTH printable characters; its extension is kept."""
    last = "".join(letter for letter in split_path(path).rpartition("/")[2] if letter.isprintable() and not "\ud800" <= letter <= "\udfff")
    last = last.strip(" .")
    stem, dot, extension = last.rpartition(".")
    if not dot or len(extension) > 10:
        return last[:MAX_NAME_LENGTH].strip(" .") or "file"
    return f"{stem[: MAX_NAME_LENGTH - len(extension) - 1]}.{extension}"


def extension_of(path: str) -> str:
    return path.rpartition("/")[2].rpartition(".")[2].lower() if "." in path else ""


def stem_of(path: str) -> str:
    folder, slash, name = path.rpartition("/")
    return f"{folder}{slash}{name.rpartition('.')[0] or name}"


def _name(source: Source, result: Sorted) -> str:
    """A name that no other of this upload has."""
    name = wanted = clean_name(source.path)
    stem, _, extension = wanted.rpartition(".")
    number = 2
    while name in result.media:
        name, number = f"{stem or extension} ({number}){'.' + extension if stem else ''}", number + 1
    if name != wanted:
        message = f"{split_path(source.path)} is called {name} here: another file of this upload is {wanted} already."
        result.notices.append(warning("name_clash", (name,), message, "Give the files of all folders different names if that matters."))
    return name


def _owners(path: str, known: Mapping[str, str], *, is_whole: bool) -> list[str]:
    """Names of the pictures a caption under this path belongs to. `is_whole`: the path is the picture's own, extension and all."""
    if is_whole:
        return [name for name, place in known.items() if place == path] or [name for name in known if name == path]
    near = [name for name, place in known.items() if stem_of(place) == stem_of(path) or place == stem_of(path)]
    return near or [name for name in known if stem_of(name) == stem_of(path.rpartition("/")[2])]


def _take_text(source: Source, known: Mapping[str, str], result: Sorted) -> None:
    path = split_path(source.path)
    try:
        require_short(source.size_bytes, path)
        caption = read_caption(source.read(), path)
    except Refused as refused:
        # Said with the picture, whose caption is missing; so it blocks until it is mended.
        caption = Caption(text="", problems=(refused.problem,))
    names = _owners(path, known, is_whole=False)
    for name in names:
        result.captions[name] = caption
    if not names:
        result.notices.append(_ownerless(path))


def _ownerless(path: str) -> Problem:
    remedy = "Name the caption like its picture: a.png and a.txt."
    return warning(
        "caption_without_picture", (path[:MAX_NAME_LENGTH],), f"{path[:MAX_NAME_LENGTH]} belongs to no picture; it was left out.", remedy
    )
