"""Pictures and zips for dataset tests, honest and hostile. All are small, and the same at every run."""

from __future__ import annotations

import io
import random
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

from PIL import Image

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
CLIPS = Path(__file__).parent / "clips"
MP4, WEBM = ((CLIPS / name).read_bytes() for name in ("h264-17.mp4", "vp9-17.webm"))


def draw(seed: int, width: int = 256, height: int = 256, mode: str = "RGB") -> Image.Image:
    """A soft random picture: no two seeds look alike, and each survives JPEG."""
    rough = Image.frombytes("RGB", (6, 6), random.Random(seed).randbytes(108))
    return rough.resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def veil(image: Image.Image) -> Image.Image:
    """The same with a clear corner, so that its transparency counts."""
    veiled = image.convert("RGBA")
    veiled.putpixel((0, 0), (0, 0, 0, 0))
    return veiled


def encode(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    target = io.BytesIO()
    image.save(target, kind, **options)
    return target.getvalue()


def picture(seed: int, width: int = 256, height: int = 256, kind: str = "PNG", **options: Any) -> bytes:
    return encode(draw(seed, width, height), kind, **options)


def reopen(body: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(body))
    image.load()
    return image


def animation(kind: str) -> bytes:
    return encode(draw(1), kind, save_all=True, append_images=[draw(2)])


def orient(image: Image.Image, orientation: int) -> Image.Exif:
    """EXIF that says how a picture is to be turned, and who took it."""
    exif = image.getexif()
    exif[0x0112] = orientation
    exif[0x010E] = "a secret place"
    return exif


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_of_size(width: int, height: int) -> bytes:
    """A PNG whose header promises this size; its pixels are a few zeros."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return PNG_SIGNATURE + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(3000))) + chunk(b"IEND", b"")


def png_with_text_bomb() -> bytes:
    """80 kB that unpack to 80 MB of comment."""
    plain = picture(1)
    return plain[:33] + chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(80 << 20), 9)) + plain[33:]


def zip_of(files: dict[str, bytes], **options: Any) -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, **options) as archive:
        for name, body in files.items():
            # Not by name: ZipInfo cleans names as it is made, and these are to stay as they are.
            info = zipfile.ZipInfo("x")
            info.filename, info.compress_type = name, zipfile.ZIP_DEFLATED
            archive.writestr(info, body)
    return target.getvalue()


def zip_with_mode(name: str, body: bytes, mode: int) -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        info = zipfile.ZipInfo(name)
        info.external_attr = mode << 16
        archive.writestr(info, body)
    return target.getvalue()


def set_flag(archive: bytes, bit: int) -> bytes:
    """The same zip with a general purpose flag set in both headers of its first entry."""
    changed = bytearray(archive)
    central = changed.index(b"PK\x01\x02")
    changed[6] |= bit
    changed[central + 8] |= bit
    return bytes(changed)


def lie_about_size(archive: bytes, size: int) -> bytes:
    """The same zip, whose first entry says that it unpacks to this many bytes."""
    changed = bytearray(archive)
    central = changed.index(b"PK\x01\x02")
    changed[22:26] = changed[central + 24 : central + 28] = struct.pack("<I", size)
    return bytes(changed)
