"""Containers of clips as FFmpeg writes them (tests/clips/make.py), cut, damaged and made up."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.datasets.clips import BrokenClip, Clip, read_mp4, read_webm
from gateway.datasets.intake import Media, Refused, read_video

CLIPS = Path(__file__).parent / "clips"
KNOWN = {
    "h264-17.mp4": ("h264", 17, 1.062),
    "h264-17-index-first.mp4": ("h264", 17, 1.062),
    "h264-17-fragmented.mp4": ("h264", None, None),
    "hevc-9.mp4": ("hevc", 9, 0.562),
    "mpeg4-9.mp4": ("mpeg4", 9, 0.562),
    "vp9-17.webm": ("vp9", 17, 1.063),
    "vp8-9.webm": ("vp8", 9, 0.563),
    "av1-5.webm": ("av1", 5, 0.313),
}


def load(name: str) -> bytes:
    return (CLIPS / name).read_bytes()


def read(body: bytes, name: str) -> Clip:
    return read_mp4(body) if name.endswith("mp4") else read_webm(body)


@pytest.mark.parametrize("name", KNOWN)
def test_a_container_tells_what_is_in_it(name: str) -> None:
    codec, frames, duration_s = KNOWN[name]
    assert read(load(name), name) == Clip(96, 64, codec, frames, duration_s)
    media = read_video(load(name), name)
    assert media == Media(load(name), name[-4:].strip("."), media.sha256, 96, 64, frames=frames, duration_s=duration_s)


@pytest.mark.parametrize(
    ("name", "share", "words"),
    [
        ("h264-17.mp4", 0.5, "cut off|index"),
        ("h264-17.mp4", 0.99, "cut off|index"),
        ("h264-17-index-first.mp4", 0.2, "cut off|index"),
        ("vp9-17.webm", 0.5, "cut off"),
        ("vp8-9.webm", 0.1, "cut off|early|segment"),
    ],
)
def test_one_that_was_cut_off_is_refused(name: str, share: float, words: str) -> None:
    body = load(name)[: int(len(load(name)) * share)]
    with pytest.raises(BrokenClip, match=words):
        read(body, name)
    with pytest.raises(Refused) as refused:
        read_video(body, name)
    assert refused.value.problem.code == "clip_broken"
    assert name in refused.value.problem.message


def test_sound_alone_is_no_clip() -> None:
    body = load("h264-17.mp4").replace(b"vide", b"soun")
    with pytest.raises(Refused, match="no video track"):
        read_video(body, "a.mp4")


def test_what_simpletuner_may_not_read_is_refused_by_name() -> None:
    with pytest.raises(Refused, match="'apcn'") as refused:
        read_video(load("h264-17.mp4").replace(b"avc1", b"apcn"), "a.mp4")
    assert refused.value.problem.code == "clip_codec"


@pytest.mark.parametrize(("width", "height"), [(96, 48), (0, 0), (8192, 8192)])
def test_a_size_that_no_training_takes_is_refused(width: int, height: int) -> None:
    body = load("h264-17.mp4")
    # Width and height stand in the sample entry, behind its name and 24 bytes.
    place = body.index(b"avc1", body.index(b"stsd")) + 28
    with pytest.raises(Refused, match=f"{width}x{height}") as refused:
        read_video(body[:place] + struct.pack(">HH", width, height) + body[place + 4 :], "a.mp4")
    assert refused.value.problem.code == "clip_size"


@pytest.mark.parametrize("name", ["h264-17.mp4", "vp9-17.webm"])
def test_any_damage_is_read_or_refused(name: str) -> None:
    body = load(name)
    for place in range(len(body)):
        for value in (0x00, 0xFF):
            try:
                read(body[:place] + bytes([value]) + body[place + 1 :], name)
            except BrokenClip:
                continue


@given(st.binary(max_size=200), st.integers(0, 200))
def test_any_bytes_are_read_or_refused(tail: bytes, kept: int) -> None:
    for name in ("h264-17-index-first.mp4", "vp9-17.webm"):
        try:
            read(load(name)[:kept] + tail, name)
        except BrokenClip:
            continue
