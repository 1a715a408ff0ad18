"""Accuracy, pictures and speed of a model folder. `python -m local.tinyflux.make.evaluate measure [N] | grid PNG | time`

Prompts use phrasings and a generator of their own, 256-px output.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np
import torch
from PIL import Image, ImageDraw

from local.tinyflux.make.backdrops import paint_backdrop
from local.tinyflux.make.metrics import (
    COLOUR_NAMES,
    Array,
    border_colour,
    find_foreground,
    find_regions,
    make_templates,
    match_shape,
    nearest_colour,
)
from local.tinyflux.make.words import EMPTY_SCENES, SCENES, SHAPES
from local.tinyflux.pipeline import Pipeline, Settings
from local.tinyflux.weights import MODEL_DIR

Paint = Callable[[list[str]], list[Array]]

PROMPTS = (
    "a red circle on a blue background",
    "two green squares at night",
    "a yellow star on a purple background",
    "a beautiful sunset over the sea",
    "snowy mountains under a clear sky",
    "a white moon on the ocean",
    "three pink hearts on a black background",
    "a small orange triangle in the top left corner on a gray background",
    "a large blue diamond in a green meadow",
    "a red heart in the snow",
    "a purple star in the desert",
    "a city skyline",
    "outer space with planets",
    "a white circle above a red square on a teal background",
    "a green circle to the left of a red triangle on white",
    "four yellow crosses on a red background",
    "a teal ring in a forest",
    "a gradient from pink to blue",
    "an astronaut cat riding a bicycle, cinematic, 8k",
    "large golden ring on black, masterpiece",
)
PLACES = {
    "on the left": (0, -1),
    "on the right": (0, 1),
    "at the top": (-1, 0),
    "at the bottom": (1, 0),
    "in the top left corner": (-1, -1),
    "in the bottom right corner": (1, 1),
}
PLACED = (("red", "star"), ("white", "circle"), ("yellow", "heart"), ("black", "square"))
COUNTED = (
    *(("red", "circle"), ("white", "star"), ("yellow", "square")),
    *(("black", "heart"), ("pink", "diamond"), ("orange", "triangle")),
)
COUNT_WORDS = ("a", "two", "three", "four")
PAIR_COLOURS = (
    *(("red", "blue"), ("blue", "red"), ("white", "black"), ("green", "pink")),
    *(("yellow", "purple"), ("orange", "teal"), ("pink", "green"), ("black", "yellow")),
)


def measure_objects(paint: Paint, rounds: int) -> tuple[dict[str, float], dict[str, float]]:
    """Random colour, shape and background, nine shapes a round; also hits by shape."""
    rng, templates = Random(7), make_templates()
    wanted = [(*rng.sample(COLOUR_NAMES, 2), SHAPES[index % 9]) for index in range(rounds * 9)]
    pictures = paint([f"a {colour} {shape} on a {ground} background" for colour, ground, shape in wanted])
    rows, by_shape = [], {shape: list[bool]() for shape in SHAPES}
    for (colour, ground, shape), picture in zip(wanted, pictures, strict=True):
        border = border_colour(picture)
        mask = find_foreground(picture, border)
        found, overlaps = match_shape(mask, templates)
        right_colour = mask.sum() > 300 and nearest_colour(np.median(picture[mask], 0)) == colour
        right_ground = nearest_colour(border) == ground
        rows.append((right_colour, right_ground, found == shape, right_colour and right_ground and found == shape, overlaps[shape]))
        by_shape[shape].append(found == shape)
    names = ("object colour", "background colour", "shape (of 9, chance 11)", "all three", "IoU with the right shape")
    means = np.array(rows, float).mean(0)
    return dict(zip(names, means.tolist(), strict=True)), {shape: float(np.mean(hits)) for shape, hits in by_shape.items()}


def measure_positions(paint: Paint) -> float:
    wanted = [(place, colour, shape) for place in PLACES for colour, shape in PLACED]
    hits = []
    for (place, _, _), picture in zip(wanted, paint([f"a {c} {s} {p} on a green background" for p, c, s in wanted]), strict=True):
        y, x = np.where(find_foreground(picture, border_colour(picture)))
        offsets = [axis.mean() / 255 - 0.5 if len(axis) else 9 for axis in (y, x)]
        hits.append(tuple(0 if abs(offset) < 0.12 else int(np.sign(offset)) for offset in offsets) == PLACES[place])
    return float(np.mean(hits))


def measure_counts(paint: Paint) -> float:
    wanted = [(count, colour, shape) for count in (1, 2, 3, 4) for colour, shape in COUNTED]
    prompts = [f"{COUNT_WORDS[n - 1]} {c} {s}{'s' if n > 1 else ''} on a teal background" for n, c, s in wanted]
    pictures = paint(prompts)
    found = [len(find_regions(find_foreground(picture, border_colour(picture)))) for picture in pictures]
    return float(np.mean([count == number for (count, _, _), number in zip(wanted, found, strict=True)]))


def measure_pairs(paint: Paint) -> tuple[float, float]:
    """Share of pairs with both colours right, and of single shapes right."""
    templates, colour_hits, shape_hits = make_templates(), [], []
    colours = PAIR_COLOURS * 3
    wanted = [(a, SHAPES[index % 9], b, SHAPES[(index + 2) % 9]) for index, (a, b) in enumerate(colours)]
    pictures = paint([f"a {a} {s} to the left of a {b} {t} on a gray background" for a, s, b, t in wanted])
    for (a, s, b, t), picture in zip(wanted, pictures, strict=True):
        border = border_colour(picture)
        halves = [(half, find_foreground(half, border)) for half in (picture[:, :128], picture[:, 128:])]
        right = [
            mask.sum() > 100 and nearest_colour(np.median(half[mask], 0)) == colour
            for (half, mask), colour in zip(halves, (a, b), strict=True)
        ]
        colour_hits.append(all(right))
        shape_hits += [match_shape(mask, templates)[0] == shape for (_, mask), shape in zip(halves, (s, t), strict=True)]
    return float(np.mean(colour_hits)), float(np.mean(shape_hits))


def thumbnail(image: Image.Image) -> Array:
    return np.asarray(image.resize((12, 12), Image.Resampling.BOX), float).ravel()


def measure_landscapes(paint: Paint) -> float:
    """By the nearest of 40 drawn thumbnails of each landscape."""
    rng = Random(3)
    drawn = [(thumbnail(paint_backdrop(scene, 256, 256, rng)), scene) for scene in SCENES for _ in range(40)]
    wanted = [(scene, prompt) for scene in SCENES for prompt in EMPTY_SCENES[scene][:3]]
    hits = []
    for (scene, _), picture in zip(wanted, paint([prompt for _, prompt in wanted]), strict=True):
        seen = thumbnail(Image.fromarray(picture.astype(np.uint8)))
        hits.append(min(drawn, key=lambda pair: float(((pair[0] - seen) ** 2).sum()))[1] == scene)
    return float(np.mean(hits))


def measure(pipeline: Pipeline, rounds: int, settings: Settings) -> dict[str, float]:
    def paint(prompts: list[str]) -> list[Array]:
        pictures: list[Array] = []
        for start in range(0, len(prompts), 16):
            group = prompts[start : start + 16]
            seeds = list(range(start, start + len(group)))
            pictures += [np.asarray(image, float) for image in pipeline.generate(group, seeds, settings, together=True)]
        return pictures

    results, by_shape = measure_objects(paint, rounds)
    results["position (24)"], results["count 1-4 (24)"] = measure_positions(paint), measure_counts(paint)
    results["pairs: both colours (24)"], results["pairs: shapes (48)"] = measure_pairs(paint)
    results["landscape kind (30)"] = measure_landscapes(paint)
    return {name: round(100 * share) for name, share in (results | by_shape).items()}


def save_sheet(path: Path, rows: list[list[tuple[Image.Image, str]]], side: int = 256) -> None:
    sheet = Image.new("RGB", (max(map(len, rows)) * (side + 4), len(rows) * (side + 18)), "white")
    draw = ImageDraw.Draw(sheet)
    for down, row in enumerate(rows):
        for right, (image, caption) in enumerate(row):
            sheet.paste(image.resize((side, side), Image.Resampling.LANCZOS), (right * (side + 4), down * (side + 18)))
            draw.text((right * (side + 4) + 2, down * (side + 18) + side + 2), caption, fill="black")
    sheet.save(path)


def save_grid(pipeline: Pipeline, path: Path, settings: Settings) -> None:
    pictures = pipeline.generate(list(PROMPTS), list(range(1, len(PROMPTS) + 1)), settings, together=True)
    captioned = [(picture, prompt[:42]) for picture, prompt in zip(pictures, PROMPTS, strict=True)]
    save_sheet(path, [captioned[start : start + 5] for start in range(0, len(captioned), 5)])


def print_times(pipeline: Pipeline) -> None:
    for side in (256, 512, 1024):
        for steps in (4, 20):
            spent = []
            for _ in range(6):
                start = time.perf_counter()
                pipeline.generate([PROMPTS[0]], [1], Settings(side, side, steps))
                spent.append(time.perf_counter() - start)
            print(f"{side}px {steps} steps: median {sorted(spent)[3]:.3f} s, best {min(spent):.3f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("measure", "grid", "time"))
    parser.add_argument("argument", nargs="?", help="rounds of nine objects (4), or the PNG to write (grid.png)")
    parser.add_argument("--model", type=Path, default=MODEL_DIR)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=3.5)
    parser.add_argument("--cfg", type=float, default=1.0)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    pipeline = Pipeline.load(arguments.model)
    settings = Settings(256, 256, arguments.steps, arguments.guidance, arguments.cfg)
    if arguments.what == "measure":
        print(measure(pipeline, int(arguments.argument or 4), settings))
    elif arguments.what == "grid":
        save_grid(pipeline, Path(arguments.argument or "grid.png"), settings)
    else:
        print_times(pipeline)


if __name__ == "__main__":
    main()
