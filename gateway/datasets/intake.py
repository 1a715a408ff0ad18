"""One file's bytes in, a checked and normalised picture, clip or caption out, or the reason why not.

It trusts content and no name, and refuses to know where bytes come from or go to.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

from PIL import Image, ImageCms, ImageOps

from gateway.datasets.clips import MP4_CODECS, WEBM_CODECS, BrokenClip, read_mp4, read_webm
from gateway.datasets.likeness import fingerprint
from gateway.datasets.picture_bytes import is_plain_png, strip_jpeg, strip_png
from gateway.datasets.records import Caption, Problem, error, warning

T = TypeVar("T")

MIN_EDGE_PX = 64  # Flux aligns its buckets to 64
MAX_PIXELS = 64_000_000
MAX_CLIP_PIXELS = 9_000_000  # 4K
MAX_PICTURE_BYTES = 64 << 20
MAX_VIDEO_BYTES = 128 << 20
MAX_CAPTION_BYTES = 16 << 10
MAX_PROFILE_BYTES = 4 << 20
JPEG_QUALITY = 95

CONTENT_TYPES = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp", "mp4": "video/mp4", "webm": "video/webm"}
FOREIGN_SIGNATURES = {
    b"GIF8": "GIF",
    b"BM": "BMP",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"%PDF": "PDF",
    b"PK\3\4": "ZIP",
    b"8BPS": "Photoshop",
}
FTYP_BRANDS = {b"heic": "HEIC", b"heix": "HEIC", b"mif1": "HEIC", b"avif": "AVIF", b"avis": "AVIF"}


class Refused(Exception):
    """A file that cannot be taken. Carries the problem that says so."""

    def __init__(self, code: str, name: str, message: str, remedy: str) -> None:
        super().__init__(message)
        self.problem = error(code, (name,), message, remedy)


@dataclass(frozen=True, slots=True)
class Media:
    """What is to be stored. `body` is the upload itself where nothing had to change; phash is a picture's, frames and duration a clip's."""

    body: bytes = field(repr=False)
    kind: str  # a key of CONTENT_TYPES
    sha256: str
    width: int | None = None
    height: int | None = None
    phash: str | None = None
    frames: int | None = None
    duration_s: float | None = None
    problems: tuple[Problem, ...] = ()


class _Pixels(NamedTuple):
    image: Image.Image
    is_changed: bool  # the stored bytes must be written anew
    problems: tuple[Problem, ...]


def sniff(head: bytes) -> str | None:
    """A key of CONTENT_TYPES by a file's first bytes, None for everything else."""
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if head.startswith(b"\xff\xd8\xff"):
        return "jpeg"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "webp"
    if head.startswith(b"\x1a\x45\xdf\xa3") and b"webm" in head[:64]:
        return "webm"
    if head[4:8] == b"ftyp" and head[8:12] not in FTYP_BRANDS and head[8:12] != b"qt  ":
        return "mp4"
    return None


def name_foreign(head: bytes) -> str:
    """What a file that is not taken seems to be, for the message."""
    if head[4:8] == b"ftyp":
        return FTYP_BRANDS.get(head[8:12], "QuickTime")
    return next((name for start, name in FOREIGN_SIGNATURES.items() if head.startswith(start)), "no picture")


def read_video(body: bytes, name: str) -> Media:
    """A clip, as it is: its container is read, no picture in it is decoded. Raises Refused."""
    kind = sniff(body[:64])
    if kind not in ("mp4", "webm"):
        raise Refused("video_unsupported", name, f"{name} is {name_foreign(body)}, not an MP4 or WebM.", "Convert it to MP4 or WebM.")
    try:
        clip = read_mp4(body) if kind == "mp4" else read_webm(body)
    except BrokenClip as fault:
        raise Refused("clip_broken", name, f"{name} cannot be read: {fault}.", "Save or export it again.") from fault
    codecs = sorted({*MP4_CODECS.values(), *WEBM_CODECS.values()})
    if clip.codec not in codecs:
        raise Refused("clip_codec", name, f"{name} holds {clip.codec!r}; {', '.join(codecs)} are taken.", "Convert it to H.264.")
    if min(clip.width, clip.height) < MIN_EDGE_PX or clip.width * clip.height > MAX_CLIP_PIXELS:
        remedy = (
            f"Use {MIN_EDGE_PX} pixels or more each way, and at most {MAX_CLIP_PIXELS / 1e6:.0f} megapixels; trainings use less than one."
        )
        raise Refused("clip_size", name, f"{name} has {clip.width}x{clip.height} pixels.", remedy)
    digest = hashlib.sha256(body).hexdigest()
    return Media(body, kind, digest, clip.width, clip.height, frames=clip.frames, duration_s=clip.duration_s)


def read_picture(body: bytes, name: str) -> Media:
    """A still picture, upright, RGB, sRGB and without metadata; byte for byte the upload's pixels where they are that already.

    Raises Refused.
    """
    # The plugin says MPO for a JPEG with further pictures behind the first, as phones write them.
    return decode(body, name, lambda image, kind: encode(normalise(image, name), body, kind if image.format != "MPO" else "mpo", name))


def decode(body: bytes, name: str, use: Callable[[Image.Image, str], T]) -> T:
    """What `use` makes of a still picture and its kind. Raises Refused, also for all that comes to light while its pixels are read."""
    kind = sniff(body[:64])
    if kind not in ("png", "jpeg", "webp"):
        seems = name_foreign(body[:64]) if kind is None else kind.upper()
        remedy = "Convert it to PNG, JPEG or WebP, or leave it out. A new name alone changes nothing: content decides."
        raise Refused("not_a_picture", name, f"{name} is {seems}; PNG, JPEG and WebP are taken.", remedy)
    try:
        with Image.open(io.BytesIO(body), formats=[kind.upper()]) as image:
            check_size(image, name)
            check_stillness(image, name)
            return use(image, kind)
    except Refused:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise too_large(name, "far more than") from None
    except Exception as fault:  # boundary: a decoder may raise anything on a stranger's bytes
        reason = str(fault) or type(fault).__name__
        remedy = "Save or download it again; it may be cut off or damaged."
        raise Refused("picture_broken", name, f"{name} cannot be read to its end: {reason[:200]}.", remedy) from fault


def too_large(name: str, size: str) -> Refused:
    remedy = f"Scale it down to {MAX_PIXELS / 1e6:.0f} megapixels or less; trainings use about one."
    return Refused("picture_too_large", name, f"{name} has {size} {MAX_PIXELS / 1e6:.0f} megapixels.", remedy)


def check_size(image: Image.Image, name: str) -> None:
    """By the header alone, before a pixel is decoded."""
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise too_large(name, f"{width}x{height} pixels, more than")
    if min(width, height) < MIN_EDGE_PX:
        remedy = f"Use a picture of at least {MIN_EDGE_PX} pixels each way."
        raise Refused("picture_too_small", name, f"{name} has {width}x{height} pixels.", remedy)


def check_stillness(image: Image.Image, name: str) -> None:
    if image.format != "MPO" and getattr(image, "is_animated", False):
        frames = getattr(image, "n_frames", 2)
        raise Refused(
            "picture_animated", name, f"{name} is an animation of {frames} frames.", "Save the frame you want as a still picture."
        )


def normalise(image: Image.Image, name: str) -> _Pixels:
    """Upright RGB in sRGB. Transparent parts become white."""
    profile = image.info.get("icc_profile")
    image.load()
    is_changed = image.mode != "RGB" or image.has_transparency_data or image.getexif().get(0x0112, 1) != 1
    upright = set_upright(image)
    if upright.has_transparency_data:
        clear = upright.convert("RGBA")
        upright = Image.new("RGB", clear.size, "white")
        upright.paste(clear, mask=clear.getchannel("A"))
    if isinstance(profile, bytes) and profile:
        return apply_profile(upright, profile, name, is_changed)
    return _Pixels(upright if upright.mode == "RGB" else upright.convert("RGB"), is_changed, ())


def set_upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF says, with at most 8 bits a channel."""
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I"):
        # 16 bits a pixel: Pillow's own conversion clips at 255 instead of scaling.
        upright = upright.convert("I").point(lambda value: value * (1 / 256)).convert("L")
    return upright


def apply_profile(image: Image.Image, profile: bytes, name: str, is_changed: bool) -> _Pixels:
    """The colours the profile means, as sRGB. A profile that cannot be used is dropped, and that is said."""
    plain = image if image.mode == "RGB" else image.convert("RGB")
    if image.mode not in ("RGB", "CMYK"):
        return _Pixels(plain, True, ())
    try:
        if len(profile) > MAX_PROFILE_BYTES:
            raise ValueError("it is too large")
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if image.mode == "RGB" and ImageCms.getProfileDescription(source).strip().startswith("sRGB"):
            return _Pixels(plain, is_changed, ())
        converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
        assert converted is not None, "only a conversion in place answers None"
        return _Pixels(converted, True, ())
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError) as fault:
        message = f"The colour profile in {name} cannot be used ({str(fault)[:100]}); its colours were taken as sRGB."
        said = warning("colour_profile_dropped", (name,), message, "If its colours look wrong, convert it to sRGB and upload it again.")
        return _Pixels(plain, is_changed, (said,))


def encode(pixels: _Pixels, body: bytes, kind: str, name: str) -> Media:
    """The stored form: the original without its metadata where its pixels stand, else JPEG for a JPEG and PNG for the others."""
    stored: bytes | None = None
    if not pixels.is_changed:
        if kind == "png" and is_plain_png(body):
            stored = strip_png(body)
        elif kind == "jpeg":
            stored = strip_jpeg(body)
        elif kind == "webp" and body[12:16] != b"VP8X":
            # The simple forms have no room for metadata, but a file may go on behind them.
            stored = body[: 8 + int.from_bytes(body[4:8], "little")]
    if stored is None:
        kind, stored = write(pixels.image, "jpeg" if kind in ("jpeg", "mpo") else "png")
    width, height = pixels.image.size
    digest = hashlib.sha256(stored).hexdigest()
    return Media(stored, kind, digest, width, height, fingerprint(pixels.image), problems=pixels.problems)


def write(image: Image.Image, kind: str) -> tuple[str, bytes]:
    """(kind, bytes)"""
    target = io.BytesIO()
    # Pillow writes comments, profiles and transparency that it finds here.
    image.info = {}
    if kind == "jpeg":
        image.save(target, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    else:
        # Level 1 is several times as fast as the default and some 10 % larger.
        image.save(target, "PNG", compress_level=1)
    return kind, target.getvalue()


def require_short(size_bytes: int, name: str) -> None:
    """Raises Refused for a caption longer than any text encoder reads; to be asked before it is read."""
    if size_bytes > MAX_CAPTION_BYTES:
        message = f"{name} has {size_bytes} bytes; at most {MAX_CAPTION_BYTES} are allowed."
        raise Refused("caption_too_long", name, message, "Shorten it: Flux reads 512 tokens, some 2000 letters.")


def read_caption(body: bytes, name: str) -> Caption:
    """A caption file's text as one line. Raises Refused for what is no UTF-8."""
    try:
        text = body.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise Refused("caption_not_text", name, f"{name} is not UTF-8 text.", "Save it as UTF-8.") from None
    return clean_caption(text, name)


def clean_caption(text: str, name: str) -> Caption:
    """One line: a trainer takes each line for a caption of its own."""
    lines = [line for line in (" ".join(_printable(line).split()) for line in text.splitlines()) if line]
    if len(lines) <= 1:
        return Caption(text="".join(lines))
    message = f"The {len(lines)} lines of {name} were joined to one: a trainer would take each for a caption of its own."
    said = warning("caption_lines_joined", (name,), message, "Nothing need be done if that reads well; else write it as one line.")
    return Caption(text=" ".join(lines), problems=(said,))


def _printable(line: str) -> str:
    return "".join(letter if letter.isprintable() or letter.isspace() else "" for letter in line)
