"""After the storm: is everything accounted for? Reads Redis, the engines' journals, the pictures, and what the callers saw."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import aiohttp
from PIL import Image

from bench.chaos.clients import TERMINAL, Sighting
from bench.chaos.engine import Entry, read_journal

# redis-py types each answer as the union of all it could be under other settings; ours are text.
Connection: TypeAlias = Any

# Why a job may fail although nobody did anything wrong: the storm took it too often.
HONEST_FAILURES = frozenset({"instance_lost", "too_many_attempts", "upload_failed", "no_progress", "timeout", "queue_timeout"})
# Keys of the store that must be empty when no job lives.
LEFTOVERS = ("fluxgate:leases", "fluxgate:queued", "fluxgate:deadlines", "fluxgate:callers:*", "fluxgate:slots:*", "fluxgate:queue:*")
LEFTOVERS_OF_JOBS = ("fluxgate:active:*", "fluxgate:followers:*", "fluxgate:twin:*")


@dataclass
class Verdict:
    """Counts for the table, and every broken promise in words."""

    counts: Counter[str] = field(default_factory=Counter)
    wrongs: list[str] = field(default_factory=list)

    def require(self, holds: bool, wrong: str) -> None:
        if not holds:
            self.wrongs.append(wrong)


@dataclass(frozen=True)
class Record:
    """A job as Redis keeps it."""

    job_id: str
    fields: dict[str, str]
    events: list[tuple[str, str, dict[str, Any]]]  # id, kind, data

    @property
    def status(self) -> str:
        return self.fields["status"]

    @property
    def is_cached(self) -> bool:
        return self.fields.get("cached") == "true"


def position(event_id: str) -> tuple[int, int]:
    milliseconds, _, sequence = event_id.partition("-")
    return int(milliseconds), int(sequence)


def read_records(connection: Connection) -> dict[str, Record]:
    """Every job there is."""
    records = {}
    for job_id in connection.zrange("fluxgate:jobs", 0, -1):
        entries = connection.xrange(f"fluxgate:events:{job_id}")
        events = [(entry, data["k"], json.loads(data["d"])) for entry, data in entries]
        records[job_id] = Record(job_id, connection.hgetall(f"fluxgate:job:{job_id}"), events)
    return records


def count_open(connection: Connection) -> int:
    """Accepted jobs that have not ended."""
    statuses = [connection.hget(f"fluxgate:job:{job_id}", "status") for job_id in connection.zrange("fluxgate:jobs", 0, -1)]
    return sum(status not in TERMINAL for status in statuses)


def judge_acceptance(verdict: Verdict, sightings: list[Sighting], records: dict[str, Record]) -> None:
    """Each request has one job, also when it was sent several times; no job is there that nobody asked for."""
    accepted = [sighting for sighting in sightings if sighting.job_id]
    verdict.counts["requests"] = len(sightings)
    verdict.counts["accepted"] = len(accepted)
    verdict.counts["submissions sent again"] = sum(sighting.tries - 1 for sighting in sightings)
    for sighting in sightings:
        for complaint in sighting.complaints:
            verdict.wrongs.append(f"request {sighting.request.number} ({sighting.job_id or 'no job'}): {complaint}")
    known = {sighting.job_id for sighting in accepted}
    verdict.require(len(known) == len(accepted), "two requests share a job")
    for job_id in known - records.keys():
        verdict.wrongs.append(f"{job_id} was accepted and is not there any more")
    for job_id in records.keys() - known:
        verdict.wrongs.append(f"{job_id} is there and nobody was told of it")


def judge_ends(verdict: Verdict, records: dict[str, Record]) -> None:
    """Every job has ended, told so once, and last."""
    for record in records.values():
        verdict.counts[record.status] += 1
        verdict.counts["answered by a twin"] += record.is_cached
        verdict.counts["attempts beyond the first"] += max(0, int(record.fields.get("attempts", 0)) - 1)
        verdict.counts["takeovers"] += int(record.fields.get("takeovers", 0))
        verdict.require(record.status in TERMINAL, f"{record.job_id} is {record.status}")
        if record.status == "failed":
            error = json.loads(record.fields["error"])
            verdict.counts[f"failed: {error['code']}"] += 1
            verdict.require(error["code"] in HONEST_FAILURES, f"{record.job_id} failed with {error['code']}: {error['message']}")
        positions = [position(event_id) for event_id, _, _ in record.events]
        verdict.require(positions == sorted(set(positions)), f"the stored stream of {record.job_id} is out of order")
        ends = [data["status"] for _, kind, data in record.events if kind == "status" and data["status"] in TERMINAL]
        verdict.require(ends == [record.status], f"{record.job_id} is {record.status} and told these ends: {ends}")
        last = record.events[-1] if record.events else None
        verdict.require(
            last is not None and last[1] == "status" and last[2]["status"] in TERMINAL, f"{record.job_id} goes on after its end"
        )


def judge_streams(verdict: Verdict, sightings: Iterable[Sighting], records: dict[str, Record]) -> None:
    """What callers saw, over all their visits, is the stored stream: whole, in order, each event once."""
    for sighting in sightings:
        record = records.get(sighting.job_id)
        if record is None:
            continue
        verdict.counts["events seen live"] += len(sighting.seen)
        verdict.counts["streams broken and followed again"] += max(0, sighting.visits - 1)
        seen = [event_id for event_id, _, _ in sighting.seen]
        verdict.require(len(seen) == len(set(seen)), f"a caller of {record.job_id} saw an event twice")
        verdict.require(sorted(seen, key=position) == seen, f"a caller of {record.job_id} saw events out of order")
        stored = [event_id for event_id, _, _ in record.events]
        if seen != stored and len(seen) == len(set(seen)):
            lacks, extra = sorted(set(stored) - set(seen)), sorted(set(seen) - set(stored))
            verdict.wrongs.append(f"a caller of {record.job_id} missed {lacks[:3]} and saw {extra[:3]} beside the stored stream")


def judge_runs(verdict: Verdict, journals: Iterable[Path], records: dict[str, Record]) -> None:
    """No prompt began twice; the one that a success rests on began once and ended well."""
    entries: list[Entry] = [entry for journal in journals for entry in read_journal(journal)]
    starts = Counter(entry.prompt_id for entry in entries if entry.word == "start")
    ended_well = {entry.prompt_id for entry in entries if entry.word == "success"}
    runs = Counter(entry.job_id for entry in entries if entry.word == "start")
    whole_runs = Counter(entry.job_id for entry in entries if entry.word == "success")
    verdict.counts["prompts begun"] = sum(starts.values())
    verdict.counts["pictures made in vain"] = sum(whole_runs.values()) - sum(
        record.status == "succeeded" and not record.is_cached for record in records.values()
    )
    for prompt_id, count in starts.items():
        verdict.require(count == 1, f"prompt {prompt_id} began {count} times")
    for record in records.values():
        attempts = int(record.fields.get("attempts", 0))
        verdict.require(runs[record.job_id] <= attempts, f"{record.job_id} began {runs[record.job_id]} times in {attempts} attempts")
        if record.status == "succeeded" and not record.is_cached:
            prompt_id = record.fields.get("prompt_id", "")
            verdict.require(starts[prompt_id] == 1 and prompt_id in ended_well, f"{record.job_id} succeeded without prompt {prompt_id}")
    for job_id in runs.keys() - records.keys():
        verdict.wrongs.append(f"{job_id} ran and is no job")


def judge_leftovers(verdict: Verdict, connection: Connection) -> None:
    """Nothing in Redis still waits for a job that has ended."""
    for pattern in (*LEFTOVERS, *LEFTOVERS_OF_JOBS):
        for key in connection.scan_iter(pattern, count=1000):
            verdict.wrongs.append(f"{key} is left over")


async def judge_pictures(verdict: Verdict, sightings: Iterable[Sighting], session: aiohttp.ClientSession, frontend: str) -> None:
    """Every success has its pictures: as many, as large and of the colour that was asked for, byte for byte those that it tells of."""
    turn = asyncio.Semaphore(8)

    async def judge(sighting: Sighting) -> None:
        async with turn:
            async with session.get(f"{frontend}/v1/generations/{sighting.job_id}") as answer:
                job = await answer.json()
            if job["status"] != "succeeded":
                verdict.require(not job["outputs"], f"{sighting.job_id} is {job['status']} and has pictures")
                return
            body = sighting.request.body
            wanted = int(body["num_images"])
            verdict.require(len(job["outputs"]) == wanted, f"{sighting.job_id} has {len(job['outputs'])} pictures of {wanted}")
            for output in job["outputs"]:
                async with session.get(output["url"]) as answer:
                    picture = await answer.read()
                wrong = _find_fault(picture, output, int(body["size"]), int(body["color"]))
                verdict.require(wrong is None, f"picture {output['index']} of {sighting.job_id}: {wrong}")
                verdict.counts["pictures right"] += wrong is None

    await asyncio.gather(*(judge(sighting) for sighting in sightings if sighting.job_id))


def _find_fault(picture: bytes, output: dict[str, Any], side: int, color: int) -> str | None:
    if hashlib.sha256(picture).hexdigest() != output["sha256"]:
        return f"its URL gives other bytes: {picture[:80]!r}"
    with Image.open(io.BytesIO(picture)) as image:
        image.load()
        wanted = [(side * side, (color >> 16, color >> 8 & 255, color & 255))]
        if image.size != (side, side) or image.convert("RGB").getcolors() != wanted:
            return f"{image.size} of {image.convert('RGB').getcolors()} where {side} px of {wanted} was asked for"
    return None
