"""How long does an event take from ComfyUI's message to the byte on an event stream? At 1, 100 and 5,000 open streams of one gateway,
five streams a job, two events a second each. Instance, dispatcher, Redis, gateway and reader are all there, and all real but the
instances, which sleep (bench/simulated.py). The dispatcher is a process of its own: the gateway's memory is its streams'."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.caller import BenchFailure, open_caller
from bench.deployment import open_dispatcher, open_fleet, open_gateway, open_servers
from bench.listeners import Report
from bench.measure import format_table, read_cpu_s, read_rss_bytes, summarize
from local.child import ROOT

STREAMS = (1, 100, 5000)
LISTENERS = 5  # streams of one job
EVENTS_PER_S = 2.0
SECONDS = 15.0
# Prompts that a simulated instance runs at one time: a thousand jobs at work do not need a thousand sockets.
SLOTS = 8


@dataclass(frozen=True, slots=True)
class Measured:
    """One number of streams. Shares are of one core, while the ticks came."""

    streams: int
    expected: int
    report: Report
    seconds: float
    bytes_per_stream: float
    cpu: dict[str, float]

    @property
    def missing(self) -> int:
        return self.expected - len(self.report.whole_us)


def _read_cpu(pids: dict[str, int]) -> dict[str, float]:
    return {name: read_cpu_s(pid) or 0.0 for name, pid in pids.items()}


@asynccontextmanager
async def _open_listeners(port: int, job_ids: list[str], listeners: int) -> AsyncIterator[asyncio.subprocess.Process]:
    command = [sys.executable, "-m", "bench.listeners", str(port), str(listeners)]
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, cwd=ROOT, limit=1 << 28)
    try:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("\n".join(job_ids).encode())
        process.stdin.close()
        if await process.stdout.readline() != b"open\n":
            raise BenchFailure("the listeners did not get their streams open")
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def _make_jobs(url: str, jobs: int, ticks: int, seconds: float) -> list[str]:
    """Ids of jobs that all run, and wait for their first tick."""
    turn = asyncio.Semaphore(16)
    async with open_caller(url) as caller:

        async def make(number: int) -> dict[str, Any]:
            async with turn:
                return await caller.submit({"workflow": "ticking", "seed": number, "seconds": seconds, "ticks": ticks})

        made = await asyncio.gather(*(make(number) for number in range(jobs)))
        for job in made:
            await caller.wait_for_status(job, "running")
    return [job["id"] for job in made]


async def measure(state_dir: Path, streams: int, seconds: float) -> Measured:
    """One deployment, one number of streams, from the first tick to the last stream's end."""
    listeners = min(LISTENERS, streams)
    jobs, ticks = streams // listeners, max(2, round(seconds * EVENTS_PER_S))
    async with (
        open_servers(state_dir, with_engine=False) as servers,
        open_fleet(state_dir, -(-jobs // SLOTS), at_once=SLOTS, held=True) as fleet,
    ):
        env = {"COMFYUI_URLS": ",".join(fleet.urls), "DISPATCHER": "off", "SLOTS_PER_INSTANCE": str(SLOTS)}
        async with open_dispatcher(servers, env) as dispatcher, open_gateway(servers, env) as gateway:
            ids = await _make_jobs(gateway.url, jobs, ticks, seconds)
            before_bytes = read_rss_bytes(gateway.pid) or 0
            async with _open_listeners(gateway.port, ids, listeners) as reader:
                pids = {"gateway": gateway.pid, "dispatcher": dispatcher.pid, "redis": servers.redis.pid}
                pids |= {"instances": fleet.child.pid, "reader": reader.pid}
                started, cpu = time.monotonic(), _read_cpu(pids)
                await fleet.start_ticks()
                await asyncio.sleep(seconds)
                # After the deliveries: what was allocated to make them counts as well.
                grown_bytes = (read_rss_bytes(gateway.pid) or 0) - before_bytes
                elapsed_s = time.monotonic() - started
                used = {name: (after - cpu[name]) / elapsed_s for name, after in _read_cpu(pids).items()}
                assert reader.stdout is not None
                report = Report(**json.loads(await reader.stdout.readline()))
    return Measured(streams, ticks * streams, report, elapsed_s, grown_bytes / streams, used)


def check(measured: Measured) -> None:
    report = measured.report
    if measured.missing or report.disorder or report.succeeded != measured.streams:
        raise BenchFailure(
            f"{measured.streams} streams: {measured.missing} of {measured.expected} events are missing, {report.disorder} out of order, "
            f"{measured.streams - report.succeeded} streams did not end with the job's success"
        )


def report_all(results: list[Measured]) -> str:
    header = ("streams", "deliveries/s", "missing", "whole p50 ms", "p99", "max", "from Redis p50 ms", "p99", "kB/stream")
    names = list(results[0].cpu)
    rows = []
    for one in results:
        whole = summarize([value / 1000 for value in one.report.whole_us])
        feed = summarize([float(value) for value in one.report.feed_ms])
        numbers = [f"{whole.p50:.1f}", f"{whole.p99:.1f}", f"{whole.largest:.1f}", f"{feed.p50:.0f}", f"{feed.p99:.0f}"]
        rows.append(
            [
                f"{one.streams:,}",
                f"{len(one.report.whole_us) / one.seconds:,.0f}",
                str(one.missing),
                *numbers,
                f"{one.bytes_per_stream / 1000:.1f}",
                *(f"{one.cpu[name]:.2f}" for name in names),
            ]
        )
    return format_table((*header, *(f"{name} CPU" for name in names)), rows)


async def run(state_dir: Path, share: float) -> None:
    """Print the table. `share` scales the largest number of streams (1 is 5,000)."""
    results = []
    for streams in STREAMS:
        number = max(LISTENERS, int(streams * share) // LISTENERS * LISTENERS) if streams == STREAMS[-1] else streams
        results.append(await measure(state_dir / str(streams), number, SECONDS * min(1.0, max(0.2, share))))
        check(results[-1])
    print(report_all(results))
    print(f"  {EVENTS_PER_S:g} events/s a job; CPU in cores of {os.cpu_count()}, all processes of the bench on this machine", flush=True)
