"""What a training would make of a dataset, said before it starts: buckets, steps, and all that would fail or disappoint.

Pure arithmetic over records: it opens no picture. An error blocks, a warning explains.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel

from gateway.datasets.preflight_rules import RULES, Plan, View, look
from gateway.datasets.records import DEFAULT_TEMPLATE, Asset, DatasetFile, Problem


class Bucket(BaseModel):
    """Pictures that are trained together at one size. `aspect`, width over height, is what SimpleTuner calls it."""

    aspect: float
    width: int
    height: int
    count: int


class Counts(BaseModel):
    files: int
    usable: int
    refused: int
    captions_own: int
    captions_from_template: int
    captions_missing: int


class Sizes(BaseModel):
    """Bytes of all, and width and height of the pictures with the fewest and the most pixels."""

    total_bytes: int
    smallest: tuple[int, int] | None
    largest: tuple[int, int] | None


class Report(BaseModel):
    """`ok` when no error stands. `trigger_coverage` is the share of captions that hold the trigger word, None without one."""

    ok: bool
    errors: list[Problem]
    warnings: list[Problem]
    counts: Counts
    sizes: Sizes
    buckets: list[Bucket]
    steps_per_epoch: int
    epochs: float | None
    near_duplicates: list[list[str]]
    trigger_coverage: float | None
    plan: Plan


def inspect(
    files: Sequence[DatasetFile],
    *,
    resolution: int = 1024,
    batch_size: int = 1,
    repeats: int = 0,
    steps: int | None = None,
    trigger_word: str | None = None,
    caption_template: str = DEFAULT_TEMPLATE,
    video_frames: int = 49,
    asset: Asset = "image",
) -> Report:
    """The report on these files under these settings."""
    return report(
        files,
        Plan(
            resolution=resolution,
            batch_size=batch_size,
            repeats=repeats,
            steps=steps,
            trigger_word=trigger_word,
            caption_template=caption_template,
            video_frames=video_frames,
        ),
        asset,
    )


def report(files: Sequence[DatasetFile], plan: Plan, asset: Asset = "image") -> Report:
    """`inspect`, with the settings in one piece."""
    view = look(files, plan, asset)
    problems = [problem for rule in RULES for problem in rule(view)]
    errors = [problem for problem in problems if problem.severity == "error"]
    held = [caption for caption in view.captions.values() if caption]
    return Report(
        ok=not errors,
        errors=errors,
        warnings=[problem for problem in problems if problem.severity == "warning"],
        counts=_count(view),
        sizes=_measure(view.usable),
        buckets=[Bucket(**shape._asdict(), count=len(inside)) for shape, inside in view.buckets.items()],
        steps_per_epoch=view.steps_per_epoch,
        epochs=round(plan.steps / view.steps_per_epoch, 2) if plan.steps and view.steps_per_epoch else None,
        near_duplicates=view.likenesses,
        trigger_coverage=round(1 - len(view.without_trigger) / len(held), 3) if held and plan.trigger_word else None,
        plan=plan,
    )


def _count(view: View) -> Counts:
    own = sum(bool(file.caption) for file in view.usable)
    missing = len(view.uncaptioned)
    return Counts(
        files=len(view.files),
        usable=len(view.usable),
        refused=len(view.files) - len(view.usable),
        captions_own=own,
        captions_from_template=len(view.usable) - own - missing,
        captions_missing=missing,
    )


def _measure(usable: list[DatasetFile]) -> Sizes:
    sizes = sorted(((file.width, file.height) for file in usable if file.width and file.height), key=lambda size: (size[0] * size[1], size))
    return Sizes(
        total_bytes=sum(file.size_bytes for file in usable),
        smallest=sizes[0] if sizes else None,
        largest=sizes[-1] if sizes else None,
    )
