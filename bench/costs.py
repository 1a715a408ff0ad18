"""What does one job cost Redis? Commands and CPU time of redis-server per job, through 1, 4 and 16 simulated instances that are all busy,
each job followed by a stream; and what a deployment that does nothing asks of it. One gateway with its dispatcher inside, S3 on."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path

import redis.asyncio

from bench.caller import Caller, open_caller
from bench.deployment import open_fleet, open_gateway, open_servers
from bench.instances import make_all
from bench.measure import format_table

SIZES = (1, 4, 16)
JOBS = 160
RUN_S = 0.5
IDLE_S = 10.0


@dataclass(frozen=True, slots=True)
class Spent:
    """By redis-server since the last reset. Scripts' own commands are commands too."""

    commands: int
    scripts: int
    cpu_s: float


async def read_spent(url: str) -> Spent:
    async with redis.asyncio.Redis.from_url(url) as connection:
        stats, cpu = await connection.info("commandstats"), await connection.info("cpu")
    calls = {name.removeprefix("cmdstat_"): int(said["calls"]) for name, said in stats.items()}
    scripts = sum(calls.get(name, 0) for name in ("evalsha", "eval", "fcall"))
    return Spent(sum(calls.values()), scripts, float(cpu["used_cpu_user"]) + float(cpu["used_cpu_sys"]))


def subtract(one: Spent, other: Spent) -> Spent:
    return Spent(one.commands - other.commands, one.scripts - other.scripts, one.cpu_s - other.cpu_s)


async def _measure_jobs(caller: Caller, url: str, jobs: int) -> Spent:
    before = await read_spent(url)
    await make_all(caller, jobs, RUN_S)
    return subtract(await read_spent(url), before)


async def measure(state_dir: Path, size: int, jobs: int) -> list[str]:
    """A row of the table."""
    async with open_servers(state_dir, with_engine=False) as servers, open_fleet(state_dir, size) as fleet:
        async with open_gateway(servers, {"COMFYUI_URLS": ",".join(fleet.urls)}) as gateway, open_caller(gateway.url) as caller:
            await caller.wait_for_instances(size)
            await make_all(caller, 2, 0.0)
            before = await read_spent(servers.redis.url)
            await asyncio.sleep(IDLE_S)
            idle = subtract(await read_spent(servers.redis.url), before)
            spent = await _measure_jobs(caller, servers.redis.url, jobs)
    per_job = [f"{spent.commands / jobs:.0f}", f"{spent.scripts / jobs:.1f}", f"{spent.cpu_s / jobs * 1000:.2f}"]
    return [str(size), str(jobs), *per_job, f"{idle.commands / IDLE_S:.0f}", f"{idle.cpu_s / IDLE_S * 100:.2f}"]


async def run(state_dir: Path, share: float) -> None:
    """Print the table. `share` scales the jobs (1 is 160)."""
    jobs = max(16, round(JOBS * share))
    rows = [await measure(state_dir / str(size), size, jobs) for size in SIZES]
    titles = ("instances", "jobs", "commands/job", "scripts/job", "Redis CPU ms/job", "idle commands/s", "idle CPU %")
    print(format_table(titles, rows))
    print(
        f"  jobs of {RUN_S:g} s that tell two steps a second, each followed by its stream; idle is included in what a job costs", flush=True
    )
