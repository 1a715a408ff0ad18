"""The ten landscapes. Every number drawn from the generator is drawn in a fixed order, so that a seed fixes the data set."""

import math
from collections.abc import Callable
from random import Random

from PIL import Image, ImageDraw

from local.tinyflux.make.drawing import blend, box, draw_shape, gradient, jitter
from local.tinyflux.make.words import COLOURS, Colour

BLACK, SNOW_WHITE, LAMP = (0, 0, 0), (240, 245, 250), (255, 225, 130)


class Landscape:
    """A picture under work; x and y and sizes are shares of its width and height."""

    def __init__(self, width: int, height: int, rng: Random) -> None:
        self.width, self.height, self.rng = width, height, rng
        self.image = Image.new("RGB", (width, height))

    @property
    def draw(self) -> ImageDraw.ImageDraw:
        return ImageDraw.Draw(self.image)

    def near(self, red: int, green: int, blue: int) -> Colour:
        return jitter((red, green, blue), self.rng, 10)

    def sky(self, top: Colour, bottom: Colour, angle: float = math.pi / 2) -> None:
        self.image = gradient(self.width, self.height, top, bottom, angle)

    def ground(self, from_px: int, top: Colour, bottom: Colour) -> None:
        self.image.paste(gradient(self.width, self.height - from_px, top, bottom), (0, from_px))

    def place(self, kind: str, x: float, y: float, radius: float, colour: Colour) -> None:
        draw_shape(self.image, kind, x * self.width, y * self.height, radius * self.height, colour)

    def hills(self, y: float, amplitude: float, colour: Colour) -> None:
        phase, waves = self.rng.uniform(0, 6.3), self.rng.uniform(0.8, 1.6)
        ridge: list[tuple[float, float]] = [
            (x, y * self.height + amplitude * self.height * math.sin(phase + waves * 2 * math.pi * x / self.width))
            for x in range(0, self.width + 16, 16)
        ]
        self.draw.polygon([*ridge, (self.width, self.height), (0, self.height)], fill=colour)

    def peaks(self, base: float, colour: Colour, count: int) -> None:
        rng, draw = self.rng, self.draw
        for index in range(count):
            x = self.width * ((index + 0.5) / count + rng.uniform(-0.1, 0.1))
            tall, wide, y = self.height * rng.uniform(0.25, 0.48), self.width * rng.uniform(0.22, 0.36), base * self.height
            rock = jitter(colour, rng, 8)
            draw.polygon([(x - wide, y), (x + wide, y), (x, y - tall)], fill=rock)
            draw.polygon([(x, y - tall), (x + wide, y), (x + wide * 0.15, y)], fill=blend(rock, BLACK, 0.18))
            cap = [(x, y - tall), (x - wide * 0.28, y - tall * 0.72), (x, y - tall * 0.62), (x + wide * 0.28, y - tall * 0.72)]
            draw.polygon(cap, fill=SNOW_WHITE)

    def stars(self, count: int, lowest: float = 1.0) -> None:
        draw, rng = self.draw, self.rng
        for _ in range(count):
            x, y = rng.uniform(0, self.width), rng.uniform(0, self.height * lowest)
            draw.ellipse(box(x, y, rng.uniform(3, 7) * self.height / 512), fill=(245, 240, 215))


def paint_sunset(land: Landscape) -> None:
    rng, height = land.rng, land.height
    land.sky(land.near(95, 55, 140), land.near(255, 150, 70))
    horizon = rng.uniform(0.6, 0.7) * height
    x, radius = rng.uniform(0.3, 0.7) * land.width, height * rng.uniform(0.11, 0.16)
    land.draw.ellipse(box(x, horizon, radius), fill=(255, 225, 120))
    land.ground(int(horizon), land.near(200, 95, 90), land.near(60, 35, 95))
    for stripe in range(4):
        y, half = horizon + (stripe + 0.6) * (height - horizon) / 4.5, radius * (1 - 0.18 * stripe)
        land.draw.rectangle([x - half, y, x + half, y + height * 0.014], fill=(255, 205, 120))


def paint_night(land: Landscape) -> None:
    rng = land.rng
    land.sky(land.near(12, 16, 50), land.near(45, 60, 120))
    land.stars(22, 0.65)
    x, y = rng.choice([rng.uniform(0.12, 0.3), rng.uniform(0.7, 0.88)]), rng.uniform(0.14, 0.26)
    land.place("moon" if rng.random() < 0.5 else "circle", x, y, 0.08, (245, 240, 210))
    land.hills(0.82, 0.04, land.near(18, 28, 55))


def paint_sea(land: Landscape) -> None:
    rng, width, height = land.rng, land.width, land.height
    land.sky(land.near(90, 170, 240), land.near(205, 232, 250))
    horizon = rng.uniform(0.5, 0.6)
    land.ground(int(horizon * height), land.near(40, 130, 200), land.near(15, 70, 140))
    for wave in range(5):
        y, x = height * (horizon + 0.06 + 0.08 * wave), rng.uniform(0, 0.6) * width
        land.draw.rectangle([x, y, x + width * rng.uniform(0.2, 0.4), y + height * 0.015], fill=(120, 190, 235))
    if rng.random() < 0.6:
        land.place("circle", rng.choice([0.15, 0.85]), 0.15, 0.08, (255, 235, 130))
    if rng.random() < 0.5:
        land.hills(0.93, 0.02, land.near(240, 215, 150))


def paint_mountains(land: Landscape) -> None:
    land.sky(land.near(110, 170, 235), land.near(220, 235, 250))
    land.peaks(0.8, (110, 120, 145), 3)
    land.hills(0.78, 0.03, land.near(75, 145, 85))


def paint_meadow(land: Landscape) -> None:
    rng = land.rng
    land.sky(land.near(120, 190, 245), land.near(215, 238, 250))
    if rng.random() < 0.6:
        land.place("circle", rng.choice([0.16, 0.84]), 0.17, 0.09, (255, 230, 110))
    if rng.random() < 0.6:
        land.place("cloud", rng.uniform(0.3, 0.7), 0.16, 0.09, (250, 252, 255))
    land.hills(0.62, 0.06, land.near(120, 195, 95))
    land.hills(0.76, 0.05, land.near(80, 165, 70))


def paint_desert(land: Landscape) -> None:
    land.sky(land.near(150, 200, 240), land.near(255, 232, 190))
    land.place("circle", land.rng.choice([0.2, 0.8]), 0.18, 0.09, (255, 240, 160))
    land.hills(0.6, 0.06, land.near(235, 195, 120))
    land.hills(0.75, 0.06, land.near(215, 165, 90))


def paint_snow(land: Landscape) -> None:
    land.sky(land.near(150, 185, 220), land.near(225, 235, 245))
    land.hills(0.62, 0.05, land.near(225, 233, 245))
    land.hills(0.76, 0.04, (248, 250, 253))
    for _ in range(4):
        land.place("tree", land.rng.uniform(0, 1), land.rng.uniform(0.56, 0.64), 0.09, land.near(60, 110, 95))
    land.stars(16)


def paint_forest(land: Landscape) -> None:
    rng = land.rng
    land.sky(land.near(170, 215, 205), land.near(215, 235, 205))
    land.hills(0.75, 0.02, land.near(70, 125, 60))
    for index in range(9):
        x, y = (index + 0.5 + rng.uniform(-0.3, 0.3)) / 9, rng.uniform(0.55, 0.66)
        land.place("tree", x, y, rng.uniform(0.16, 0.24), jitter((45, 115, 65), rng, 18))


def paint_city(land: Landscape) -> None:
    rng, width, height = land.rng, land.width, land.height
    night = rng.random() < 0.5
    land.sky(land.near(20, 25, 60) if night else land.near(150, 190, 230), land.near(70, 60, 110) if night else land.near(230, 225, 225))
    x = 0.0
    while x < width:
        wide, tall = width * rng.uniform(0.1, 0.17), height * rng.uniform(0.25, 0.55)
        wall = jitter((40, 42, 70) if night else (110, 120, 140), rng, 14)
        land.draw.rectangle([x, height - tall, x + wide, height], fill=wall)
        paint_windows(land, x, wide, tall, LAMP if night else (200, 220, 240))
        x += wide + 2


def paint_windows(land: Landscape, x: float, wide: float, tall: float, colour: Colour) -> None:
    height, draw = land.height, land.draw
    for column in range(2):
        for row in range(int(tall / (height * 0.09))):
            if land.rng.random() < 0.75:
                left, top = x + wide * (0.18 + 0.4 * column), height - tall + height * 0.03 + row * height * 0.09
                draw.rectangle([left, top, left + wide * 0.24, top + height * 0.045], fill=colour)


def paint_space(land: Landscape) -> None:
    rng, width, height = land.rng, land.width, land.height
    land.sky(land.near(8, 8, 25), land.near(35, 15, 60), rng.uniform(0, 6.28))
    land.stars(28)
    for _ in range(rng.choice([1, 2])):
        x, y, radius = rng.choice([0.15, 0.85]) * width, rng.choice([0.18, 0.82]) * height, height * rng.uniform(0.08, 0.14)
        planet = jitter(rng.choice(list(COLOURS.values())[:7]), rng)
        land.draw.ellipse(box(x, y, radius), fill=blend(planet, BLACK, 0.1))
        if rng.random() < 0.5:
            ring = [x - radius * 1.7, y - radius * 0.4, x + radius * 1.7, y + radius * 0.4]
            land.draw.ellipse(ring, outline=(225, 205, 170), width=max(4, int(radius * 0.14)))


PAINTERS: dict[str, Callable[[Landscape], None]] = {
    "sunset": paint_sunset,
    "night": paint_night,
    "sea": paint_sea,
    "mountains": paint_mountains,
    "meadow": paint_meadow,
    "desert": paint_desert,
    "snow": paint_snow,
    "forest": paint_forest,
    "city": paint_city,
    "space": paint_space,
}


def paint_backdrop(name: str, width: int, height: int, rng: Random) -> Image.Image:
    land = Landscape(width, height, rng)
    PAINTERS[name](land)
    return land.image
