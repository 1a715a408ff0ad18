"""A caller's picture as ComfyUI gets it: decoded here first, upright, within limits, written anew as PNG. Pure.

What is written holds pixels and nothing else: no metadata, no profile, no second file behind the first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

from PIL import Image, ImageChops

from gateway.datasets.intake import MIN_EDGE_PX, Refused, decode, normalise, set_upright, write

Aim = Literal["picture", "mask", "transparency", "whole"]


class Recipe(NamedTuple):
    """What is to be made. `picture`: RGB, transparent parts white. `mask`: grey, white is where something shall change.

    `transparency`: the mask of a picture's own transparent parts. `whole`: as `picture`, with its transparency.
    All of one picture with the same limits have the same size.
    """

    aim: Aim
    max_pixels: int | None
    multiple_of: int

    @property
    def name(self) -> str:
        return f"{self.aim}-{self.max_pixels or 0}-{self.multiple_of}-1"  # the last is this code's version


@dataclass(frozen=True, slots=True)
class Made:
    body: bytes
    width: int
    height: int


def make(body: bytes, name: str, recipe: Recipe) -> Made:
    """Raises Refused."""

    def use(image: Image.Image, _: str) -> Made:
        fitted = _fit(_choose_pixels(image, name, recipe.aim), name, recipe)
        return Made(write(fitted, "png")[1], *fitted.size)

    return decode(body, name, use)


def _choose_pixels(image: Image.Image, name: str, aim: Aim) -> Image.Image:
    if aim == "whole" and image.has_transparency_data:
        image.load()
        return set_upright(image).convert("RGBA")
    return normalise(image, name).image if aim in ("picture", "whole") else _find_mask(image, name, is_own=aim == "transparency")


def _find_mask(image: Image.Image, name: str, *, is_own: bool) -> Image.Image:
    """White where it is transparent; one without transparency is a mask by its brightness."""
    image.load()
    upright = set_upright(image)
    if upright.has_transparency_data:
        alpha = upright.convert("RGBA").getchannel("A")
        if alpha.getextrema() != (255, 255):
            return ImageChops.invert(alpha)
    if is_own:
        remedy = "Send a mask as a picture of its own, white where something shall change, or make those parts transparent."
        raise Refused("no_transparency", name, f"There is no mask, and {name} has no transparent part to take for one.", remedy)
    return upright.convert("L")


def _fit(image: Image.Image, name: str, recipe: Recipe) -> Image.Image:
    """Scaled down to the limit, then cut on all sides to the multiple."""
    width, height = image.size
    if recipe.max_pixels is not None and width * height > recipe.max_pixels:
        factor = math.sqrt(recipe.max_pixels / (width * height))
        width, height = int(width * factor), int(height * factor)
    if min(width, height) < MIN_EDGE_PX:
        message = f"{name} has {image.width}x{image.height} pixels; scaled to {recipe.max_pixels} pixels in all it is too narrow."
        raise Refused("picture_too_narrow", name, message, f"Cut it: its shorter side must keep {MIN_EDGE_PX} pixels.")
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=3.0)
    cut_width, cut_height = (side // recipe.multiple_of * recipe.multiple_of for side in image.size)
    left, top = (width - cut_width) // 2, (height - cut_height) // 2
    return image.crop((left, top, left + cut_width, top + cut_height))
