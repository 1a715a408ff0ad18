"""Says the main colours of a picture and the colour of its ground, from the pixels alone. It recognises nothing, and says so by its words.

For laptops without a captioning model, and good enough where captions shall only tell backgrounds apart.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from PIL import Image

NAMED = {
    "black": (20, 20, 20),
    "white": (245, 245, 245),
    "grey": (128, 128, 128),
    "red": (210, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (250, 220, 40),
    "green": (45, 160, 70),
    "cyan": (60, 200, 210),
    "blue": (45, 85, 200),
    "purple": (135, 60, 180),
    "pink": (245, 150, 190),
    "brown": (125, 80, 45),
}
SIDE_PX = 64
BORDER_PX = 6
# A share of the pixels inside the border below which a colour is a speck.
LEAST_SHARE = 0.04
MOST_COLOURS = 2


def describe(pictures: Sequence[Path], options: Mapping[str, str]) -> Iterator[str]:
    for path in pictures:
        with Image.open(path) as picture:
            yield caption(picture.convert("RGB").resize((SIDE_PX, SIDE_PX), Image.Resampling.BOX))


def caption(small: Image.Image) -> str:
    """Of a picture of SIDE_PX each way."""
    pixels = small.tobytes()
    names = [nearest(pixels[place], pixels[place + 1], pixels[place + 2]) for place in range(0, len(pixels), 3)]
    inner = range(BORDER_PX, SIDE_PX - BORDER_PX)
    middle = Counter(names[row * SIDE_PX + column] for row in inner for column in inner)
    border = Counter(names) - middle
    ground = border.most_common(1)[0][0]
    least = LEAST_SHARE * len(inner) ** 2
    colours = [name for name, count in middle.most_common() if name != ground and count >= least][:MOST_COLOURS]
    shown = f"a {' and '.join(colours)} thing" if colours else "something"
    return f"{shown} on a {ground} background"


def nearest(red: int, green: int, blue: int) -> str:
    return min(NAMED, key=lambda name: (NAMED[name][0] - red) ** 2 + (NAMED[name][1] - green) ** 2 + (NAMED[name][2] - blue) ** 2)
