"""`python -m bench.fleet [--jobs N] [--seeds N] [--instances N] [--keeps N]`: the real `choose` against others, in simulated time.

Others: round robin and least queue. Assumed: base models by Zipf (3), LoRAs by Zipf within the base model they fit (40 in all), 85 % of the
jobs with one LoRA; 8 callers by Zipf; runs of 3-20 s; VRAM for one base model (12 s from disk, 4 s when it is one of the last two of that
machine), 0.8 s per LoRA that the last prompts did not use (one prompt, or `--keeps`: what ComfyUI's --cache-lru holds). Load is arrivals
against what the fleet does with everything loaded, so 0.8 is more than round robin can carry.
"least": what nobody can go below in the order of arrival who cannot see what comes; "stock": round robin with one prompt kept.
All three policies see the same line, window and two slots. A wait is from acceptance to a job's own first step, loading included.
"""

from __future__ import annotations

import argparse
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench.fleet_load import Arrivals, Load, Work
from bench.fleet_model import Policy, Record, Simulation
from bench.measure import format_table, summarize
from gateway.dispatch.fleet import Candidate, InstanceView, Placement, choose

LEVELS: tuple[tuple[Arrivals, float], ...] = (
    *(("poisson", level) for level in (0.3, 0.6, 0.9)),
    *(("bursty", level) for level in (0.3, 0.6, 0.9)),
    ("backlog", 1.0),
)
SIZES = (1, 4, 16, 64)
SHORT_RUN_S = 2.0


class RoundRobin:
    """First in, first out; the next instance in turn that has a free slot."""

    def __init__(self) -> None:
        self._turn = 0

    def __call__(self, candidates: Sequence[Candidate], views: Sequence[InstanceView], now_ms: int) -> Placement | None:
        for step in range(len(views)):
            view = views[(self._turn + step) % len(views)]
            if view.free_slots > 0:
                self._turn += step + 1
                return Placement(candidates[0].job_id, view.id, warm=False)
        return None


def choose_least_queue(candidates: Sequence[Candidate], views: Sequence[InstanceView], now_ms: int) -> Placement | None:
    """First in, first out; the emptiest instance."""
    free = [view for view in views if view.free_slots > 0]
    return Placement(candidates[0].job_id, min(free, key=lambda view: view.slots_used).id, warm=False) if free else None


@dataclass(frozen=True, slots=True)
class Result:
    """One policy over one load. Times in seconds; `of_ideal`: its throughput over that of a fleet which never loads nor waits."""

    base_loads: int
    lora_loads: int
    p50_s: float
    p95_s: float
    worst_s: float
    of_ideal: float


@dataclass(frozen=True, slots=True)
class Comparison:
    round_robin: Result
    least_queue: Result
    choose: Result
    stock_loads: int  # LoRA loads in order on instances that keep one prompt's results
    least_loads: int

    @property
    def base_ratio(self) -> float:
        return self.round_robin.base_loads / self.choose.base_loads

    @property
    def lora_ratio(self) -> float:
        return self.round_robin.lora_loads / self.choose.lora_loads

    @property
    def worst_ratio(self) -> float:
        """Against the better of the two that serve in order."""
        return self.choose.worst_s / min(self.round_robin.worst_s, self.least_queue.worst_s)


def sum_up(records: Sequence[Record], works: Sequence[Work], instances: int) -> Result:
    waits = summarize([record.wait_s for record in records])
    ideal_s = max(works[-1].arrival_s, sum(work.run_s for work in works) / instances)
    return Result(
        sum(record.base_loads for record in records),
        sum(record.lora_loads for record in records),
        waits.p50,
        waits.p95,
        waits.largest,
        ideal_s / max(record.end_s for record in records),
    )


def count_least_loads(works: Sequence[Work], instances: int) -> int:
    """LoRA loads in order of arrival if no GPU were ever busy, each kept one prompt's LoRAs, and how often each is asked for was known.

    All but one keep what is asked for most, the last takes everything else: the best there is where draws tell nothing of the next.
    """
    asked = Counter(work.lora_files for work in works if work.lora_files)
    kept = {files for files, _ in asked.most_common(instances - 1)}
    loads, last = sum(map(len, kept)), frozenset[str]()
    for work in works:
        if work.lora_files not in kept:
            loads += len(work.lora_files - last)
            last = work.lora_files
    return loads


def compare(seed: int, jobs: int, instances: int, arrivals: Arrivals, level: float, keeps: int = 1) -> Comparison:
    """All policies over one load, on instances that keep what their last `keeps` prompts used."""
    load = Load(seed)
    works = load.make(jobs, level * instances / load.mean_run_s, arrivals)

    def play(policy: Policy, keeps: int) -> Result:
        return sum_up(Simulation(works, instances, policy, keeps).run(), works, instances)

    in_order = play(RoundRobin(), keeps)
    stock = in_order if keeps == 1 else play(RoundRobin(), 1)
    least = count_least_loads(works, instances)
    return Comparison(in_order, play(choose_least_queue, keeps), play(choose, keeps), stock.lora_loads, least)


def _median(comparisons: Sequence[Comparison], read: Callable[[Comparison], float]) -> float:
    return statistics.median(map(read, comparisons))


def _waits(comparisons: Sequence[Comparison], read: Callable[[Result], float]) -> str:
    columns = zip(*((read(c.round_robin), read(c.least_queue), read(c.choose)) for c in comparisons), strict=True)
    return " / ".join(f"{statistics.median(column):.0f}" for column in columns)


def _count_theirs(comparison: Comparison) -> float:
    return comparison.round_robin.lora_loads


def _count_ours(comparison: Comparison) -> float:
    return comparison.choose.lora_loads


def compare_levels(instances: int, jobs: int, seeds: Sequence[int], keeps: int) -> str:
    """Medians over the seeds, and of the ratios that must hold the worst seed as well."""
    rows = []
    for arrivals, level in LEVELS:
        found = [compare(seed, jobs, instances, arrivals, level, keeps) for seed in seeds]
        rows.append(
            [
                f"{arrivals} {level}",
                f"{_median(found, lambda c: c.base_ratio):.1f} ({min(c.base_ratio for c in found):.1f})",
                f"{_median(found, lambda c: c.least_queue.base_loads / c.choose.base_loads):.1f}",
                f"{_median(found, lambda c: c.lora_ratio):.2f} ({min(c.lora_ratio for c in found):.2f})",
                " / ".join(f"{_median(found, read) / jobs:.2f}" for read in (_count_theirs, _count_ours)),
                f"{_median(found, lambda c: c.least_queue.lora_loads / c.choose.lora_loads):.2f}",
                f"{_median(found, lambda c: c.stock_loads / (c.least_loads if keeps == 1 else c.choose.lora_loads)):.2f}",
                _waits(found, lambda result: result.p50_s),
                _waits(found, lambda result: result.p95_s),
                _waits(found, lambda result: result.worst_s),
                f"{_median(found, lambda c: c.worst_ratio):.2f} ({max(c.worst_ratio for c in found):.2f})",
                f"{_median(found, lambda c: c.round_robin.of_ideal):.2f} / {_median(found, lambda c: c.choose.of_ideal):.2f}",
            ]
        )
    header = [
        "load",
        "base: rr/ours (min)",
        "lq/ours",
        "LoRA: rr/ours (min)",
        "a job",
        "lq/ours",
        "rr/least" if keeps == 1 else "stock rr/ours",
        "p50 s",
        "p95 s",
        "worst s",
        "worst/FIFO (max)",
    ]
    return format_table([*header, "of ideal"], rows)


def measure_throughput(instances: int, jobs: int, *, alike: bool) -> float:
    """Jobs per second through a backlog of jobs of 2 s, all alike (nothing to load) or of the Zipf load."""
    works = Load(1, (SHORT_RUN_S, SHORT_RUN_S), alike=alike).make(jobs * instances, 1.0, "backlog")
    records = Simulation(works, instances, choose).run()
    return len(records) / max(record.end_s for record in records)


def compare_sizes(jobs: int) -> str:
    rows = []
    alone = {alike: measure_throughput(1, jobs, alike=alike) for alike in (True, False)}
    for size in SIZES:
        rates = {alike: measure_throughput(size, jobs, alike=alike) for alike in (True, False)}
        cells = [cell for alike in (True, False) for cell in (f"{rates[alike]:.2f}", f"{rates[alike] / alone[alike] / size:.3f}")]
        rows.append([str(size), *cells, f"{rates[False] * SHORT_RUN_S / size:.2f}"])
    return format_table(["instances", "alike: jobs/s", "of linear", "Zipf: jobs/s", "of linear", "of ideal"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.fleet", description="Placement in simulated time, as ratios.")
    parser.add_argument("--jobs", type=int, default=2000, help="per load (default 2000)")
    parser.add_argument("--seeds", type=int, default=5, help="loads per line (default 5)")
    parser.add_argument("--instances", type=int, default=8, help="of the first table (default 8)")
    parser.add_argument(
        "--keeps", type=int, default=1, help="prompts whose LoRAs stay in an instance's memory (default 1, as ComfyUI does)"
    )
    arguments = parser.parse_args()
    print(f"{arguments.instances} instances; round robin / least queue / ours, medians of {arguments.seeds} seeds")
    print(compare_levels(arguments.instances, arguments.jobs, range(1, arguments.seeds + 1), arguments.keeps))
    print(f"\nbacklog of jobs of {SHORT_RUN_S:.0f} s, {arguments.jobs // 10} per instance")
    print(compare_sizes(arguments.jobs // 10))


if __name__ == "__main__":
    main()
