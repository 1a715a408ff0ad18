"""What a clip's container says of it: size, codec, frames, duration. Nothing is decoded, so a broken picture inside is not seen.

MP4 (ISO 14496-12) and WebM (Matroska) are walked by hand: the only readers of both are whole media libraries.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

MOST_PARTS = 20_000
# What FFmpeg, and with it SimpleTuner, reads everywhere.
MP4_CODECS = {"avc1": "h264", "avc3": "h264", "hvc1": "hevc", "hev1": "hevc", "vp08": "vp8", "vp09": "vp9", "av01": "av1", "mp4v": "mpeg4"}
WEBM_CODECS = {"V_VP8": "vp8", "V_VP9": "vp9", "V_AV1": "av1"}
SEGMENT, CLUSTER, INFO, TRACKS, TRACK, VIDEO = 0x18538067, 0x1F43B675, 0x1549A966, 0x1654AE6B, 0xAE, 0xE0
SCALE, DURATION, TRACK_TYPE, CODEC, FRAME_NS, WIDTH, HEIGHT = 0x2AD7B1, 0x4489, 0x83, 0x86, 0x23E383, 0xB0, 0xBA
IS_VIDEO = 1


class BrokenClip(Exception):
    """The container cannot be read to where it says what is in it. The message says why."""


@dataclass(frozen=True)
class Clip:
    """`frames` and `duration_s` are None where the container does not say."""

    width: int
    height: int
    codec: str
    frames: int | None
    duration_s: float | None


class _Part(NamedTuple):
    """A box or an element: where its content lies."""

    name: str | int
    begin: int
    end: int


class _Reader:
    """Bounded looks into the bytes; every way to read beyond the end is a BrokenClip."""

    def __init__(self, body: bytes) -> None:
        self.body = body
        self._parts = 0

    def number(self, place: int, size: int, end: int | None = None) -> int:
        if place + size > (len(self.body) if end is None else end):
            raise BrokenClip("it ends too early")
        return int.from_bytes(self.body[place : place + size])

    def count(self) -> None:
        self._parts += 1
        if self._parts > MOST_PARTS:
            raise BrokenClip(f"it has more than {MOST_PARTS} parts")

    def boxes(self, begin: int, end: int) -> Iterator[_Part]:
        """MP4: a length, a name of four letters, the content."""
        while begin + 8 <= end:
            self.count()
            size, head = self.number(begin, 4), 8
            if size == 1:
                size, head = self.number(begin + 8, 8), 16
            stop = begin + size if size else end
            if stop > end or stop < begin + head:
                raise BrokenClip("a part of it is cut off")
            yield _Part(self.body[begin + 4 : begin + 8].decode("latin-1"), begin + head, stop)
            begin = stop

    def box(self, parent: _Part, *names: str) -> _Part | None:
        """The first of this path beneath `parent`."""
        for name in names:
            found = next((part for part in self.boxes(parent.begin, parent.end) if part.name == name), None)
            if found is None:
                return None
            parent = found
        return parent

    def elements(self, begin: int, end: int) -> Iterator[_Part]:
        """Matroska: an id and a length whose own lengths stand in their first bits."""
        while begin < end:
            self.count()
            name, begin = self._vint(begin, end, keep_marker=True)
            size, begin = self._vint(begin, end, keep_marker=False)
            # What is written while it is recorded leaves the length of its last parts open.
            stop = end if size is None else begin + size
            if stop > end:
                raise BrokenClip("a part of it is cut off")
            yield _Part(name or 0, begin, stop)
            begin = stop

    def _vint(self, place: int, end: int, *, keep_marker: bool) -> tuple[int | None, int]:
        length = 9 - self.number(place, 1, end).bit_length()
        if length > 8:
            raise BrokenClip("a length in it cannot be read")
        value = self.number(place, length, end)
        if keep_marker:
            return value, place + length
        plain = value & ((1 << 7 * length) - 1)
        return (None if plain == (1 << 7 * length) - 1 else plain), place + length

    def element(self, parent: _Part, name: int) -> _Part | None:
        return next((part for part in self.elements(parent.begin, parent.end) if part.name == name), None)

    def value(self, parent: _Part, name: int) -> int | None:
        found = self.element(parent, name)
        return self.number(found.begin, min(8, found.end - found.begin)) if found else None


def read_mp4(body: bytes) -> Clip:
    """Raises BrokenClip."""
    reader = _Reader(body)
    whole = _Part("", 0, len(body))
    movie = {part.name: part for part in reader.boxes(0, len(body))}.get("moov")
    if movie is None:
        raise BrokenClip("its index (moov) is missing; it was cut off or never closed")
    for track in [part for part in reader.boxes(movie.begin, movie.end) if part.name == "trak"]:
        handler = reader.box(track, "mdia", "hdlr")
        if handler and body[handler.begin + 8 : handler.begin + 12] == b"vide":
            return _read_mp4_track(reader, whole, track)
    raise BrokenClip("it has no video track")


def _read_mp4_track(reader: _Reader, whole: _Part, track: _Part) -> Clip:
    header, table = reader.box(track, "mdia", "mdhd"), reader.box(track, "mdia", "minf", "stbl")
    kinds = reader.box(table, "stsd") if table else None
    times = reader.box(table, "stts") if table else None
    entry = next(reader.boxes(kinds.begin + 8, kinds.end), None) if kinds else None
    if header is None or entry is None or times is None:
        raise BrokenClip("its index does not say what the video track is")
    is_long = reader.number(header.begin, 1) == 1
    scale = reader.number(header.begin + (20 if is_long else 12), 4)
    length = reader.number(header.begin + (24 if is_long else 16), 8 if is_long else 4)
    count = reader.number(times.begin + 4, 4)
    if count * 8 > times.end - times.begin - 8:
        raise BrokenClip("its table of frames is cut off")
    frames = sum(reader.number(times.begin + 8 + 8 * row, 4) for row in range(min(count, MOST_PARTS)))
    codec = MP4_CODECS.get(str(entry.name), str(entry.name))
    width, height = reader.number(entry.begin + 24, 2), reader.number(entry.begin + 26, 2)
    # Of a fragmented file the table is empty: its frames are told piece by piece.
    return Clip(width, height, codec, frames or None, round(length / scale, 3) if scale and length else None)


def read_webm(body: bytes) -> Clip:
    """Raises BrokenClip."""
    reader = _Reader(body)
    segment = reader.element(_Part("", 0, len(body)), SEGMENT)
    if segment is None:
        raise BrokenClip("it has no segment")
    info: _Part | None = None
    for part in reader.elements(segment.begin, segment.end):
        if part.name == INFO:
            info = part
        if part.name == CLUSTER:
            break
        if part.name == TRACKS:
            for track in reader.elements(part.begin, part.end):
                if track.name == TRACK and reader.value(track, TRACK_TYPE) == IS_VIDEO:
                    return _read_webm_track(reader, info, track)
    raise BrokenClip("it has no video track")


def _read_webm_track(reader: _Reader, info: _Part | None, track: _Part) -> Clip:
    video, codec = reader.element(track, VIDEO), reader.element(track, CODEC)
    if video is None or codec is None:
        raise BrokenClip("it does not say what the video track is")
    name = reader.body[codec.begin : min(codec.end, codec.begin + 32)].decode("latin-1").rstrip("\0")
    length = reader.element(info, DURATION) if info else None
    scale_ns = (reader.value(info, SCALE) if info else None) or 1_000_000
    duration_s = _read_float(reader.body[length.begin : length.end]) * scale_ns / 1e9 if length else None
    frame_ns = reader.value(track, FRAME_NS)
    return Clip(
        reader.value(video, WIDTH) or 0,
        reader.value(video, HEIGHT) or 0,
        WEBM_CODECS.get(name, name),
        round(duration_s * 1e9 / frame_ns) if duration_s and frame_ns else None,
        round(duration_s, 3) if duration_s is not None else None,
    )


def _read_float(raw: bytes) -> float:
    kind = {4: ">f", 8: ">d"}.get(len(raw))
    value = struct.unpack(kind, raw)[0] if kind else 0.0
    if not math.isfinite(value) or value < 0:
        raise BrokenClip("its duration is no number")
    return float(value)
