"""Do many instances do as much as that many times one? Jobs per second through 1, 4, 16 and 64 simulated instances (bench/simulated.py)
in jobs of 2 s, from the first POST to the last stream's end. One gateway with its dispatcher inside, two slots an instance, S3 on."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from pathlib import Path

from bench.caller import Caller, open_caller
from bench.deployment import open_fleet, open_gateway, open_servers
from bench.measure import format_table, read_cpu_s

SIZES = (1, 4, 16, 64)
RUN_S = 2.0
JOBS = 12  # per instance
# Callers that are about to submit; the others wait for what they submitted.
SUBMITTING = 16


@dataclass(frozen=True, slots=True)
class Measured:
    """One size of the fleet. `cpu` is the gateway's, in cores."""

    instances: int
    jobs: int
    seconds: float
    cpu: float

    @property
    def jobs_per_s(self) -> float:
        return self.jobs / self.seconds


async def make_all(caller: Caller, jobs: int, run_s: float) -> None:
    """Submit `jobs` jobs of `run_s` seconds, follow each to its success."""
    turn = asyncio.Semaphore(SUBMITTING)

    async def make(number: int) -> None:
        async with turn:
            job = await caller.submit({"workflow": "ticking", "seed": number, "seconds": run_s})
        await caller.follow_to_success(job)

    await asyncio.gather(*(make(number) for number in range(jobs)))


async def measure(state_dir: Path, size: int, jobs: int, run_s: float) -> Measured:
    """A deployment of its own: `jobs` per instance, all at once."""
    async with open_servers(state_dir, with_engine=False) as servers, open_fleet(state_dir, size) as fleet:
        async with open_gateway(servers, {"COMFYUI_URLS": ",".join(fleet.urls)}) as gateway, open_caller(gateway.url) as caller:
            await caller.wait_for_instances(size)
            await make_all(caller, 2, 0.0)
            cpu_s, started = read_cpu_s(gateway.pid) or 0.0, time.monotonic()
            await make_all(caller, jobs * size, run_s)
            seconds = time.monotonic() - started
            return Measured(size, jobs * size, seconds, ((read_cpu_s(gateway.pid) or 0.0) - cpu_s) / seconds)


def report(results: list[Measured], run_s: float) -> str:
    """`of linear`: against that many times the smallest fleet's rate; `of ideal`: against instances that never wait."""
    alone = results[0].jobs_per_s / results[0].instances
    rows = [
        [
            str(one.instances),
            str(one.jobs),
            f"{one.jobs_per_s:.2f}",
            f"{one.jobs_per_s / one.instances / alone:.3f}",
            f"{one.jobs_per_s * run_s / one.instances:.3f}",
            f"{one.cpu:.2f}",
        ]
        for one in results
    ]
    return format_table(("instances", "jobs", "jobs/s", "of linear", "of ideal", "gateway CPU"), rows)


async def run(state_dir: Path, share: float) -> None:
    """Print the table. `share` scales the jobs per instance (1 is 12)."""
    results = [await measure(state_dir / str(size), size, max(2, round(JOBS * share)), RUN_S) for size in SIZES]
    print(report(results, RUN_S))
    print(f"  jobs of {RUN_S:g} s, {results[0].jobs} an instance, submitted at once and followed by their streams", flush=True)
