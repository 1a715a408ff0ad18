"""What a picture shows: its colours, and the outline of its object among nine templates. Arrays are 256x256x3 floats in 0..255."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from local.tinyflux.make.drawing import draw_shape
from local.tinyflux.make.words import COLOURS, SHAPES

Array = NDArray[Any]
Mask = NDArray[np.bool_]

COLOUR_NAMES = list(COLOURS)
PALETTE = np.array([COLOURS[name] for name in COLOUR_NAMES], float)
OUTLINE, COARSE, FRAME = 48, 64, 6  # side of a compared outline, side of the grid for regions, ignored frame (codec ringing)


def nearest_colour(rgb: Array) -> str:
    return COLOUR_NAMES[int(((PALETTE - rgb) ** 2).sum(1).argmin())]


def border_colour(picture: Array) -> Array:
    sides = (picture[:10], picture[-10:], picture[:, :10], picture[:, -10:])
    median: Array = np.median(np.concatenate([side.reshape(-1, 3) for side in sides]), 0)
    return median


def find_foreground(picture: Array, background: Array) -> Mask:
    """Pixels nearer to the object's colour (median of the strongly different ones) than to the background's."""
    distance = ((picture - background) ** 2).sum(2)
    distance[:FRAME] = distance[-FRAME:] = 0
    distance[:, :FRAME] = distance[:, -FRAME:] = 0
    high = np.percentile(distance, 99.5)
    if high < 40**2:
        return np.zeros(distance.shape, bool)
    colour = np.median(picture[distance > 0.6 * high], 0)
    mask: Mask = (distance > ((picture - colour) ** 2).sum(2)) & (distance > 0)
    return mask


def shrink(mask: Mask, side: int) -> Mask:
    small = Image.fromarray((mask * 255).astype(np.uint8)).resize((side, side), Image.Resampling.BOX)
    return np.asarray(small) > 127


def centre_outline(mask: Mask) -> Mask:
    """48x48, cropped to its bounding box, centred, proportions kept."""
    y, x = np.where(mask)
    if len(y) < 8:
        return np.zeros((OUTLINE, OUTLINE), bool)
    height, width = int(y.max() - y.min()) + 1, int(x.max() - x.min()) + 1
    side = max(height, width)
    square = np.zeros((side, side), bool)
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = mask[y.min() : y.max() + 1, x.min() : x.max() + 1]
    return shrink(square, OUTLINE)


def make_templates() -> dict[str, Mask]:
    templates = {}
    for shape in SHAPES:
        image = Image.new("RGB", (256, 256))
        draw_shape(image, shape, 128, 128, 80, (255, 255, 255))
        templates[shape] = centre_outline(np.asarray(image).max(2) > 20)
    return templates


def find_regions(mask: Mask) -> list[Mask]:
    """Connected regions of at least 8 cells on a 64x64 grid, the largest first."""
    if mask.shape[0] != mask.shape[1]:
        mask = np.pad(mask, ((0, 0), (0, mask.shape[0] - mask.shape[1])))
    cells = shrink(mask, COARSE)
    regions: list[Mask] = []
    while cells.any():
        region = grow_region(cells, (int(cells.argmax()) // COARSE, int(cells.argmax()) % COARSE))
        cells = cells & ~region
        if region.sum() >= 8:
            regions.append(region)
    return sorted(regions, key=lambda region: -int(region.sum()))


def grow_region(cells: Mask, start: tuple[int, int]) -> Mask:
    region = np.zeros_like(cells)
    region[start] = True
    waiting = [start]
    while waiting:
        y, x = waiting.pop()
        for beside in ((y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)):
            if min(beside) >= 0 and max(beside) < COARSE and cells[beside] and not region[beside]:
                region[beside] = True
                waiting.append(beside)
    return region


def match_shape(mask: Mask, templates: dict[str, Mask]) -> tuple[str, dict[str, float]]:
    """The best template for the largest region, and every template's overlap (intersection over union)."""
    regions = find_regions(mask)
    outline = centre_outline(regions[0] if regions else mask)
    overlaps = {shape: float((outline & template).sum() / max(1, int((outline | template).sum()))) for shape, template in templates.items()}
    return max(overlaps, key=lambda shape: overlaps[shape]), overlaps
