"""What the model's world consists of and how captions name it. Repeated words are likelier, an empty one says nothing."""

from random import Random

Colour = tuple[int, int, int]

COLOURS: dict[str, Colour] = {
    "red": (220, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (250, 215, 50),
    "green": (50, 165, 75),
    "blue": (45, 95, 220),
    "purple": (130, 60, 190),
    "pink": (245, 130, 180),
    "white": (245, 245, 245),
    "black": (25, 25, 30),
    "brown": (130, 80, 45),
    "gray": (135, 140, 145),
    "teal": (40, 175, 180),
}
COLOUR_WORDS: dict[str, list[str]] = {
    "red": ["red", "red", "red", "crimson", "scarlet"],
    "gray": ["gray", "gray", "grey", "silver"],
    "teal": ["teal", "cyan", "turquoise"],
    "purple": ["purple", "purple", "violet"],
    "yellow": ["yellow", "yellow", "golden"],
    "pink": ["pink", "pink", "rose"],
}

SHAPES = ["circle", "square", "triangle", "star", "heart", "ring", "diamond", "cross", "moon"]
SHAPE_WORDS = {
    "circle": ["circle", "circle", "ball", "disc"],
    "square": ["square", "square", "box"],
    "ring": ["ring", "ring", "donut"],
    "moon": ["moon", "crescent moon", "crescent"],
}
PLURALS = {"cross": "crosses", "box": "boxes"}
NUMBER_WORDS = {2: ["two", "2", "a pair of"], 3: ["three", "3"], 4: ["four", "4"]}

SCENES = ["sunset", "night", "sea", "mountains", "meadow", "desert", "snow", "forest", "city", "space"]
PLACE_PHRASES = {
    "sunset": ["at sunset", "with a sunset sky", "in the evening glow", "at dusk"],
    "night": ["at night", "under a night sky", "in the dark with stars", "under the stars"],
    "sea": ["by the sea", "on the ocean", "over the water", "at the beach"],
    "mountains": ["in the mountains", "in front of mountains", "with mountains behind"],
    "meadow": ["in a meadow", "on a green hill", "on the grass", "in a field"],
    "desert": ["in the desert", "on sand dunes"],
    "snow": ["in the snow", "in winter", "on a snowy hill"],
    "forest": ["in a forest", "in the woods", "among trees"],
    "city": ["in the city", "over a city skyline", "above buildings"],
    "space": ["in space", "in outer space", "among planets"],
}
EMPTY_SCENES = {
    "sunset": ["a beautiful sunset", "sunset over the sea", "a sunset landscape", "the sun setting on the horizon"],
    "night": ["a night sky with stars", "a starry night", "a calm night landscape with a moon"],
    "sea": ["the sea", "a blue ocean with waves", "a seascape on a sunny day", "a beach by the sea"],
    "mountains": ["mountains", "a mountain landscape", "snowy mountains under a clear sky"],
    "meadow": ["a green meadow", "rolling green hills", "a sunny field of grass"],
    "desert": ["a desert with sand dunes", "a hot desert landscape"],
    "snow": ["a snowy landscape", "a winter landscape"],
    "forest": ["a forest", "a deep green forest", "pine trees in the woods"],
    "city": ["a city skyline", "a city with tall buildings at night"],
    "space": ["outer space with planets", "a planet in space", "a galaxy with stars and planets"],
}

OPENINGS = [
    "",
    "",
    "",
    "",
    "a picture of ",
    "a photo of ",
    "an illustration of ",
    "a painting of ",
    "a drawing of ",
    "an image of ",
    "render of ",
]
ENDINGS = [
    "",
    "",
    "",
    "",
    ", high quality",
    ", detailed",
    ", minimalist",
    ", flat design",
    ", simple shapes",
    ", digital art",
    ", beautiful",
]
POSITIONS: dict[str, tuple[tuple[float, float], list[str]]] = {
    "center": ((0.5, 0.5), ["in the center", "in the middle", "", "", ""]),
    "left": ((0.24, 0.5), ["on the left", "at the left"]),
    "right": ((0.76, 0.5), ["on the right", "at the right"]),
    "top": ((0.5, 0.24), ["at the top", "on top"]),
    "bottom": ((0.5, 0.76), ["at the bottom"]),
    "top left": ((0.25, 0.25), ["in the top left corner", "at the top left"]),
    "top right": ((0.75, 0.25), ["in the top right corner", "at the top right"]),
    "bottom left": ((0.25, 0.75), ["in the bottom left corner", "at the bottom left"]),
    "bottom right": ((0.75, 0.75), ["in the bottom right corner", "at the bottom right"]),
}


def name_colour(colour: str, rng: Random) -> str:
    return rng.choice(COLOUR_WORDS.get(colour, [colour]))


def name_shape(shape: str, rng: Random, *, plural: bool = False) -> str:
    word = rng.choice(SHAPE_WORDS.get(shape, [shape]))
    return PLURALS.get(word, word + "s") if plural else word


def with_article(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words
