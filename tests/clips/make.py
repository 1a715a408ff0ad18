"""Made these clips, once, with PyAV 18 (FFmpeg): `python make.py`. 96x64, of a square that moves; names say codec, frames and oddities."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

WIDTH, HEIGHT, RATE = 96, 64, 16


def write(name: str, codec: str, frames: int, **options: str) -> None:
    av: Any = importlib.import_module("av")
    numpy: Any = importlib.import_module("numpy")
    with av.open(str(Path(__file__).with_name(name)), "w", options=options) as container:
        stream = container.add_stream(codec, rate=RATE)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for number in range(frames):
            picture = numpy.full((HEIGHT, WIDTH, 3), 40, numpy.uint8)
            picture[10:26, number : number + 16] = (220, 60, 60)
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


if __name__ == "__main__":
    write("h264-17.mp4", "libx264", 17)
    write("h264-17-index-first.mp4", "libx264", 17, movflags="faststart")
    write("h264-17-fragmented.mp4", "libx264", 17, movflags="frag_keyframe+empty_moov")
    write("hevc-9.mp4", "libx265", 9)
    write("mpeg4-9.mp4", "mpeg4", 9)
    write("vp9-17.webm", "libvpx-vp9", 17)
    write("vp8-9.webm", "libvpx", 9)
    write("av1-5.webm", "libsvtav1", 5)
