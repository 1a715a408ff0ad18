"""The same graph once more, and whether the same pictures came of it."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from PIL import Image, ImageChops, ImageStat

from gateway.admission import Admission
from gateway.errors import Conflict, NotFound, Unprocessable
from gateway.jobs.model import Job, JobSpec, JobStatus, new_input_file, new_job_id, now_ms
from gateway.jobs.records import IdempotencyKey, Item
from gateway.jobs.store import JobStore
from gateway.presentation import present_manifest
from gateway.storage import Storage


class Difference(NamedTuple):
    """How two pictures differ, in steps of 255 per channel; None where they cannot be laid on one another."""

    same_bytes: bool
    same_pixels: bool
    max_difference: float | None
    mean_difference: float | None


def compare_pictures(one: bytes, other: bytes) -> Difference:
    """By their pixels: files of the same pixels differ by the graph that ComfyUI writes into them."""
    if one == other:
        return Difference(True, True, 0.0, 0.0)
    try:
        with Image.open(io.BytesIO(one)) as first, Image.open(io.BytesIO(other)) as second:
            if first.size != second.size or first.mode != second.mode:
                return Difference(False, False, None, None)
            difference = ImageChops.difference(first, second)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return Difference(False, False, None, None)
    extrema = difference.getextrema()
    bands = extrema if isinstance(extrema[0], tuple) else (extrema,)
    greatest = max(float(high) for _, high in bands)
    means = ImageStat.Stat(difference).mean
    return Difference(False, greatest == 0, greatest, round(sum(means) / len(means), 6))


class Reproduction:
    """Raises Conflict, NotFound, NoInstance, TooManyRequests, StorageUnavailable."""

    def __init__(self, admission: Admission, store: JobStore, storage: Storage) -> None:
        self._admission, self._store, self._storage = admission, store, storage

    async def run_again(self, original: Job, key: IdempotencyKey | None = None) -> tuple[Job, bool]:
        """A new job with the graph that was stored, under new names; nothing that was made before answers it.

        With a `key` seen before, the job is that of the first request, and the second answer says so.
        """
        _require_success(original)
        graph = await self._store.graph(original.id)
        if graph is None:
            raise NotFound(f"The graph of {original.id!r} is no longer kept.", code="job_not_found")
        await self._admission.require_graph(json.loads(graph), original.spec.caller, original.spec.workflow)
        spec, graph = _rename(original.spec, graph)
        await self._admission.check_fleet(await self._admission.needs_beside_published(spec.needs))
        job, admitted = await self._admission.enqueue(Item(spec, graph, reuse=False), key)
        if admitted.job_id == job.id:
            return job, False
        return await self._store.load(admitted.job_id) or job, True

    async def compare(self, job: Job) -> dict[str, Any]:
        """How the pictures of a job that runs another one again differ from that one's."""
        if job.spec.reproduces is None:
            hint = "POST /v1/generations/{id}/reproduce makes one."
            raise Unprocessable(f"{job.id} runs no other job again.", code="no_reproduction", hint=hint)
        original = await self._store.load(job.spec.reproduces)
        if original is None:
            raise NotFound(f"{job.spec.reproduces!r} is no longer kept.", code="job_not_found")
        _require_success(job)
        _require_success(original)
        pairs = list(zip(original.outputs, job.outputs, strict=False))
        pictures = [await self._compare_one(before.key, after.key) for before, after in pairs]
        same_count = len(original.outputs) == len(job.outputs)
        changed, unknown = _compare_manifests(original, job)
        same = same_count and all(one.same_pixels for one in pictures)
        return {
            "object": "comparison",
            "job": job.id,
            "original": original.id,
            "same_pixels": same,
            "message": _describe(same, same_count, pictures, changed, unknown),
            "pictures": [{"index": index, **one._asdict()} for index, one in enumerate(pictures)],
            "changed": changed,
            "unverified": unknown,
        }

    async def _compare_one(self, before: str, after: str) -> Difference:
        one, other = await asyncio.gather(self._storage.get(before), self._storage.get(after))
        return await asyncio.to_thread(compare_pictures, one, other)


def _require_success(job: Job) -> None:
    if job.status is not JobStatus.SUCCEEDED:
        details = {"status": job.status}
        raise Conflict(f"{job.id} is {job.status}: there are no pictures to compare.", code="job_not_succeeded", details=details)


def _rename(spec: JobSpec, graph: bytes) -> tuple[JobSpec, bytes]:
    """The spec and the graph of a new job that makes the same."""
    job_id = new_job_id()
    inputs = tuple(given.model_copy(update={"file": new_input_file(given.file.rpartition(".")[2])}) for given in spec.inputs)
    graph = graph.replace(spec.id.encode(), job_id.encode())
    for before, after in zip(spec.inputs, inputs, strict=True):
        graph = graph.replace(before.file.encode(), after.file.encode())
    fresh = {"id": job_id, "inputs": inputs, "created_ms": now_ms(), "reproduces": spec.id}
    return spec.model_copy(update={**fresh, "cache_key": None, "webhook": None, "batch": None, "batch_index": None}), graph


def _compare_manifests(original: Job, job: Job) -> tuple[dict[str, list[Any]], list[str]]:
    """(what differs, as [before, now]; files whose content nobody told, so that they may differ)"""
    one, other = (found.made_on.model_dump(exclude={"models"}) if found.made_on else {} for found in (original, job))
    changed = {name: [one.get(name), other.get(name)] for name in {**one, **other} if one.get(name) != other.get(name)}
    before, now = (found.made_on.models if found.made_on else {} for found in (original, job))
    changed |= {file: [before[file], now[file]] for file in before.keys() & now.keys() if before[file] != now[file]}
    unknown = {model["file"] for found in (original, job) for model in present_manifest(found)["models"] if model["sha256"] is None}
    return changed, sorted(unknown)


def _describe(same: bool, same_count: bool, pictures: Sequence[Difference], changed: dict[str, list[Any]], unknown: list[str]) -> str:
    if same:
        return f"Every pixel of {len(pictures)} {'picture is' if len(pictures) == 1 else 'pictures is'} the same."
    if not same_count:
        return "The two jobs have different numbers of pictures."
    if any(one.max_difference is None for one in pictures):
        return "The pictures differ in size or kind, or one of them cannot be read."
    greatest = max(one.max_difference or 0.0 for one in pictures)
    mean = max(one.mean_difference or 0.0 for one in pictures)
    said = f"The pixels differ: by at most {greatest:g} of 255, {mean:.3g} on average."
    if changed:
        told = ", ".join(f"{name} was {before}, is {now}" for name, (before, now) in sorted(changed.items()))
        return f"{said} What was used differs too: {told}."
    said = f"{said} Nothing that is recorded differs; some samplers and GPU kernels do not repeat exactly."
    return f"{said} The content of {', '.join(unknown)} was not recorded and may have changed." if unknown else said
