"""Pictures that look the same: a fingerprint of each, and groups of those whose fingerprints are near. It stores nothing."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from gateway.datasets.records import DatasetFile

# Of 64 brightness steps, and of 48 colour means (0-255). A recompressed or scaled copy differs by 0-3 and 0-4;
# two drawings of one small thing on different grounds by 0-6 and 20-100.
MAX_STEPS_APART = 6
MAX_COLOUR_APART = 8.0
_STEP_DIGITS = 16


def fingerprint(image: Image.Image) -> str:
    """16 hex digits of dHash (8 rows of 8 brightness steps), then 96 of colour: the RGB means of a 4x4 grid.

    The steps alone would take all flat pictures for one another.
    """
    small = image.resize((72, 64), Image.Resampling.BOX, reducing_gap=2.0)
    grey = small.convert("L").resize((9, 8), Image.Resampling.BOX).tobytes()
    bits = 0
    for row in range(8):
        for column in range(8):
            bits = bits << 1 | (grey[row * 9 + column] < grey[row * 9 + column + 1])
    return f"{bits:016x}{small.resize((4, 4), Image.Resampling.BOX).tobytes().hex()}"


def is_alike(one: str, two: str) -> bool:
    """Whether two fingerprints are those of nearly the same picture."""
    if (int(one[:_STEP_DIGITS], 16) ^ int(two[:_STEP_DIGITS], 16)).bit_count() > MAX_STEPS_APART:
        return False
    pairs = zip(bytes.fromhex(one[_STEP_DIGITS:]), bytes.fromhex(two[_STEP_DIGITS:]), strict=True)
    apart = [abs(left - right) for left, right in pairs]
    return sum(apart) / len(apart) <= MAX_COLOUR_APART


def find_likenesses(files: Sequence[DatasetFile]) -> list[list[str]]:
    """Names of files that look the same, in groups: whoever is like one of a group belongs to it."""
    prints = [(file.name, file.phash) for file in files if file.phash is not None]
    leader = list(range(len(prints)))

    def lead(index: int) -> int:
        while leader[index] != index:
            leader[index] = leader[leader[index]]
            index = leader[index]
        return index

    steps = [int(phash[:_STEP_DIGITS], 16) for _, phash in prints]
    for later in range(1, len(prints)):
        for earlier in range(later):
            # The steps are compared first and here: a thousand pictures are half a million pairs.
            if (steps[later] ^ steps[earlier]).bit_count() <= MAX_STEPS_APART and is_alike(prints[later][1], prints[earlier][1]):
                leader[lead(later)] = lead(earlier)
    groups: dict[int, list[str]] = {}
    for index, (name, _) in enumerate(prints):
        groups.setdefault(lead(index), []).append(name)
    return [names for names in groups.values() if len(names) > 1]
