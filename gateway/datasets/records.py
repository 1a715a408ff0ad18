"""What a dataset is: its record, its files, and what can be wrong with them. Pure; it knows neither Redis nor how a picture is read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict

Asset = Literal["image", "video"]

TRIGGER_SLOT = "{trigger}"
DEFAULT_TEMPLATE = TRIGGER_SLOT
DEFAULT_VIDEO_FRAMES = 49  # taken of each clip
# One request, and one dataset. Training on more is another kind of work.
MAX_FILES = 1000


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class Problem(_Part):
    """One thing wrong. An `error` keeps a training from starting, a `warning` explains what it would do."""

    code: str
    severity: Literal["error", "warning"]
    files: tuple[str, ...] = ()
    message: str
    remedy: str


class Caption(_Part):
    """What a picture shows, in one line. Empty `text` is a caption file with nothing in it."""

    text: str
    problems: tuple[Problem, ...] = ()


class DatasetFile(_Part):
    """One picture or clip. `key` is None for one that was refused: it stays named until it is replaced or removed.

    `phash` is what near-duplicates are found by; `caption` is the caller's own, None where none was given.
    """

    name: str
    key: str | None = None
    content_type: str | None = None
    sha256: str | None = None
    size_bytes: int = 0
    width: int | None = None
    height: int | None = None
    frames: int | None = None
    duration_s: float | None = None
    phash: str | None = None
    caption: str | None = None
    problems: tuple[Problem, ...] = ()


class DatasetHead(_Part):
    """What is said once about a dataset, when it is made."""

    id: str
    caller: str
    name: str
    asset: Asset = "image"
    trigger_word: str | None = None
    caption_template: str = DEFAULT_TEMPLATE
    created_ms: int


class Dataset(DatasetHead):
    """The record with its files, by name."""

    updated_ms: int
    files: tuple[DatasetFile, ...] = ()

    def caption_of(self, file: DatasetFile) -> str | None:
        """The caption a training uses: the file's own, else the trigger word in its template, else None."""
        return fill_caption(file.caption, self.trigger_word, self.caption_template)


def fill_caption(caption: str | None, trigger_word: str | None, template: str) -> str | None:
    """A file's own caption where it has words, else the template with the trigger word, else None."""
    if caption:
        return caption
    return template.replace(TRIGGER_SLOT, trigger_word) if trigger_word else None


def error(code: str, files: Sequence[str], message: str, remedy: str) -> Problem:
    """A problem that keeps a training from starting."""
    return Problem(code=code, severity="error", files=tuple(files), message=message, remedy=remedy)


def warning(code: str, files: Sequence[str], message: str, remedy: str) -> Problem:
    """A problem that a training survives."""
    return Problem(code=code, severity="warning", files=tuple(files), message=message, remedy=remedy)
