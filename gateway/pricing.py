"""How long a job will take and what that costs, from what jobs like it took. Pure arithmetic over measured medians; it says None when
nothing was measured."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any, Literal, NamedTuple

# Fewer measurements than this say too little to promise anything.
ENOUGH = 3

# What workflows call the length of a video; ComfyUI itself says `length` for its frames. A length in seconds without a rate has this one.
_FRAMES = ("frames", "num_frames", "length")
_SECONDS = ("seconds", "duration_s", "duration")
_RATES = ("fps", "frame_rate")
USUAL_RATE = 24

Basis = Literal["same work on the same device", "same work on other devices", "scaled from other sizes and steps", "nothing measured yet"]


class Work(NamedTuple):
    """What decides how long a picture takes, beside workflow and base model."""

    pixels: int
    steps: int
    images: int  # or frames

    @property
    def amount(self) -> int:
        return self.pixels * self.steps * self.images


def measure_work(parameters: Mapping[str, Any]) -> Work:
    """Of a job's parameters; what a workflow has no such parameter for counts as one. Each frame of a video is an image."""

    def read(*names: str) -> float:
        values = (parameters.get(name) for name in names)
        return next((value for value in values if isinstance(value, int | float) and 0 < value < math.inf), 0)

    def count(name: str) -> int:
        return int(read(name)) or 1

    size = count("size")
    frames = read(*_FRAMES) or read(*_SECONDS) * (read(*_RATES) or USUAL_RATE)
    return Work(count("width") * count("height") * size * size, count("steps"), count("num_images") * (math.ceil(frames) or 1))


class Measurement(NamedTuple):
    """One job that ran: how much it was, where, for how long (loading left out), and what a load took if there was one."""

    work: Work
    device: str | None
    run_ms: int
    load_ms: int | None

    def dump(self) -> str:
        return json.dumps([*self.work, self.device, self.run_ms, self.load_ms])


def read_measurement(raw: bytes) -> Measurement:
    pixels, steps, images, device, run_ms, load_ms = json.loads(raw)
    return Measurement(Work(pixels, steps, images), device, run_ms, load_ms)


class Estimate(NamedTuple):
    """Seconds on the GPU; None where too little was measured. `measured` jobs were looked at."""

    run_s: float | None
    load_s: float | None
    basis: Basis
    measured: int


def estimate(measured: Sequence[Measurement], work: Work, device: str | None) -> Estimate:
    """The median of the most alike jobs of which there are enough."""
    loads = [one.load_ms for one in measured if one.load_ms is not None]
    load_s = median(loads) / 1000 if len(loads) >= ENOUGH else None
    same = [one for one in measured if one.work == work]
    there = [one for one in same if one.device == device]
    found: Sequence[Measurement]
    basis: Basis
    for found, basis in ((there, "same work on the same device"), (same, "same work on other devices")):
        if len(found) >= ENOUGH:
            return Estimate(round(median(one.run_ms for one in found) / 1000, 3), load_s, basis, len(found))
    found = [one for one in measured if one.device == device]
    found = found if len(found) >= ENOUGH else measured
    if len(found) >= ENOUGH:
        run_ms = median(one.run_ms / one.work.amount for one in found) * work.amount
        return Estimate(round(run_ms / 1000, 3), load_s, "scaled from other sizes and steps", len(found))
    return Estimate(None, load_s, "nothing measured yet", len(measured))


def compute_cost(gpu_seconds: float | None, price_per_gpu_hour: float | None) -> dict[str, float | None]:
    """GPU time, its price, and the amount in the price's currency; None for what is not known."""
    amount = None if gpu_seconds is None or price_per_gpu_hour is None else round(gpu_seconds / 3600 * price_per_gpu_hour, 6)
    return {"gpu_seconds": gpu_seconds, "price_per_gpu_hour": price_per_gpu_hour, "amount": amount}


def estimate_wait_s(run_s: float | None, jobs_ahead: int, instances: int) -> float | None:
    """Seconds until a waiting job has ended: those ahead share the instances, then it runs itself."""
    if run_s is None or instances < 1:
        return None
    return round((jobs_ahead // instances + 1) * run_s, 1)


def estimate_rest_s(run_s: float | None, elapsed_s: float) -> float | None:
    """Seconds a running job still needs; never less than none."""
    return None if run_s is None else round(max(0.0, run_s - elapsed_s), 1)
