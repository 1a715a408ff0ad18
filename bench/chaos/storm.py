"""One storm: jobs come, faults come, everything is mended, and the verdict is spoken."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import redis

from bench.chaos import verdict as court
from bench.chaos.clients import Crowd
from bench.chaos.plant import Plant, wait_until
from bench.chaos.schedule import Fault, Request, draw_faults, draw_requests
from bench.chaos.verdict import Verdict
from bench.measure import format_table
from local.child import ChildError

log = logging.getLogger(__name__)

# About half of what four engines make of these jobs undisturbed on two cores, so that the backlog of a fault is worked off.
JOBS_PER_S = 6.0
FAULT_PAUSE_S = (0.8, 2.4)


@dataclass(frozen=True)
class Storm:
    """What will happen: known before it begins."""

    seed: int
    requests: list[Request]
    faults: list[Fault]
    settle_s: float  # after the last fault, until every job has ended


def plan(seed: int, jobs: int, parts: list[str], gateways: int, jobs_per_s: float, fault_pause_s: tuple[float, float]) -> Storm:
    duration_s = jobs / jobs_per_s
    return Storm(
        seed, draw_requests(seed, jobs, duration_s, gateways), draw_faults(seed, parts, duration_s, fault_pause_s), 60 + jobs / jobs_per_s
    )


async def run_storm(
    folder: Path, seed: int, jobs: int, jobs_per_s: float = JOBS_PER_S, fault_pause_s: tuple[float, float] = FAULT_PAUSE_S
) -> Verdict:
    """The whole of it; a fault begins every `fault_pause_s`. Raises ChildError when a part cannot be started at all."""
    plant = Plant(folder)
    storm = plan(seed, jobs, list(plant.parts), len(plant.gateways), jobs_per_s, fault_pause_s)
    async with plant.run():
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=5)
        async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=60)) as session:
            crowd = Crowd(session, [gateway.url for gateway in plant.gateways], seed)
            await _blow(storm, plant, crowd)
            return await _judge(storm, plant, crowd, session)


async def _blow(storm: Storm, plant: Plant, crowd: Crowd) -> None:
    """Requests and faults at their times; then all is mended and the callers read to the end, or their time is up."""
    start = time.monotonic()

    async def at(moment_s: float) -> None:
        await asyncio.sleep(max(0.0, start + moment_s - time.monotonic()))

    async def ask(request: Request) -> None:
        await at(request.at_s)
        await crowd.ask_for(request)

    async def hit(fault: Fault) -> None:
        await at(fault.at_s)
        log.info("%6.2f %s %s for %.2f s", fault.at_s, fault.act, fault.part, fault.away_s)
        await plant.suffer(fault)

    callers = [asyncio.create_task(ask(request)) for request in storm.requests]
    try:
        async with asyncio.TaskGroup() as faults:
            for fault in storm.faults:
                faults.create_task(hit(fault))
        await plant.mend()
        await asyncio.wait(callers, timeout=max(0.0, start + storm.requests[-1].at_s - time.monotonic()) + storm.settle_s)
    finally:
        for caller in callers:
            caller.cancel()
        results = await asyncio.gather(*callers, return_exceptions=True)
    for result in results:
        if isinstance(result, Exception):
            raise result


async def _judge(storm: Storm, plant: Plant, crowd: Crowd, session: aiohttp.ClientSession) -> Verdict:
    found = Verdict()
    found.counts |= Counter({f"faults: {name}": count for name, count in count_faults(storm.faults).items()})
    with redis.Redis.from_url(plant.redis.url, decode_responses=True) as connection:
        # Who asked has been told; jobs that nobody was told of may still be at work.
        await wait_until(lambda: court.count_open(connection) == 0, 15)
        records = court.read_records(connection)
        court.judge_acceptance(found, crowd.sightings, records)
        court.judge_ends(found, records)
        court.judge_streams(found, crowd.sightings, records)
        court.judge_leftovers(found, connection)
    court.judge_runs(found, plant.journals(), records)
    await court.judge_pictures(found, crowd.sightings, session, plant.gateways[0].url)
    for name, part in plant.parts.items():
        try:
            part.check()
        except ChildError as error:
            found.wrongs.append(f"{name} ended by itself: {error}")
    found.wrongs += [f"a part ended by itself: {death}" for death in plant.deaths]
    return found


def count_faults(faults: list[Fault]) -> Counter[str]:
    """By act and kind of part."""
    return Counter(f"{fault.act} {fault.part.partition('-')[0]}" for fault in faults)


def describe(seed: int, found: Verdict, took_s: float) -> str:
    rows = [(name, str(count)) for name, count in sorted(found.counts.items()) if not name.startswith("faults: ")]
    faults = ", ".join(
        f"{count} {name.removeprefix('faults: ')}" for name, count in sorted(found.counts.items()) if name.startswith("faults: ")
    )
    lines = [format_table((f"seed {seed}, {took_s:.0f} s", ""), rows), f"  faults: {faults}"]
    if found.wrongs:
        lines += [f"  {len(found.wrongs)} WRONG:", *(f"    {wrong}" for wrong in found.wrongs[:40])]
    else:
        lines.append("  nothing lost, nothing twice, nothing out of order")
    return "\n".join(lines)
