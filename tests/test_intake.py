"""Pictures, clips and captions from strangers: what is kept byte for byte, what is made anew, and what is refused with which remedy."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms

from gateway.datasets.intake import MAX_CAPTION_BYTES, Refused, clean_caption, read_caption, read_picture, read_video, require_short
from gateway.datasets.likeness import fingerprint, is_alike
from gateway.datasets.picture_bytes import strip_jpeg, strip_png
from tests.dataset_files import (
    MP4,
    animation,
    chunk,
    draw,
    encode,
    orient,
    picture,
    png_of_size,
    png_with_text_bomb,
    reopen,
    veil,
)

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
# A profile whose red and blue are not sRGB's: Lab's own, which RGB pictures cannot have.
LAB = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()


def pixels(body: bytes) -> bytes:
    return reopen(body).convert("RGB").tobytes()


def refusal(body: bytes, name: str = "a.png") -> Refused:
    with pytest.raises(Refused) as caught:
        read_picture(body, name)
    problem = caught.value.problem
    assert problem.severity == "error"
    assert problem.files == (name,)
    assert name in problem.message
    assert problem.remedy.endswith(".")
    return caught.value


# -- what is taken -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_clean_picture_is_kept_byte_for_byte(kind: str) -> None:
    body = picture(1, 320, 200, kind)
    media = read_picture(body, "anything.gif")
    assert (media.body, media.kind, media.width, media.height) == (body, kind.lower(), 320, 200)
    assert media.problems == ()


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        pytest.param(picture(1, kind="JPEG", exif=orient(draw(1), 1), comment=b"a secret place", icc_profile=SRGB), "jpeg", id="jpeg"),
        pytest.param(picture(1, exif=orient(draw(1), 1), icc_profile=SRGB), "png", id="png"),
        pytest.param(picture(1)[:33] + chunk(b"tEXt", b"prompt\0a secret place") + picture(1)[33:], "png", id="png text"),
    ],
)
def test_metadata_goes_and_no_pixel_changes(body: bytes, kind: str) -> None:
    media = read_picture(body, "a")
    assert b"secret" in body or b"Exif" in body
    assert media.kind == kind
    assert len(media.body) < len(body)
    assert b"secret" not in media.body
    assert pixels(media.body) == pixels(body)
    assert not {"exif", "icc_profile", "comment"} & reopen(media.body).info.keys()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_what_follows_the_end_of_a_picture_is_left_behind(kind: str) -> None:
    body = picture(1, kind=kind)
    assert read_picture(body + b"PK\x03\x04 a zip in its tail", "a").body == body


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("orientation", [2, 3, 6, 8])
def test_a_turned_picture_is_set_upright(kind: str, orientation: int) -> None:
    flat = draw(1, 200, 100)
    media = read_picture(encode(flat, kind, exif=orient(flat, orientation)), "a")
    stored = reopen(media.body)
    assert stored.size == (media.width, media.height) == ((100, 200) if orientation in (6, 8) else (200, 100))
    assert stored.getexif().get(0x0112) is None
    turned = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        6: Image.Transpose.ROTATE_270,
        8: Image.Transpose.ROTATE_90,
    }
    assert is_alike(fingerprint(stored), fingerprint(flat.transpose(turned[orientation])))
    assert not is_alike(fingerprint(stored), fingerprint(flat))


@pytest.mark.parametrize(
    ("image", "kind"),
    [
        (draw(1, mode="L"), "PNG"),
        (draw(1, mode="1"), "PNG"),
        (draw(1, mode="P"), "PNG"),
        (draw(1, mode="LA"), "PNG"),
        (veil(draw(1)), "PNG"),
        (veil(draw(1)), "WEBP"),
        (draw(1, mode="L"), "JPEG"),
        (draw(1, mode="CMYK"), "JPEG"),
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else value,
)
def test_every_kind_of_pixels_becomes_rgb(image: Image.Image, kind: str) -> None:
    media = read_picture(encode(image, kind), "a")
    stored = reopen(media.body)
    assert stored.mode == "RGB"
    assert media.kind == ("jpeg" if kind == "JPEG" else "png")
    assert is_alike(fingerprint(stored), fingerprint(image.convert("RGB")))


def test_sixteen_bits_are_scaled_and_not_cut_off() -> None:
    ramp = Image.new("I;16", (256, 64))
    ramp.putdata([column * 257 for _ in range(64) for column in range(256)])
    stored = reopen(read_picture(encode(ramp), "a").body)
    assert [stored.getpixel((column, 5)) for column in (0, 128, 255)] == [(0, 0, 0), (128, 128, 128), (255, 255, 255)]


def test_clear_parts_become_white() -> None:
    clear = Image.new("RGBA", (64, 64), (255, 0, 0, 0))
    clear.paste((0, 0, 255, 255), (0, 0, 32, 64))
    palette = clear.convert("RGB").quantize(4)
    palette.info["transparency"] = palette.getpixel((50, 5))
    for image in (clear, palette):
        stored = reopen(read_picture(encode(image), "a").body)
        assert [stored.getpixel(place) for place in ((5, 5), (50, 5))] == [(0, 0, 255), (255, 255, 255)]


def test_a_profile_that_does_not_fit_is_dropped_and_said() -> None:
    media = read_picture(picture(1, icc_profile=LAB), "a.png")
    assert [problem.code for problem in media.problems] == ["colour_profile_dropped"]
    assert media.problems[0].severity == "warning"
    assert pixels(media.body) == draw(1).tobytes()


def test_a_profile_that_fits_is_applied() -> None:
    wide = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
    renamed = bytearray(wide.tobytes())
    # The same profile under a name that does not say sRGB, so that it is really run.
    for text in (b"sRGB", "sRGB".encode("utf-16-be")):
        renamed = bytearray(bytes(renamed).replace(text, text.replace(b"s", b"X").replace(b"R", b"X")))
    body = picture(1, kind="JPEG", icc_profile=bytes(renamed), quality=95)
    media = read_picture(body, "a")
    assert media.body != body
    assert b"ICC_PROFILE" not in media.body
    assert media.problems == ()
    assert is_alike(fingerprint(reopen(media.body)), fingerprint(draw(1)))


def test_a_phones_picture_of_several_keeps_the_first() -> None:
    body = encode(draw(1), "MPO", save_all=True, append_images=[draw(2)])
    assert reopen(body).format == "MPO"
    stored = reopen(read_picture(body, "a").body)
    assert stored.format == "JPEG"
    assert is_alike(fingerprint(stored), fingerprint(draw(1)))


# -- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "code", "said"),
    [
        pytest.param(b"", "not_a_picture", "no picture", id="nothing"),
        pytest.param(b"hello", "not_a_picture", "no picture", id="text"),
        pytest.param(encode(draw(1), "GIF"), "not_a_picture", "GIF", id="gif"),
        pytest.param(encode(draw(1), "BMP"), "not_a_picture", "BMP", id="bmp"),
        pytest.param(encode(draw(1), "TIFF"), "not_a_picture", "TIFF", id="tiff"),
        pytest.param(b"\x00\x00\x00\x18ftypheic" + bytes(50), "not_a_picture", "HEIC", id="heic"),
        pytest.param(MP4, "not_a_picture", "MP4", id="video"),
        pytest.param(animation("PNG"), "picture_animated", "2 frames", id="apng"),
        pytest.param(animation("WEBP"), "picture_animated", "2 frames", id="webp animation"),
        pytest.param(picture(1, 63, 400), "picture_too_small", "63x400", id="narrow"),
        pytest.param(png_of_size(9000, 9000), "picture_too_large", "9000x9000", id="81 megapixels"),
        pytest.param(png_of_size(10_000, 10_000), "picture_too_large", "64 megapixels", id="Pillow warns"),
        pytest.param(png_of_size(60_000, 60_000), "picture_too_large", "64 megapixels", id="Pillow refuses"),
        pytest.param(png_of_size(800, 800), "picture_broken", "cannot be read", id="pixels missing"),
        pytest.param(png_with_text_bomb(), "picture_broken", "cannot be read", id="comment bomb"),
    ],
)
def test_what_cannot_be_used_is_refused(body: bytes, code: str, said: str) -> None:
    refused = refusal(body)
    assert refused.problem.code == code
    assert said in refused.problem.message


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.95])
def test_a_picture_that_was_cut_off_is_refused(kind: str, share: float) -> None:
    body = picture(1, 512, 512, kind)
    assert refusal(body[: int(len(body) * share)]).problem.code in ("picture_broken", "not_a_picture")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_damage_is_refused_or_harmless(kind: str) -> None:
    """Whatever a few wrong bytes do, the answer is a picture that opens or a refusal, never another exception."""
    body, dice, outcomes = picture(1, 96, 96, kind), random.Random(7), set[str]()
    for _ in range(150):
        damaged = bytearray(body)
        for _ in range(dice.randint(1, 4)):
            damaged[dice.randrange(len(body))] = dice.randrange(256)
        try:
            media = read_picture(bytes(damaged), "a")
        except Refused as refused:
            outcomes.add(refused.problem.code)
        else:
            stored = reopen(media.body)
            assert (stored.mode, stored.size) == ("RGB", (media.width, media.height))
    assert "picture_broken" in outcomes


@given(st.binary(max_size=300), st.sampled_from(["PNG", "JPEG"]))
def test_walking_a_file_ends_whatever_follows_its_signature(tail: bytes, kind: str) -> None:
    start = picture(1, 64, 64, kind)[:40]
    for strip in (strip_png, strip_jpeg):
        stripped = strip(start + tail)
        assert stripped is None or len(stripped) <= len(start + tail)


# -- clips and captions --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("body", [b"", picture(1), b"\x00\x00\x00\x14ftypqt  " + bytes(50), b"\x00\x00\x00\x18ftypheic" + bytes(50)])
def test_what_is_no_clip_is_refused(body: bytes) -> None:
    with pytest.raises(Refused) as caught:
        read_video(body, "clip.mp4")
    assert caught.value.problem.code == "video_unsupported"


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b"a red cup", "a red cup"),
        (b"\xef\xbb\xbfa red cup\r\n", "a red cup"),
        ("  l'été\u00a0 à  Étretat\n\n".encode(), "l'été à Étretat"),
        (b"a\x00 red\x1b cup", "a red cup"),
        (b"", ""),
        (b" \n\r\n\t", ""),
    ],
)
def test_a_caption_is_one_line_of_text(body: bytes, text: str) -> None:
    caption = read_caption(body, "a.txt")
    assert (caption.text, caption.problems) == (text, ())


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r", "\u2028", "\n\n"])
def test_lines_are_joined_and_said(newline: str) -> None:
    caption = clean_caption(f"a red cup{newline}on a table", "a.txt")
    assert caption.text == "a red cup on a table"
    assert [problem.code for problem in caption.problems] == ["caption_lines_joined"]


@pytest.mark.parametrize("body", ["été".encode("latin-1"), "a cup".encode("utf-16"), b"\xff\xfe\x00"])
def test_a_caption_that_is_no_text_is_refused(body: bytes) -> None:
    with pytest.raises(Refused) as caught:
        read_caption(body, "a.txt")
    assert caught.value.problem.code == "caption_not_text"
    assert "UTF-8" in caught.value.problem.remedy


def test_a_long_caption_is_refused_before_it_is_read() -> None:
    require_short(MAX_CAPTION_BYTES, "a.txt")
    with pytest.raises(Refused) as caught:
        require_short(MAX_CAPTION_BYTES + 1, "a.txt")
    assert caught.value.problem.code == "caption_too_long"


# -- likeness ------------------------------------------------------------------------------------------------------


def test_copies_are_alike_and_others_are_not() -> None:
    prints = [fingerprint(draw(seed)) for seed in range(30)]
    assert not [(one, two) for one in range(30) for two in range(one) if is_alike(prints[one], prints[two])]
    for copy in (
        reopen(picture(3, kind="JPEG", quality=30)),
        draw(3).resize((100, 100)),
        draw(3).point(lambda value: min(255, value + 6)),
    ):
        assert is_alike(fingerprint(copy.convert("RGB")), prints[3])


def test_flat_pictures_of_different_colours_are_not_alike() -> None:
    red, blue = (fingerprint(Image.new("RGB", (64, 64), colour)) for colour in ("red", "blue"))
    assert red[:16] == blue[:16]
    assert not is_alike(red, blue)
