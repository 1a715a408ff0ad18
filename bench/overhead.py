"""What the gateway costs: time and throughput of the cheapest picture, against the best raw client of the same ComfyUI.

Ways are measured in turns (A B C A B C), so that a noisy moment of the machine hits all of them.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.caller import Caller, check_picture, open_caller
from bench.deployment import Servers, open_gateway, open_servers
from bench.measure import format_table, read_busy_s, read_cpu_s, summarize
from bench.raw import RawClient, load_graph, open_raw_client

SIDES = (64, 1024)
CONCURRENCY = 32
TURN = 10
# Every picture has a colour that none before had: no cache can answer.
COLORS = itertools.count(random.randrange(1 << 20))

Make = Callable[[int, int], Awaitable[Any]]  # side, colour -> what `verify` wants
Verify = Callable[[Any], Awaitable[bytes]]


@dataclass
class Way:
    """One way to a picture, and what was measured of it."""

    name: str
    make: Make
    verify: Verify
    pids: dict[str, int]
    seconds: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    # Cores kept busy by what the bench did not start, by block; a ComfyUI from outside is among it. Near zero is a quiet machine.
    others: list[float] = field(default_factory=list)
    cpu_s: dict[str, float] = field(default_factory=dict)
    parallel_jobs: int = 0

    async def run_one_by_one(self, side: int, jobs: int) -> None:
        made = []
        for color in itertools.islice(COLORS, jobs):
            color %= 1 << 24
            started = time.perf_counter()
            result = await self.make(side, color)
            self.seconds.append(time.perf_counter() - started)
            made.append((color, result))
        await self._verify(side, made)

    async def run_in_parallel(self, side: int, jobs: int) -> None:
        colors, made = itertools.islice(COLORS, jobs), list[tuple[int, Any]]()

        async def work() -> None:
            for color in colors:
                color %= 1 << 24
                made.append((color, await self.make(side, color)))

        before, busy_before_s, started = self._read_cpu(), read_busy_s(), time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for _ in range(CONCURRENCY):
                group.create_task(work())
        elapsed_s, busy_after_s = time.perf_counter() - started, read_busy_s()
        used = {name: cpu_s - before.get(name, 0.0) for name, cpu_s in self._read_cpu().items()}
        self.rates.append(jobs / elapsed_s)
        if busy_before_s is not None and busy_after_s is not None:
            self.others.append(max(0.0, busy_after_s - busy_before_s - sum(used.values())) / elapsed_s)
        for name, cpu_s in used.items():
            self.cpu_s[name] = self.cpu_s.get(name, 0.0) + cpu_s
        self.parallel_jobs += jobs
        await self._verify(side, made)

    async def _verify(self, side: int, made: list[tuple[int, Any]]) -> None:
        for color, result in made:
            check_picture(await self.verify(result), side, color)

    def _read_cpu(self) -> dict[str, float]:
        read = {name: read_cpu_s(pid) for name, pid in self.pids.items()}
        return {"client": time.process_time(), **{name: cpu_s for name, cpu_s in read.items() if cpu_s is not None}}

    def forget(self) -> None:
        self.seconds, self.rates, self.others, self.cpu_s, self.parallel_jobs = [], [], [], {}, 0

    @property
    def rate(self) -> float:
        """Jobs per second over all blocks, which are of one size."""
        return len(self.rates) / sum(1 / rate for rate in self.rates)


def _ways(raw: RawClient, caller: Caller, servers: Servers, gateway_pid: int) -> list[Way]:
    pids = {**servers.pids(), "gateway": gateway_pid}

    async def make_raw(side: int, color: int) -> bytes:
        canvas = {"width": side, "height": side, "color": color}
        return await raw.make(load_graph("trivial", {"Canvas": canvas}, f"raw_{color:06x}"))

    async def keep(body: bytes) -> bytes:
        return body

    def body(side: int, color: int) -> dict[str, Any]:
        return {"workflow": "trivial", "width": side, "height": side, "seed": color}

    return [
        Way("raw client", make_raw, keep, pids),
        Way("gateway, Prefer: wait", lambda side, color: caller.make_waiting(body(side, color)), caller.fetch_picture, pids),
        Way("gateway, event stream", lambda side, color: caller.make_streaming(body(side, color)), caller.fetch_picture, pids),
    ]


@asynccontextmanager
async def open_ways(state_dir: Path) -> AsyncIterator[list[Way]]:
    async with open_servers(state_dir) as servers, open_gateway(servers) as gateway:
        async with open_raw_client(servers.comfyui_url) as raw, open_caller(gateway.url) as caller:
            yield _ways(raw, caller, servers, gateway.pid)


async def measure(ways: list[Way], side: int, *, blocks: int, one_by_one: int, parallel: int) -> None:
    """`one_by_one` and `parallel` are jobs per way. One by one the ways change every TURN jobs: a machine's speed drifts within seconds."""
    for way in ways:
        await way.run_one_by_one(side, 10)
        await way.run_in_parallel(side, CONCURRENCY * 2)
        way.forget()
    for _ in range(-(-one_by_one // TURN)):
        for way in ways:
            await way.run_one_by_one(side, TURN)
    for _ in range(blocks):
        for way in ways:
            await way.run_in_parallel(side, parallel // blocks)


def report(ways: list[Way], side: int) -> str:
    """The table of one picture size."""
    raw = ways[0]
    raw_p50 = summarize(raw.seconds).p50
    header = (f"{side} px", "p50 ms", "p95 ms", "mean ms", "over raw p50 ms", f"jobs/s at {CONCURRENCY}", "of raw", "CPU ms/job")
    rows = []
    for way in ways:
        summary = summarize(way.seconds)
        cpu = sum(way.cpu_s.values()) / way.parallel_jobs
        times = [f"{value * 1000:.2f}" for value in (summary.p50, summary.p95, summary.mean, summary.p50 - raw_p50)]
        rows.append((way.name, *times, f"{way.rate:.1f}", f"{way.rate / raw.rate:.2f}", f"{cpu * 1000:.2f}"))
    lines = [format_table(header, rows)]
    for way in ways:
        parts = ", ".join(f"{name} {cpu_s / way.parallel_jobs * 1000:.2f}" for name, cpu_s in way.cpu_s.items())
        blocks = ", ".join(f"{rate:.0f}" for rate in way.rates)
        busy = ", ".join(f"{cores:.1f}" for cores in way.others)
        lines.append(f"  {way.name}: CPU ms/job {parts}; jobs/s by block {blocks}; cores busy with other things {busy}")
    return "\n".join(lines)


async def run(state_dir: Path, share: float) -> None:
    """Print the tables. `share` scales the number of jobs (1 is 400 one by one and 600 in parallel, each way)."""
    blocks = 4
    async with open_ways(state_dir) as ways:
        for side in SIDES:
            await measure(ways, side, blocks=blocks, one_by_one=int(400 * share), parallel=max(blocks * CONCURRENCY, int(600 * share)))
            print(report(ways, side), end="\n\n", flush=True)
            for way in ways:
                way.forget()
