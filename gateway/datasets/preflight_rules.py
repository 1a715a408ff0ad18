"""What can be wrong with a dataset as a whole: each rule looks at it under the settings of a training and names what it finds.

The quoted words are SimpleTuner's own (version 3.1.6). An error blocks, a warning explains.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pydantic import BaseModel

from gateway.datasets.buckets import ALIGNMENT_PX, SQUARES_BELOW_PX, Shape, align, count_steps, form_buckets
from gateway.datasets.likeness import find_likenesses
from gateway.datasets.records import DEFAULT_TEMPLATE, DEFAULT_VIDEO_FRAMES, Asset, DatasetFile, Problem, error, fill_caption, warning

FEW_FILES = 5
# A shape beyond this is rare in what base models were trained on.
EXTREME_ASPECT = 2.5
MANY_EPOCHS = 400
# Flux reads 16x16 pixels as one token.
TOKEN_PX = 16


class Plan(BaseModel):
    """The settings of a training that a dataset must fit. `repeats` counts further looks at a file in an epoch: 0 is one look."""

    resolution: int = 1024
    batch_size: int = 1
    repeats: int = 0
    steps: int | None = None
    trigger_word: str | None = None
    caption_template: str = DEFAULT_TEMPLATE
    video_frames: int = DEFAULT_VIDEO_FRAMES


@dataclass(frozen=True, slots=True)
class View:
    """A dataset under a plan: what the rules look at."""

    plan: Plan
    asset: Asset
    files: Sequence[DatasetFile]
    usable: list[DatasetFile]
    captions: dict[str, str | None]  # as a training would use them
    buckets: dict[Shape, list[DatasetFile]]
    likenesses: list[list[str]]
    steps_per_epoch: int

    @property
    def uncaptioned(self) -> list[str]:
        return [name for name, caption in self.captions.items() if not caption]

    @property
    def without_trigger(self) -> list[str]:
        word = self.plan.trigger_word
        return [name for name, caption in self.captions.items() if word and caption and not holds_word(caption, word)]


def look(files: Sequence[DatasetFile], plan: Plan, asset: Asset) -> View:
    """The view of these files under this plan."""
    usable = [file for file in files if file.key is not None]
    captions = {file.name: fill_caption(file.caption, plan.trigger_word, plan.caption_template) for file in usable}
    buckets = form_buckets(usable, plan.resolution) if asset == "image" else {}
    sizes = [len(inside) for inside in buckets.values()] if asset == "image" else [len(usable)]
    steps = count_steps(sizes, plan.batch_size, plan.repeats)
    return View(plan, asset, files, usable, captions, buckets, find_likenesses(usable), steps)


def holds_word(caption: str, word: str) -> bool:
    """Whether the word stands in the caption by itself, in the same letters: a text encoder tells TOK from token and tok."""
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", caption) is not None


def _list_intake(view: View) -> Iterator[Problem]:
    """What was found wrong when the files came in."""
    for file in view.files:
        yield from file.problems


def _judge_number(view: View) -> Iterator[Problem]:
    count, noun = len(view.usable), "pictures" if view.asset == "image" else "clips"
    if count == 0:
        yield error("no_files", (), f"There are no usable {noun}: nothing can be trained.", f"Add {noun}; 10 to 30 are usual for a LoRA.")
    elif count < FEW_FILES:
        message = f"{count} {noun} are few: a LoRA learns their grounds and poses along with the thing itself."
        yield warning("few_files", (), message, "Add more; 10 to 30 are usual, in varied places and light.")


def _judge_captions(view: View) -> Iterator[Problem]:
    missing = view.uncaptioned
    silent = [file.name for file in view.usable if file.caption == ""]
    if missing:
        message = f"{_say(missing)}: no caption, and there is no trigger word to make one from. SimpleTuner ends the whole run: "
        message += '"Caption file ... not found".'
        yield error(
            "caption_missing",
            missing,
            message,
            "Add a .txt of the same name for each, or a trigger_word, or let POST /v1/datasets/{id}/captions write them.",
        )
    from_template = [name for name in silent if name not in missing]
    if from_template:
        message = f"{_say(from_template)}: the caption file is empty; the trigger word in its template stands there instead."
        yield warning("caption_empty", from_template, message, "Write what the picture shows, or remove the .txt.")


def _judge_trigger(view: View) -> Iterator[Problem]:
    absent, word = view.without_trigger, view.plan.trigger_word
    if absent:
        message = f"{_say(absent)}: the caption does not hold {word!r}, so what it shows is not tied to the trigger word."
        yield warning("trigger_missing", absent, message, f"Put {word!r} into these captions, or leave them out for the template to do it.")


def _judge_buckets(view: View) -> Iterator[Problem]:
    batch, looks = view.plan.batch_size, view.plan.repeats + 1
    total = len(view.usable) * looks
    for shape, inside in view.buckets.items():
        if (samples := len(inside) * looks) < batch:
            names = [file.name for file in inside]
            whole = "zero_usable_batches" if total < batch else "bucket_smaller_than_batch"
            message = (
                f"{_say(names)}: in the bucket {shape.width}x{shape.height} (aspect {shape.aspect}) {samples} samples "
                f'cannot fill a batch of {batch}. SimpleTuner ends the whole run: "Dataset configuration will produce zero usable batches."'
            )
            remedy = f"Set repeats to at least {math.ceil(batch / len(inside)) - 1} or batch_size to at most {samples}"
            yield error(
                whole, names, message, f"{remedy}, or crop these pictures to the shape of others." if total >= batch else f"{remedy}."
            )


def _judge_clips(view: View) -> Iterator[Problem]:
    if view.asset == "image" or not view.usable:
        return
    names, samples = [file.name for file in view.usable], len(view.usable) * (view.plan.repeats + 1)
    wanted = view.plan.video_frames
    if short := [file.name for file in view.usable if file.frames is not None and file.frames < wanted]:
        fewest = min(file.frames for file in view.usable if file.frames is not None)
        message = f"{_say(short)}: fewer than the {wanted} frames that are taken of each clip; SimpleTuner leaves them out."
        yield error("clip_too_short", short, message, f"Set video_frames to at most {fewest}, or use longer clips.")
    if unknown := [file.name for file in view.usable if file.frames is None]:
        message = f"{_say(unknown)}: the file does not say how many frames it has."
        yield warning("clip_length_unknown", unknown, message, f"See to it that each has {wanted} frames or more.")
    if samples < view.plan.batch_size:
        message = f'{samples} samples cannot fill a batch of {view.plan.batch_size}. SimpleTuner says: "Dataset configuration will produce '
        yield error("zero_usable_batches", names, message + 'zero usable batches."', f"Set batch_size to at most {samples}, or add clips.")


def _judge_sizes(view: View) -> Iterator[Problem]:
    placed = {file.name: shape for shape, inside in view.buckets.items() for file in inside}
    pictures = [file for file in view.usable if file.width and file.height] if view.asset == "image" else []
    if endless := [file.name for file in pictures if file.name not in placed]:
        message = (
            f"{_say(endless)}: more than 200 times as high as wide, so that its aspect rounds to zero and SimpleTuner fails dividing by it."
        )
        yield error("aspect_zero", endless, message, "Crop to something nearer to a square.")
    small = [f.name for f in pictures if (s := placed.get(f.name)) and ((f.width or 0) < s.width or (f.height or 0) < s.height)]
    if small:
        message = f"{_say(small)}: smaller than the {view.plan.resolution} px bucket; enlarged for training, and the blur is learned too."
        yield warning("picture_enlarged", small, message, "Use larger originals, or a lower resolution.")
    long = [f.name for f in pictures if (s := placed.get(f.name)) and not 1 / EXTREME_ASPECT <= s.width / s.height <= EXTREME_ASPECT]
    if long:
        message = (
            f"{_say(long)}: more than {EXTREME_ASPECT} times as long as wide; a bucket of its own, at a shape base models hardly know."
        )
        yield warning("aspect_extreme", long, message, "Crop to something nearer to a square.")


def _judge_resolution(view: View) -> Iterator[Problem]:
    given = view.plan.resolution
    if view.asset != "image" or given % ALIGNMENT_PX == 0:
        return
    nearest = align(given)
    if given >= SQUARES_BELOW_PX:
        message = f"A resolution of {given} is no multiple of {ALIGNMENT_PX}: sizes are rounded, to {nearest} for a square."
        yield warning("resolution_unaligned", (), message, f"Say {nearest}.")
    elif given % TOKEN_PX:
        message = (
            f"A resolution of {given} is no multiple of {TOKEN_PX}, which is what Flux reads as one token; below 512 nothing rounds it."
        )
        yield error("resolution_unaligned", (), message, f"Say {nearest}.")


def _judge_likeness(view: View) -> Iterator[Problem]:
    by_content: dict[str, list[str]] = {}
    for file in view.usable:
        by_content.setdefault(file.sha256 or file.name, []).append(file.name)
    equal = [names for names in by_content.values() if len(names) > 1]
    for names in equal:
        message = f"{', '.join(names[:5])}: the same picture {len(names)} times. It counts that much more than the others."
        yield warning("duplicate_content", names, message, "Remove all but one; repeats raise the weight of all alike.")
    for names in view.likenesses:
        if not any(set(names) <= set(same) for same in equal):
            message = f"{', '.join(names[:5])}: nearly the same picture. What they share is learned by heart."
            yield warning("near_duplicates", names, message, "Keep the best one, unless the difference is what should be learned.")


def _judge_epochs(view: View) -> Iterator[Problem]:
    steps = view.plan.steps
    if not (steps and view.steps_per_epoch):
        return
    epochs = steps / view.steps_per_epoch
    if epochs < 1:
        message = f"{steps} steps end before an epoch of {view.steps_per_epoch} does: some files are never seen."
        yield warning("epoch_unfinished", (), message, f"Set steps to at least {view.steps_per_epoch}, or repeats lower.")
    elif epochs > MANY_EPOCHS:
        message = f"{steps} steps are {epochs:.0f} epochs: the same few files are likely to be learned by heart."
        yield warning("many_epochs", (), message, f"Add files, or set steps to {MANY_EPOCHS * view.steps_per_epoch} or less.")


def _say(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{len(names)} files ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"


RULES = (
    _list_intake,
    _judge_number,
    _judge_captions,
    _judge_trigger,
    _judge_buckets,
    _judge_clips,
    _judge_sizes,
    _judge_resolution,
    _judge_likeness,
    _judge_epochs,
)
