"""Every bench once in its smallest form: what it starts works together, and what it measures is what was asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import gap, instances, memory, overhead, relay
from bench.caller import BenchFailure
from bench.listeners import Report
from bench.measure import Summary, summarize


async def test_relay_delivers_every_event_to_every_stream(tmp_path: Path) -> None:
    measured = await relay.measure(tmp_path, streams=10, seconds=2.0)
    relay.check(measured)
    assert (measured.expected, len(measured.report.whole_us), len(measured.report.ticks)) == (40, 40, 2)
    assert "10" in relay.report_all([measured])


def test_relay_tells_what_is_missing() -> None:
    measured = relay.Measured(1, 4, Report({"one": [3]}, 1, 0, [5, 5, 5], [1, 1, 1]), 1.0, 0.0, {})
    with pytest.raises(BenchFailure, match="1 of 4 events are missing"):
        relay.check(measured)


async def test_instances_share_the_work(tmp_path: Path) -> None:
    results = [await instances.measure(tmp_path / str(size), size, jobs=2, run_s=0.1) for size in (1, 2)]
    assert [one.jobs for one in results] == [2, 4]
    assert "of linear" in instances.report(results, 0.1)


async def test_gap_sees_every_prompt_of_both_feeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    await gap.run(tmp_path, 0.01)
    assert "idle share" in capsys.readouterr().out


async def test_overhead_checks_what_it_gets(tmp_path: Path) -> None:
    async with overhead.open_ways(tmp_path) as ways:
        await overhead.measure(ways, 64, blocks=1, one_by_one=2, parallel=4)
        assert "over raw p50 ms" in overhead.report(ways, 64)


async def test_memory_tells_what_a_job_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    await memory.run(tmp_path, 0.01)
    titles, figures, _ = capsys.readouterr().out.splitlines()
    assert titles.split()[-4:] == ["job", "job", "graph", "events"]
    whole, *parts = map(int, figures.split()[-4:])
    assert sum(parts) / 2 < whole < 2 * sum(parts)


def test_percentiles_are_nearest_ranks() -> None:
    assert summarize(list(range(100))) == Summary(50, 95, 99, 49.5, 99)
    with pytest.raises(ValueError, match="nothing was measured"):
        summarize([])
