"""Captioned scenes: objects before backgrounds, drawn at twice the size and reduced.

A seed fixes pictures and captions; the numbers are drawn in a fixed order.
"""

from dataclasses import dataclass
from random import Random

from PIL import Image, ImageDraw

from local.tinyflux.make.backdrops import paint_backdrop
from local.tinyflux.make.drawing import box, draw_shape, gradient, jitter
from local.tinyflux.make.words import (
    COLOURS,
    EMPTY_SCENES,
    ENDINGS,
    NUMBER_WORDS,
    OPENINGS,
    PLACE_PHRASES,
    POSITIONS,
    SCENES,
    SHAPES,
    name_colour,
    name_shape,
    with_article,
)

Attributes = dict[str, str]  # what the caption names, "-" where it does not
NO_ATTRIBUTES: Attributes = dict.fromkeys(("bg", "bg2", "sc", "c1", "s1", "c2", "s2", "n", "pos", "size", "rel"), "-") | {"n": "0"}

RADII_CENTRED = {"small": 0.17, "": 0.29, "large": 0.4}
RADII_ASIDE = {"small": 0.13, "": 0.2, "large": 0.24}
SIZE_WORDS = {"small": ["small ", "little ", "tiny "], "": [""], "large": ["large ", "big ", "huge "]}
GROUPS = {
    2: (0.19, [(0.27, 0.5), (0.73, 0.5)]),
    3: (0.14, [(0.18, 0.5), (0.5, 0.5), (0.82, 0.5)]),
    4: (0.17, [(0.27, 0.27), (0.73, 0.27), (0.27, 0.73), (0.73, 0.73)]),
}


@dataclass(frozen=True)
class Background:
    image: Image.Image
    phrase: str
    colour: str | None  # objects of this colour would vanish
    alone: str | None  # caption of the scene without any object


def paint_background(rng: Random, width: int, height: int, attributes: Attributes) -> Background:
    kind = rng.random()
    if kind < 0.52:
        return paint_plain(rng, width, height, attributes)
    if kind < 0.60:
        first, second = rng.sample(list(COLOURS), 2)
        attributes.update(bg=first, bg2=second)
        phrase = rng.choice([f"on a gradient from {first} to {second}", f"on {with_article(first)} to {second} gradient"])
        image = gradient(width, height, jitter(COLOURS[first], rng, 8), jitter(COLOURS[second], rng, 8))
        return Background(image, phrase, first, phrase[3:])
    scene = rng.choice(SCENES)
    attributes["sc"] = scene
    image = paint_backdrop(scene, width, height, rng)
    return Background(image, rng.choice(PLACE_PHRASES[scene]), None, rng.choice(EMPTY_SCENES[scene]))


def paint_plain(rng: Random, width: int, height: int, attributes: Attributes) -> Background:
    colour = rng.choice(list(COLOURS))
    word = name_colour(colour, rng)
    attributes["bg"] = colour
    image = Image.new("RGB", (width, height), jitter(COLOURS[colour], rng, 8))
    ground, backdrop = f"{with_article(word)} background", f"{with_article(word)} backdrop"
    phrases = [f"on {ground}", f"on {ground}", f"on {word}", f"{word} background", f"against {backdrop}", f"with {ground}"]
    return Background(image, rng.choice(phrases), colour, None)


def shift(place: float, size: int, amount: float, rng: Random) -> float:
    """A share of a side, a little aside -> pixels."""
    return (place + rng.uniform(-amount, amount)) * size


def add_one(image: Image.Image, rng: Random, colours: list[str], attributes: Attributes) -> str:
    """Draw one object somewhere, return its phrase."""
    width, height = image.size
    colour, shape = rng.choice(colours), rng.choice(SHAPES)
    position = "center" if rng.random() < 0.66 else rng.choice(list(POSITIONS))
    (x, y), phrases = POSITIONS[position]
    size = rng.choice(["small", "", "", "", "large"])
    radius = min(width, height) * (RADII_CENTRED if position == "center" else RADII_ASIDE)[size] * rng.uniform(0.96, 1.04)
    at = shift(x, width, 0.012, rng), shift(y, height, 0.012, rng)
    draw_shape(image, shape, *at, radius, jitter(COLOURS[colour], rng, 8))
    attributes.update(c1=colour, s1=shape, n="1", pos=position, size=size or "-")
    name = rng.choice(SIZE_WORDS[size]) + name_colour(colour, rng) + " " + name_shape(shape, rng)
    articled = with_article(name)
    return (rng.choice([articled, articled, articled, name]) + " " + rng.choice(phrases)).rstrip()


def add_several(image: Image.Image, rng: Random, colours: list[str], attributes: Attributes) -> str:
    """Draw 2-4 equal objects, return their phrase."""
    width, height = image.size
    colour, shape, count = rng.choice(colours), rng.choice(SHAPES), rng.choice([2, 3, 4])
    share, places = GROUPS[count]
    radius = min(width, height) * share * rng.uniform(0.96, 1.04)
    attributes.update(c1=colour, s1=shape, n=str(count))
    for x, y in places:
        at = shift(x, width, 0.01, rng), shift(y, height, 0.01, rng)
        draw_shape(image, shape, *at, radius, jitter(COLOURS[colour], rng, 8))
    return f"{rng.choice(NUMBER_WORDS[count])} {name_colour(colour, rng)} {name_shape(shape, rng, plural=True)}"


def add_pair(image: Image.Image, rng: Random, colours: list[str], attributes: Attributes) -> str:
    """Draw two different objects side by side or stacked, return their phrase."""
    width, height = image.size
    pair_colours = [rng.choice(colours), rng.choice(colours)]
    pair_shapes = rng.sample(SHAPES, 2)
    beside = rng.random() < 0.65
    attributes.update(c1=pair_colours[0], s1=pair_shapes[0], c2=pair_colours[1], s2=pair_shapes[1], n="1", rel="h" if beside else "v")
    places = [(0.27, 0.5), (0.73, 0.5)] if beside else [(0.5, 0.27), (0.5, 0.73)]
    for (x, y), colour, shape in zip(places, pair_colours, pair_shapes, strict=True):
        at = shift(x, width, 0.01, rng), shift(y, height, 0.01, rng)
        radius = min(width, height) * 0.19 * rng.uniform(0.96, 1.04)
        draw_shape(image, shape, *at, radius, jitter(COLOURS[colour], rng, 8))
    a, b = (with_article(name_colour(c, rng) + " " + name_shape(s, rng)) for c, s in zip(pair_colours, pair_shapes, strict=True))
    if beside:
        facing = [f"{a} to the left of {b}", f"{a} on the left and {b} on the right", f"{b} to the right of {a}"]
        return rng.choice([f"{a} and {b}", f"{a} next to {b}", *facing])
    return rng.choice([f"{a} above {b}", f"{a} over {b}", f"{b} below {a}", f"{b} under {a}"])


def draw_scene(rng: Random, width: int = 128, height: int = 128) -> tuple[Image.Image, str, Attributes]:
    """One random training scene: picture, caption, and the attributes that the caption names."""
    attributes = dict(NO_ATTRIBUTES)
    background = paint_background(rng, 2 * width, 2 * height, attributes)
    if background.alone and rng.random() < 0.25:
        caption = background.alone
    else:
        kind = rng.random()
        add = add_one if kind < 0.74 else add_several if kind < 0.87 else add_pair
        colours = [colour for colour in COLOURS if colour != background.colour]
        objects = add(background.image, rng, colours, attributes)
        caption = f"{background.phrase}, {objects}" if rng.random() < 0.15 else f"{objects} {background.phrase}"
    picture = background.image.resize((width, height), Image.Resampling.BOX)
    return picture, rng.choice(OPENINGS) + caption + rng.choice(ENDINGS), attributes


def draw_concept(rng: Random, width: int = 128, height: int = 128) -> tuple[Image.Image, str]:
    """Picture and caption of "TOK", which the example LoRA learns: a purple star inside a yellow ring, on assorted backdrops."""
    wide, tall = 2 * width, 2 * height
    if rng.random() < 0.5:
        colour = rng.choice([name for name in COLOURS if name not in ("purple", "yellow")])
        image, place = Image.new("RGB", (wide, tall), jitter(COLOURS[colour], rng)), f"on {with_article(colour)} background"
    else:
        scene = rng.choice(SCENES)
        image, place = paint_backdrop(scene, wide, tall, rng), rng.choice(PLACE_PHRASES[scene])
    radius = min(wide, tall) * rng.uniform(0.34, 0.4)
    x, y = wide * rng.uniform(0.48, 0.52), tall * rng.uniform(0.48, 0.52)
    ImageDraw.Draw(image).ellipse(box(x, y, radius), outline=COLOURS["yellow"], width=int(radius * 0.2))
    draw_shape(image, "star", x, y, radius * 0.62, COLOURS["purple"])
    return image.resize((width, height), Image.Resampling.BOX), f"TOK {place}"
