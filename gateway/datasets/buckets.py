"""Which pictures SimpleTuner trains together, at what size, and how many steps an epoch of them has.

The rules are those of its version 3.1.6 under the configuration this project gives it: `resolution_type: pixel_area`, no cropping,
sizes aligned to 64, one GPU, no gradient accumulation; below 512, centre-cropped squares.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from gateway.datasets.records import DatasetFile

ALIGNMENT_PX = 64
# Below this the trainer is told to crop squares: SimpleTuner refuses a smaller stated size of the other kind.
SQUARES_BELOW_PX = 512
# Megapixels that SimpleTuner takes for a familiar square, within 0.05.
FAMILIAR_SQUARES = {0.25: 512, 0.5: 768, 1.0: 1024, 2.0: 1536, 4.0: 2048}


class Shape(NamedTuple):
    """A bucket's aspect (width over height, two digits, which is its name there) and size in pixels."""

    aspect: float
    width: int
    height: int


def align(pixels: float) -> int:
    return max(round(pixels / ALIGNMENT_PX) * ALIGNMENT_PX, ALIGNMENT_PX)


def choose_shape(width: int, height: int, resolution: int) -> Shape | None:
    """The bucket a picture falls into; None for one so narrow that its aspect rounds to zero, by which SimpleTuner divides."""
    if resolution < SQUARES_BELOW_PX:
        return Shape(1.0, resolution, resolution)
    aspect = round(width / height, 2)
    if aspect == 0:
        return None
    edge = align(resolution)
    across, down = (edge, edge) if width == height else (align(edge * math.sqrt(aspect)), align(edge / math.sqrt(aspect)))
    rounded = round(across / down, 2)
    if rounded == 1.0:
        megapixels = resolution**2 / 1e6
        across = down = next((side for familiar, side in FAMILIAR_SQUARES.items() if abs(megapixels - familiar) < 0.05), edge)
    return Shape(rounded, across, down)


def form_buckets(files: Sequence[DatasetFile], resolution: int) -> dict[Shape, list[DatasetFile]]:
    """Bucket -> its pictures, by aspect. Of two sizes with one aspect the first that is met counts for both."""
    sizes: dict[float, Shape] = {}
    held = defaultdict[Shape, list[DatasetFile]](list)
    for file in files:
        if file.width and file.height and (shape := choose_shape(file.width, file.height, resolution)):
            held[sizes.setdefault(shape.aspect, shape)].append(file)
    return dict(sorted(held.items()))


def count_steps(bucket_sizes: Iterable[int], batch_size: int, repeats: int) -> int:
    """Batches in an epoch. Each bucket gives its own, the last one filled up; one that cannot fill a batch gives none."""
    samples = [size * (repeats + 1) for size in bucket_sizes]
    return sum(math.ceil(count / batch_size) for count in samples if count >= batch_size)
