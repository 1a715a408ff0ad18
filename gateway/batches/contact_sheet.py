"""Many pictures on one: each in small with a line of text, in rows. Pure; it gets bytes and gives a JPEG."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

CELL_PX, LABEL_PX, GAP_PX, MARGIN_PX = 160, 18, 8, 16
QUALITY = 85
PAPER, EMPTY, INK, FAINT = (250, 250, 250), (225, 225, 225), (40, 40, 40), (120, 120, 120)


class Cell(NamedTuple):
    """A picture in small, or a word in its stead, and what is written below."""

    picture: Image.Image | None
    word: str
    label: str


def shrink(body: bytes) -> Image.Image | None:
    """The picture at the size of a cell, on the paper's colour where it is transparent; None when it is none."""
    try:
        with Image.open(io.BytesIO(body)) as image:
            # A JPEG is then decoded at a fraction of its size.
            image.draft("RGB", (CELL_PX * 2, CELL_PX * 2))
            image.thumbnail((CELL_PX, CELL_PX))
            small = image.convert("RGBA")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None
    ground = Image.new("RGB", small.size, PAPER)
    ground.paste(small, mask=small)
    return ground


def draw_sheet(title: str, cells: Sequence[Cell], columns: int) -> bytes:
    """The sheet as a JPEG."""
    font = ImageFont.load_default(size=12)
    rows = -(-len(cells) // columns)
    width = 2 * MARGIN_PX + columns * (CELL_PX + GAP_PX) - GAP_PX
    head = MARGIN_PX + LABEL_PX + GAP_PX
    sheet = Image.new("RGB", (width, head + rows * (CELL_PX + LABEL_PX + GAP_PX) + MARGIN_PX - GAP_PX), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN_PX, MARGIN_PX), _fit(draw, title, width - 2 * MARGIN_PX, font), INK, font)
    for place, cell in enumerate(cells):
        left = MARGIN_PX + place % columns * (CELL_PX + GAP_PX)
        top = head + place // columns * (CELL_PX + LABEL_PX + GAP_PX)
        if cell.picture is None:
            draw.rectangle((left, top, left + CELL_PX - 1, top + CELL_PX - 1), EMPTY)
            draw.text((left + CELL_PX // 2, top + CELL_PX // 2), cell.word, FAINT, font, anchor="mm")
        else:
            sheet.paste(cell.picture, (left + (CELL_PX - cell.picture.width) // 2, top + (CELL_PX - cell.picture.height) // 2))
        draw.text((left, top + CELL_PX + 2), _fit(draw, cell.label, CELL_PX, font), INK, font)
    target = io.BytesIO()
    sheet.save(target, "JPEG", quality=QUALITY)
    return target.getvalue()


def _fit(draw: ImageDraw.ImageDraw, text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """As much of one line as there is room for."""
    line = " ".join(text.split())[:400]
    if draw.textlength(line, font) <= width:
        return line
    while line and draw.textlength(f"{line}…", font) > width:
        line = line[:-1]
    return f"{line}…"
