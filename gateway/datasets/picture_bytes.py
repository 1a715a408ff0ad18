"""The outer structure of PNG and JPEG files, to take metadata out without touching a pixel. It decodes nothing.

Formats: PNG (Third Edition) chapter 5, ITU-T T.81 annex B.
"""

from __future__ import annotations

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_KEPT = (b"IHDR", b"IDAT", b"IEND")
# JFIF's and Adobe's own segments say how the colours are stored; all other application segments and comments are metadata.
_COLOUR_SEGMENTS = {0xE0: b"JFIF\0", 0xEE: b"Adobe"}
_APP0, _APP15, _COMMENT = 0xE0, 0xEF, 0xFE
_EOI, _SOS = 0xD9, 0xDA


def is_plain_png(body: bytes) -> bool:
    """Whether its pixels are 8-bit RGB. Bit depth and colour type are bytes 24 and 25 of the file."""
    return body[24:26] == b"\x08\x02"


def strip_png(body: bytes) -> bytes | None:
    """The file with its header, pixels and end alone; None when its structure is not a PNG's."""
    kept, position = [PNG_SIGNATURE], len(PNG_SIGNATURE)
    while position + 12 <= len(body):
        length, kind = int.from_bytes(body[position : position + 4], "big"), body[position + 4 : position + 8]
        end = position + 12 + length
        if kind in _PNG_KEPT:
            kept.append(body[position:end])
        if kind == b"IEND":
            return b"".join(kept)
        position = end
    return None


def strip_jpeg(body: bytes) -> bytes | None:
    """The file without metadata and without what follows its end; None when its structure is not a JPEG's."""
    kept, position = [body[:2]], 2
    while position + 4 <= len(body) and body[position] == 0xFF:
        marker = body[position + 1]
        if marker == 0xFF:  # a fill byte
            position += 1
            continue
        if marker == _EOI:
            kept.append(body[position : position + 2])
            return b"".join(kept)
        end = position + 2 + int.from_bytes(body[position + 2 : position + 4], "big")
        if marker == _SOS:
            end = _find_scan_end(body, end)
        if not _is_metadata(marker, body[position + 4 : position + 9]):
            kept.append(body[position:end])
        position = end
    if body[position : position + 2] == b"\xff\xd9":
        return b"".join([*kept, b"\xff\xd9"])
    return None


def _is_metadata(marker: int, start: bytes) -> bool:
    return marker == _COMMENT or (_APP0 <= marker <= _APP15 and _COLOUR_SEGMENTS.get(marker) != start)


def _find_scan_end(body: bytes, position: int) -> int:
    """Where the pixels that begin here end: at the next marker that is neither a stuffed zero nor a restart."""
    while (position := body.find(b"\xff", position)) >= 0 and position + 1 < len(body):
        following = body[position + 1]
        if following != 0 and not 0xD0 <= following <= 0xD7:
            return position
        position += 2
    return len(body)
