"""Job records, the queue and the leases in Redis. Every change is one script, so that no crash leaves half of one.

Keys (all begin with `fluxgate:`):
  job:{id}                 hash: spec, status, lease, instance, ... one field each
  graph:{id}               the rendered graph, as submitted
  events:{id}              the job's event stream; `feed` is all of them, live
  jobs, jobs:{caller}      every job by time of making
  queue:{priority}:{caller}  who waits, by `sequence`; callers:{priority} says whose turn it is; `queued` is all that wait
  leases                   claimed jobs by the time their lease ends
  slots:{instance}         jobs that hold one of the instance's slots
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from gateway.jobs.model import EventKind, Job, JobSpec, JobStatus, now_ms
from gateway.redis_client import RedisClient, translate_redis

_JSON_FIELDS = ("progress", "outputs", "error", "metrics", "warm", "cached")
_PLAIN_FIELDS = ("status", "revision", "instance", "prompt_id", "attempts", "started_ms", "finished_ms")

EventDraft = tuple[EventKind, str, str]  # kind, status (or ""), data as JSON


@dataclass(slots=True)
class Claim:
    """A job, its graph as JSON, and the lease that makes the holder its only writer."""

    job: Job
    graph: bytes
    lease: str
    writes: int = 0

    @property
    def id(self) -> str:
        return self.job.id


def status_event(job: Job) -> EventDraft:
    """The event that tells a job's new status: the whole record as it is now."""
    return EventKind.STATUS, job.status.value, job.model_dump_json()


def _decode_job(fields: Mapping[bytes, bytes]) -> Job:
    record: dict[str, Any] = {"spec": json.loads(fields[b"spec"])}
    for name in _PLAIN_FIELDS:
        if (raw := fields.get(name.encode())) is not None:
            record[name] = raw.decode()
    for name in _JSON_FIELDS:
        if (raw := fields.get(name.encode())) is not None:
            record[name] = json.loads(raw)
    return Job.model_validate(record)


def _encode_fields(fields: Mapping[str, Any]) -> list[str]:
    """Flat (name, value) pairs; pydantic values as JSON."""
    flat: list[str] = []
    for name, value in fields.items():
        if hasattr(value, "model_dump_json"):
            text = value.model_dump_json()
        elif name in _JSON_FIELDS:
            text = json.dumps(value, default=lambda part: part.model_dump())
        else:
            text = str(value)
        flat += [name, text]
    return flat


def _pair_up(flat: list[bytes]) -> dict[bytes, bytes]:
    return dict(zip(flat[::2], flat[1::2], strict=True))


class JobStore:
    """All reads and writes of jobs. Raises RedisUnavailable, and nothing else of Redis's."""

    def __init__(self, redis: RedisClient, *, ttl_s: int, clock: Callable[[], int] | None = None) -> None:
        """`clock` gives milliseconds for leases; without one Redis's own clock decides."""
        self._redis = redis
        self._ttl_s = ttl_s
        self._clock = clock
        folder = files("gateway.jobs") / "lua"
        prelude = (folder / "_prelude.lua").read_text()

        def script(name: str) -> Any:
            return redis.register_script(prelude + (folder / f"{name}.lua").read_text())

        self._create, self._peek, self._claim = script("create"), script("peek"), script("claim")
        self._take_over, self._renew, self._update = script("take_over"), script("renew"), script("update")
        self._finish, self._requeue, self._cancel = script("finish"), script("requeue"), script("cancel")
        self._delete, self._position = script("delete"), script("position")

    def _now(self) -> str:
        return "" if self._clock is None else str(self._clock())

    # -- admission ---------------------------------------------------------------------------------------------

    @translate_redis
    async def create(self, spec: JobSpec, graph: bytes) -> Job:
        """Accept a job: record, place in the queue and first event, in one step."""
        job = Job(spec=spec)
        _, _, event = status_event(job)
        await self._create(args=[self._now(), spec.id, spec.caller, spec.priority, spec.created_ms, spec.model_dump_json(), graph, event])
        return job

    # -- reading -----------------------------------------------------------------------------------------------

    @translate_redis
    async def load(self, job_id: str) -> Job | None:
        fields = await self._redis.hgetall(f"fluxgate:job:{job_id}")
        return _decode_job(fields) if fields else None

    @translate_redis
    async def load_many(self, job_ids: Iterable[str]) -> list[Job]:
        """The jobs that still exist, in the order of the ids."""
        async with self._redis.pipeline(transaction=False) as pipeline:
            for job_id in job_ids:
                pipeline.hgetall(f"fluxgate:job:{job_id}")
            return [_decode_job(fields) for fields in await pipeline.execute() if fields]

    @translate_redis
    async def graph(self, job_id: str) -> bytes | None:
        """The graph as it was admitted, JSON."""
        graph: bytes | None = await self._redis.get(f"fluxgate:graph:{job_id}")
        return graph

    @translate_redis
    async def ids_before(self, caller: str, before: tuple[int, str] | None, limit: int) -> list[tuple[int, str]]:
        """A caller's jobs older than `before` = (created_ms, id), newest first, as such pairs."""
        highest = "+inf" if before is None else before[0]
        # Jobs of one millisecond share a score: ask for a few more and drop those already seen.
        entries = await self._redis.zrevrangebyscore(f"fluxgate:jobs:{caller}", highest, "-inf", 0, limit + 64, withscores=True)
        pairs = [(int(score), member.decode()) for member, score in entries]
        return [pair for pair in pairs if before is None or pair < before][:limit]

    @translate_redis
    async def depth(self) -> int:
        """Jobs that wait for a slot."""
        return int(await self._redis.zcard("fluxgate:queued"))

    @translate_redis
    async def position(self, job_id: str) -> int | None:
        """Jobs that go before this one, or None when it does not wait."""
        position = int(await self._position(args=[job_id]))
        return None if position < 0 else position

    # -- motion ------------------------------------------------------------------------------------------------

    @translate_redis
    async def peek(self, limit: int) -> list[str]:
        """The ids that are next in line, fair among callers."""
        return [job_id.decode() for job_id in await self._peek(args=[limit])]

    @translate_redis
    async def slots_used(self, instance: str) -> int:
        return int(await self._redis.scard(f"fluxgate:slots:{instance}"))

    @translate_redis
    async def claim(self, job_id: str, *, instance: str, lease: str, lease_s: float, slots: int, prompt_id: str) -> Claim | None:
        """Take a queued job for an instance; None when somebody else has it or the instance holds its share."""
        answer = await self._claim(args=[self._now(), job_id, instance, lease, int(lease_s * 1000), slots, prompt_id])
        return Claim(_decode_job(_pair_up(answer[1])), answer[2], lease) if answer[0] == 1 else None

    @translate_redis
    async def take_over(self, *, lease: str, lease_s: float, limit: int) -> list[Claim]:
        """Claim jobs whose lease ran out. Each still knows its instance and prompt_id: look there before submitting again."""
        answer = await self._take_over(args=[self._now(), lease, int(lease_s * 1000), limit])
        return [Claim(_decode_job(_pair_up(flat)), graph, lease) for flat, graph in answer]

    @translate_redis
    async def renew(self, claims: list[Claim], lease_s: float) -> dict[str, str]:
        """Each job's status now, `lost` where the lease is no longer ours."""
        pairs = [part for claim in claims for part in (claim.id, claim.lease)]
        answers = await self._renew(args=[self._now(), int(lease_s * 1000), *pairs])
        return {claim.id: answer.decode() for claim, answer in zip(claims, answers, strict=True)}

    @translate_redis
    async def release(self, claims: list[Claim]) -> None:
        """Let the leases run out now: whoever looks next takes the jobs over and resumes them where they are."""
        if claims:
            pairs = [part for claim in claims for part in (claim.id, claim.lease)]
            await self._renew(args=[self._now(), -1, *pairs])

    @translate_redis
    async def update(
        self, claim: Claim, fields: Mapping[str, Any], events: Iterable[EventDraft] = (), *, free_slot: bool = False, write: int
    ) -> str:
        """Write fields and events of a leased job. Returns its status, or `lost`. The same `write` number twice counts once."""
        flat = _encode_fields(fields)
        drafts = [part for event in events for part in event]
        answer = await self._update(args=[claim.id, claim.lease, write, int(free_slot), len(flat) // 2, *flat, *drafts])
        return str(answer.decode())

    @translate_redis
    async def finish(self, claim: Claim, job: Job, events: Iterable[EventDraft] = ()) -> bool:
        """End a leased job with the record given; False when it was not ours to end any more."""
        fields: dict[str, Any] = {
            "outputs": [output.model_dump() for output in job.outputs],
            "metrics": job.metrics,
            "progress": job.progress,
        }
        if job.error is not None:
            fields["error"] = job.error
        flat = _encode_fields(fields)
        drafts = [part for event in (*events, status_event(job)) for part in event]
        answer = await self._finish(
            args=[self._now(), claim.id, claim.lease, job.status.value, self._ttl_s, len(flat) // 2, *flat, *drafts]
        )
        return bool(answer)

    @translate_redis
    async def requeue(self, claim: Claim) -> str:
        """Give a job back to its place in line. Returns `queued`, or `canceling`/`lost` when that is not to be."""
        job = claim.job.model_copy(update={"status": JobStatus.QUEUED, "instance": None, "started_ms": None})
        answer = await self._requeue(args=[claim.id, claim.lease, status_event(job)[2]])
        return str(answer.decode())

    # -- callers' wishes ---------------------------------------------------------------------------------------

    @translate_redis
    async def cancel(self, job_id: str) -> str | None:
        """Cancel: gone at once while it waits, `canceling` while an instance has it, unchanged when it has ended. None: unknown."""
        while True:
            fields = await self._redis.hgetall(f"fluxgate:job:{job_id}")
            if not fields:
                return None
            job = _decode_job(fields)
            canceled = job.model_copy(update={"status": JobStatus.CANCELED, "finished_ms": now_ms()})
            canceling = job.model_copy(update={"status": JobStatus.CANCELING})
            drafts = [status_event(canceled)[2], status_event(canceling)[2]]
            answer = (await self._cancel(args=[self._now(), job_id, job.revision, self._ttl_s, *drafts])).decode()
            if answer != "stale":
                return answer or None

    @translate_redis
    async def delete(self, job_id: str) -> bool:
        """Forget a job that has ended; False while it still lives."""
        return int(await self._delete(args=[job_id])) != 0
