"""What becomes of a caller's picture before ComfyUI sees it: pixels and nothing else, upright, within limits; masks from either form."""

from __future__ import annotations

import pytest
from PIL import Image, ImageChops, ImageDraw

from gateway.datasets.intake import Refused
from gateway.inputs.pictures import Made, Recipe, make
from tests.dataset_files import animation, draw, encode, orient, picture, png_of_size, png_with_text_bomb, reopen

PICTURE = Recipe("picture", 512 * 512, 16)
MASK = Recipe("mask", 512 * 512, 16)
OWN = Recipe("transparency", 512 * 512, 16)


def spot(size: tuple[int, int] = (256, 256)) -> Image.Image:
    """White where the left half is, in grey."""
    mask = Image.new("L", size, 0)
    ImageDraw.Draw(mask).rectangle((0, 0, size[0] // 2 - 1, size[1]), fill=255)
    return mask


def open_made(made: Made, mode: str) -> Image.Image:
    image = reopen(made.body)
    assert (image.format, image.mode, image.size) == ("PNG", mode, (made.width, made.height))
    assert not image.info
    return image


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_every_kind_becomes_a_plain_png(kind: str) -> None:
    made = make(picture(1, 200, 150, kind=kind, quality=95), "image", PICTURE)
    assert (made.width, made.height) == (192, 144)
    open_made(made, "RGB")


def test_pixels_stay_and_what_follows_or_describes_them_goes() -> None:
    body = encode(draw(2), "PNG", exif=orient(draw(2), 1)) + b"PK\x03\x04<script>"
    made = make(body, "image", PICTURE)
    assert ImageChops.difference(open_made(made, "RGB"), draw(2)).getbbox() is None
    assert not [word for word in (b"secret", b"script", b"eXIf") if word in made.body]


def test_a_phone_s_picture_is_turned() -> None:
    made = make(encode(draw(3, 320, 160), "JPEG", exif=orient(draw(3), 6)), "image", PICTURE)
    assert (made.width, made.height) == (160, 320)


def test_a_large_picture_is_scaled_and_both_sides_fit_the_multiple() -> None:
    made = make(picture(4, 3000, 1000), "image", PICTURE)
    assert (made.width, made.height) == (880, 288)
    assert make(picture(4, 3000, 1000), "image", Recipe("picture", None, 1)).width == 3000


def test_transparent_parts_of_a_picture_are_white() -> None:
    clear = Image.new("RGBA", (128, 128), (9, 9, 9, 0))
    assert open_made(make(encode(clear), "image", PICTURE), "RGB").getextrema() == ((255, 255),) * 3


def test_a_mask_is_its_brightness_or_its_transparency() -> None:
    wanted = spot()
    veiled = draw(5).convert("RGBA")
    veiled.putalpha(ImageChops.invert(wanted))
    opaque = wanted.convert("RGBA")
    for body, recipe in (
        (encode(wanted), MASK),
        (encode(wanted.convert("RGB")), MASK),
        (encode(opaque), MASK),
        (encode(veiled), MASK),
        (encode(veiled), OWN),
    ):
        assert ImageChops.difference(open_made(make(body, "mask", recipe), "L"), wanted).getbbox() is None
    again = make(make(encode(veiled), "mask", OWN).body, "mask", MASK)
    assert ImageChops.difference(open_made(again, "L"), wanted).getbbox() is None


def test_a_picture_and_its_mask_come_out_of_one_size() -> None:
    for size in ((1001, 777), (100, 900), (2048, 2048)):
        sizes = {
            (made.width, made.height) for made in (make(encode(draw(6, *size)), "image", PICTURE), make(encode(spot(size)), "mask", MASK))
        }
        assert len(sizes) == 1


def test_sixteen_bits_keep_their_levels() -> None:
    deep = Image.new("I;16", (128, 128), 40000)
    low, high = open_made(make(encode(deep), "mask", MASK), "L").getextrema()
    assert 150 <= int(low) <= int(high) <= 160  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("body", "recipe", "code"),
    [
        (b"", PICTURE, "not_a_picture"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", PICTURE, "not_a_picture"),
        (b"GIF89a" + bytes(100), PICTURE, "not_a_picture"),
        (picture(1)[:2000], PICTURE, "picture_broken"),
        (png_of_size(40_000, 40_000), PICTURE, "picture_too_large"),
        (png_of_size(8_001, 8_001), MASK, "picture_too_large"),
        (picture(1, 63, 500), PICTURE, "picture_too_small"),
        (picture(1, 70, 20_000), PICTURE, "picture_too_narrow"),
        (animation("WEBP"), PICTURE, "picture_animated"),
        (png_with_text_bomb(), PICTURE, "picture_broken"),
        (picture(1), OWN, "no_transparency"),
        (encode(draw(1).convert("RGBA")), OWN, "no_transparency"),
    ],
)
def test_what_is_refused(body: bytes, recipe: Recipe, code: str) -> None:
    with pytest.raises(Refused) as caught:
        make(body, "image", recipe)
    assert caught.value.problem.code == code
    assert "image" in caught.value.problem.message


def test_a_whole_picture_keeps_its_transparency() -> None:
    whole = Recipe("whole", None, 1)
    clear = Image.new("RGBA", (80, 64), (200, 100, 50, 40))
    assert open_made(make(encode(clear), "image", whole), "RGBA").getpixel((3, 3)) == (200, 100, 50, 40)
    open_made(make(picture(4, 80, 64), "image", whole), "RGB")
