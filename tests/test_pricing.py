"""Estimates from what was measured: the most alike jobs of which there are enough decide, and nothing is made up."""

from __future__ import annotations

import pytest

from gateway.pricing import ENOUGH, Measurement, Work, compute_cost, estimate, measure_work, read_measurement

BIG, SMALL = Work(1024 * 1024, 20, 1), Work(512 * 512, 20, 1)


def ran(work: Work, *run_ms: int, device: str | None = "a", load_ms: int | None = None) -> list[Measurement]:
    return [Measurement(work, device, ms, load_ms) for ms in run_ms]


def test_the_median_of_the_same_work_on_the_same_device_goes_first() -> None:
    measured = ran(BIG, 10_000, 12_000, 50_000) + ran(BIG, 1, 2, 3, device="b") + ran(SMALL, 5, 5, 5)
    assert estimate(measured, BIG, "a") == (12.0, None, "same work on the same device", 3)
    assert estimate(measured, BIG, "b").run_s == 0.002


def test_other_devices_are_better_than_other_sizes() -> None:
    measured = ran(BIG, 10_000, 10_000, device="a") + ran(BIG, 30_000, device="b") + ran(SMALL, 1, 1, 1, device="c")
    assert estimate(measured, BIG, "c") == (10.0, None, "same work on other devices", 3)


def test_other_sizes_are_scaled_by_their_work() -> None:
    assert estimate(ran(SMALL, 1000, 1000, 1000), BIG, "a") == (4.0, None, "scaled from other sizes and steps", 3)
    half = Work(512 * 512, 10, 2)
    assert estimate(ran(SMALL, 1000, 1000, 1000), half, "a").run_s == 1.0


@pytest.mark.parametrize("count", range(ENOUGH))
def test_too_little_says_nothing(count: int) -> None:
    assert estimate(ran(BIG, *[1000] * count), BIG, "a") == (None, None, "nothing measured yet", count)


def test_loads_are_those_of_jobs_that_loaded() -> None:
    measured = ran(BIG, 1000, 1000, 1000, load_ms=None) + ran(BIG, 1000, 1000, 1000, load_ms=8000)
    assert estimate(measured, BIG, "a").load_s == 8.0


def test_work_is_read_from_whatever_a_workflow_calls_its_size() -> None:
    assert measure_work({"width": 512, "height": 256, "steps": 4, "num_images": 2}) == Work(512 * 256, 4, 2)
    assert measure_work({"size": 64}) == Work(64 * 64, 1, 1)
    assert measure_work({"width": "wide", "steps": -1}) == Work(1, 1, 1)


@pytest.mark.parametrize(
    ("parameters", "frames"),
    [
        ({"frames": 81}, 81),
        ({"length": 33, "seconds": 9, "num_images": 2}, 66),
        ({"seconds": 2.5, "fps": 16}, 40),
        ({"duration_s": 3}, 72),
        ({"seconds": 0.01}, 1),
        ({"seconds": float("nan"), "frames": "many"}, 1),
        ({"seconds": float("inf")}, 1),
        ({"fps": 16}, 1),
    ],
)
def test_a_video_is_as_much_work_as_its_frames(parameters: dict[str, object], frames: int) -> None:
    assert measure_work(parameters) == Work(1, 1, frames)
    assert estimate(ran(Work(1, 1, 10), 1000, 1000, 1000), measure_work(parameters), "a").run_s == frames / 10


def test_a_measurement_survives_redis() -> None:
    (one,) = ran(BIG, 1234, load_ms=5)
    assert read_measurement(one.dump().encode()) == one


def test_cost_is_time_by_price_and_unknown_where_either_is() -> None:
    assert compute_cost(36.0, 2.5) == {"gpu_seconds": 36.0, "price_per_gpu_hour": 2.5, "amount": 0.025}
    assert compute_cost(None, 2.5)["amount"] is None
    assert compute_cost(36.0, None)["amount"] is None
    assert compute_cost(0.0, 2.5)["amount"] == 0.0
