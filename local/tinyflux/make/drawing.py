"""Colours, gradients and shapes on a Pillow picture; sizes in pixels, `radius` being about half a shape's extent."""

import math
from random import Random

import numpy as np
from PIL import Image, ImageDraw

from local.tinyflux.make.words import Colour

Point = tuple[float, float]

TRUNK = (110, 70, 40)


def jitter(colour: Colour, rng: Random, amount: float = 14) -> Colour:
    red, green, blue = (int(max(0, min(255, level + rng.uniform(-amount, amount)))) for level in colour)
    return red, green, blue


def blend(first: Colour, second: Colour, share: float) -> Colour:
    red, green, blue = (int(a + (b - a) * share) for a, b in zip(first, second, strict=True))
    return red, green, blue


def gradient(width: int, height: int, start: Colour, end: Colour, angle: float = math.pi / 2) -> Image.Image:
    """Computed at an eighth of the size, then enlarged."""
    y, x = np.mgrid[0:height:8, 0:width:8]
    along = (x / width - 0.5) * math.cos(angle) + (y / height - 0.5) * math.sin(angle)
    share = np.clip(along / (abs(math.cos(angle)) + abs(math.sin(angle))) + 0.5, 0, 1)[..., None]
    small = Image.fromarray((np.array(start) * (1 - share) + np.array(end) * share).astype(np.uint8))
    return small.resize((width, height), Image.Resampling.BILINEAR)


def corners(x: float, y: float, radius: float, count: int, inner: float | None = None) -> list[Point]:
    """A regular polygon with a corner on top; `inner` puts a nearer corner between each two, which makes a star."""
    total = count if inner is None else 2 * count
    points = []
    for index in range(total):
        reach = radius if inner is None or index % 2 == 0 else radius * inner
        angle = -math.pi / 2 + index * 2 * math.pi / total
        points.append((x + reach * math.cos(angle), y + reach * math.sin(angle)))
    return points


def heart(x: float, y: float, radius: float) -> list[Point]:
    points = []
    for a in np.linspace(0, 2 * np.pi, 40):
        height = 13 * np.cos(a) - 5 * np.cos(2 * a) - 2 * np.cos(3 * a) - np.cos(4 * a)
        points.append((float(x + radius / 16 * 16 * np.sin(a) ** 3), float(y - radius / 16 * height)))
    return points


def box(x: float, y: float, radius: float) -> list[float]:
    return [x - radius, y - radius, x + radius, y + radius]


def draw_shape(image: Image.Image, kind: str, x: float, y: float, radius: float, colour: Colour) -> None:
    draw = ImageDraw.Draw(image)
    match kind:
        case "circle":
            draw.ellipse(box(x, y, radius), fill=colour)
        case "square":
            draw.rectangle([x - radius * 0.86, y - radius * 0.86, x + radius * 0.86, y + radius * 0.86], fill=colour)
        case "triangle":
            draw.polygon(corners(x, y + radius * 0.15, radius * 1.1, 3), fill=colour)
        case "star":
            draw.polygon(corners(x, y, radius * 1.12, 5, inner=0.42), fill=colour)
        case "diamond":
            tall, wide = radius * 1.1, radius * 0.75
            draw.polygon([(x, y - tall), (x + wide, y), (x, y + tall), (x - wide, y)], fill=colour)
        case "heart":
            draw.polygon(heart(x, y, radius), fill=colour)
        case "ring":
            draw.ellipse(box(x, y, radius), outline=colour, width=max(6, int(radius * 0.36)))
        case "moon":
            draw_moon(image, x, y, radius, colour)
        case "cross":
            draw.rectangle([x - radius * 0.3, y - radius, x + radius * 0.3, y + radius], fill=colour)
            draw.rectangle([x - radius, y - radius * 0.3, x + radius, y + radius * 0.3], fill=colour)
        case "tree":
            draw_tree(draw, x, y, radius, colour)
        case "cloud":
            draw_cloud(draw, x, y, radius, colour)
        case _:
            raise ValueError(f"no shape {kind!r}")


def draw_moon(image: Image.Image, x: float, y: float, radius: float, colour: Colour) -> None:
    mask = Image.new("L", image.size, 0)
    draw = ImageDraw.Draw(mask)
    draw.ellipse(box(x, y, radius), fill=255)
    draw.ellipse([x - radius * 0.35, y - radius * 1.05, x + radius * 1.35, y + radius * 0.75], fill=0)
    image.paste(colour, (0, 0), mask)


def draw_tree(draw: ImageDraw.ImageDraw, x: float, y: float, radius: float, colour: Colour) -> None:
    draw.rectangle([x - radius * 0.15, y + radius * 0.4, x + radius * 0.15, y + radius * 1.05], fill=TRUNK)
    for level in range(3):
        wide, foot = radius * (0.45 + 0.18 * level), y - radius * (0.35 - 0.45 * level)
        draw.polygon([(x - wide, foot), (x + wide, foot), (x, y - radius * (1.05 - 0.4 * level))], fill=colour)


def draw_cloud(draw: ImageDraw.ImageDraw, x: float, y: float, radius: float, colour: Colour) -> None:
    for right, down, size in ((-0.55, 0.15, 0.42), (0, -0.1, 0.58), (0.55, 0.15, 0.45)):
        draw.ellipse(box(x + right * radius, y + down * radius, size * radius), fill=colour)
    draw.rectangle([x - 0.55 * radius, y + 0.15 * radius, x + 0.55 * radius, y + 0.57 * radius], fill=colour)
