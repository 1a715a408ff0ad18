"""Measures one ComfyUI from outside: the time from one prompt's end to the next one's with two always waiting, and the slowest answers.
`python measure_gaps.py URL [--seconds 60] [--node SaveImage] [--side 64]`; it knows nothing of what makes the gaps."""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import secrets
import time
import uuid
from typing import Any

import aiohttp

PROMPTS_AHEAD = 2
LONG_GAP_MS = 50.0


def build_graph(save_class: str, side_px: int) -> dict[str, Any]:
    """A fresh colour and folder: nothing comes from the cache, and SaveImage has no long folder to list.."""
    save: dict[str, Any] = {"images": ["1", 0], "filename_prefix": f"gaps/{uuid.uuid4().hex}/image"}
    if save_class == "FluxgateSaveImage":
        save |= {"format": "png", "quality": 90, "compress_level": 4}
    empty = {"width": side_px, "height": side_px, "batch_size": 1, "color": secrets.randbelow(1 << 24)}
    return {"1": {"class_type": "EmptyImage", "inputs": empty}, "9": {"class_type": save_class, "inputs": save}}


def read_percentile(sorted_ms: list[float], share: float) -> float:
    return sorted_ms[min(len(sorted_ms) - 1, int(len(sorted_ms) * share))]


async def measure(url: str, seconds: float, save_class: str, side_px: int, picture: str | None) -> list[float]:
    """The milliseconds between consecutive ends of prompts."""
    client_id, ends = uuid.uuid4().hex, []
    async with aiohttp.ClientSession(url) as http, http.ws_connect("/ws", params={"clientId": client_id}, max_msg_size=0) as socket:

        async def submit() -> None:
            graph = build_graph(save_class, side_px)
            if picture is not None:
                graph["1"] = {"class_type": "LoadImage", "inputs": {"image": picture}}
            async with http.post("/prompt", json={"prompt": graph, "client_id": client_id}) as response:
                response.raise_for_status()

        for _ in range(1 + PROMPTS_AHEAD):
            await submit()
        stop_at = time.perf_counter() + seconds
        async for message in socket:
            if message.type is not aiohttp.WSMsgType.TEXT:
                continue
            said = json.loads(message.data)
            if said["type"] == "executing" and said["data"]["node"] is None:
                ends.append(time.perf_counter())
                if ends[-1] > stop_at:
                    break
                await submit()
    return [1000 * (after - before) for before, after in itertools.pairwise(ends)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--node", default="SaveImage", choices=["SaveImage", "FluxgateSaveImage"])
    parser.add_argument("--side", type=int, default=64, help="pixels of the square picture")
    parser.add_argument("--picture", help="an input file of the instance to save instead of one plain colour")
    given = parser.parse_args()
    gaps = sorted(asyncio.run(measure(given.url, given.seconds, given.node, given.side, given.picture)))
    long = [round(gap) for gap in gaps if gap > LONG_GAP_MS]
    print(
        f"{len(gaps)} prompts: p50 {read_percentile(gaps, 0.5):.1f}  p99 {read_percentile(gaps, 0.99):.1f}  max {gaps[-1]:.0f} ms;", end=" "
    )
    print(f"{len(long)} over {LONG_GAP_MS:.0f} ms: {long[-12:]}")


if __name__ == "__main__":
    main()
