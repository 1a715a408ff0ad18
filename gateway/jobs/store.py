"""Job records, the queue and the leases in Redis. Every change is one script, so that no crash leaves half of one.

Keys (all begin with `fluxgate:`):
  job:{id}                 hash: spec, status, lease, instance, ... one field each
  graph:{id}               the rendered graph, as submitted
  events:{id}              the job's event stream; `feed` is all of them, live
  jobs, jobs:{caller}      every job by time of making
  queue:{priority}:{caller}  who waits, by `sequence`; callers:{priority} says whose turn it is; `queued` is all that wait
  leases                   claimed jobs by the time their lease ends
  slots:{instance}         jobs that hold one of the instance's slots; warm:{instance} is what the last of them loads
  active:{caller}          a caller's unfinished jobs
  webhooks                 ended jobs whose end is still to be told, by the time of the next try
  deadlines                waiting jobs by the time their wait is up
  cache:{twin}             the finished job that made this; twin:{twin} the one that is at it, followers:{id} those that wait for it
  idempotency:{caller}:{key}  body hash, job and answer of the first request with that key
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from gateway.errors import TooManyRequests
from gateway.jobs.ends import Ends
from gateway.jobs.gathering import Gathering
from gateway.jobs.model import Job, JobError, JobSpec, JobStatus, now_ms
from gateway.jobs.records import (
    IDEMPOTENCY_TTL_S,
    Admitted,
    Claim,
    EventDraft,
    IdempotencyKey,
    Limits,
    Load,
    Made,
    decode_job,
    describe_refusal,
    encode_fields,
    output_events,
    pair_up,
    private_webhook,
    status_event,
)
from gateway.jobs.scripts import load_scripts
from gateway.pricing import Measurement, read_measurement
from gateway.redis_client import RedisClient, read_index, translate_redis

# No job waits and runs longer than that, so that a record made so long before its own ttl has expired.
LONGEST_LIFE_S = 14 * 24 * 3600
# Of one workflow and base model: several sizes and devices, each a few times.
MEASUREMENTS = 200


class JobStore:
    """All reads and writes of jobs. Raises RedisUnavailable, and nothing else of Redis's."""

    def __init__(
        self,
        redis: RedisClient,
        *,
        ttl_s: int,
        cache_ttl_s: int = 0,
        limits: Limits | None = None,
        clock: Callable[[], int] | None = None,
    ) -> None:
        """`clock` gives milliseconds for leases; without one Redis's own clock decides."""
        self._redis = redis
        self._ttl_s, self._cache_ttl_s, self._limits = ttl_s, cache_ttl_s, limits or Limits()
        self._clock = clock
        self.ends = Ends()
        self._create, self._create_finished, self._delete = load_scripts(redis, "create", "create_finished", "delete")
        self._peek, self._claim, self._position, self._take_over = load_scripts(redis, "peek", "claim", "position", "take_over")
        self._renew, self._finish, self._requeue, self._end_waiting_script = load_scripts(
            redis, "renew", "finish", "requeue", "end_waiting"
        )
        self._update = Gathering(*load_scripts(redis, "update"))

    def _now(self) -> str:
        return "" if self._clock is None else str(self._clock())

    # -- admission ---------------------------------------------------------------------------------------------

    @translate_redis
    async def create(self, spec: JobSpec, graph: bytes, *, reuse: bool = False, key: IdempotencyKey | None = None) -> Admitted:
        """Accept a job: record, place in the queue, first event and idempotency key, in one step.

        With `reuse` an identical job in the cache or in flight may do the work. Raises TooManyRequests when the queue is full.
        """
        event = status_event(Job(spec=spec))[2]
        deadline_ms = spec.created_ms + int(spec.queue_timeout_s * 1000)
        answer = await self._create(
            args=[
                *(self._now(), spec.id, spec.caller, spec.priority, spec.created_ms, spec.model_dump_json(), graph, event),
                *(deadline_ms, spec.cache_key or "", int(reuse), self._limits.queue_depth, self._limits.jobs_per_caller),
                *self._idempotency_args(key),
                spec.created_ms - (self._ttl_s + LONGEST_LIFE_S) * 1000,
                *(private_webhook(spec), *_batch_args(spec), self._limits.gpu_seconds_per_day),
            ]
        )
        return self._admitted(spec, [part.decode() if isinstance(part, bytes) else part for part in answer], key)

    @translate_redis
    async def create_finished(self, job: Job, graph: bytes, *, key: IdempotencyKey | None = None) -> Admitted:
        """Accept a job that is answered already."""
        outputs = json.dumps([output.model_dump() for output in job.outputs])
        answer = await self._create_finished(
            args=[
                *(self._now(), job.id, job.spec.caller, job.spec.created_ms, job.spec.model_dump_json(), graph, outputs),
                self._ttl_s,
                *self._idempotency_args(key),
                *(private_webhook(job.spec), *_batch_args(job.spec), job.made_on.model_dump_json() if job.made_on else ""),
                *(part for draft in (*output_events(job), status_event(job)) for part in draft),
            ]
        )
        return self._admitted(job.spec, [part.decode() for part in answer], key)

    @staticmethod
    def _idempotency_args(key: IdempotencyKey | None) -> list[Any]:
        return [key.record, key.body_hash, IDEMPOTENCY_TTL_S] if key else ["", "", 0]

    def _admitted(self, spec: JobSpec, answer: list[Any], key: IdempotencyKey | None) -> Admitted:
        outcome = answer[0]
        if outcome == "queue_full":
            raise TooManyRequests(
                f"{answer[1]} jobs wait already.", code="queue_full", retry_after_s=30, details={"allowed": self._limits.queue_depth}
            )
        if outcome in ("caller_full", "gpu_spent"):
            raise describe_refusal(outcome, int(answer[1]), int(answer[2]))
        if outcome == "replay":
            assert key is not None, "only a request with a key can be a replay"
            key.require_same_body(answer[1])
            return Admitted("replay", answer[2])
        return Admitted(outcome, answer[1] if outcome == "cached" else spec.id)

    @translate_redis
    async def find_replay(self, key: IdempotencyKey) -> tuple[str, bytes | None] | None:
        """(job id, recorded answer) of an earlier request with this key. Raises Unprocessable when its body was another."""
        known = await self._redis.hmget(key.record, "hash", "job", "answer")
        if known[0] is None:
            return None
        key.require_same_body(known[0].decode())
        return known[1].decode(), known[2]

    @translate_redis
    async def record_answer(self, key: IdempotencyKey, answer: bytes) -> bytes | None:
        """Keep the answer that replays give. The first one stands: it is returned where a twin that came at the same time gave it."""
        if await self._redis.hsetnx(key.record, "answer", answer):
            return None
        known: bytes | None = await self._redis.hget(key.record, "answer")
        return known

    @translate_redis
    async def forget_cached(self, cache_key: str) -> None:
        """What the cache points at is gone."""
        await self._redis.delete(f"fluxgate:cache:{cache_key}")

    # -- reading -----------------------------------------------------------------------------------------------

    @translate_redis
    async def load(self, job_id: str) -> Job | None:
        fields = await self._redis.hgetall(f"fluxgate:job:{job_id}")
        return decode_job(fields) if fields else None

    @translate_redis
    async def load_many(self, job_ids: Iterable[str]) -> list[Job]:
        """The jobs that still exist, in the order of the ids."""
        async with self._redis.pipeline(transaction=False) as pipeline:
            for job_id in job_ids:
                pipeline.hgetall(f"fluxgate:job:{job_id}")
            return [decode_job(fields) for fields in await pipeline.execute() if fields]

    @translate_redis
    async def graph(self, job_id: str) -> bytes | None:
        """The graph as it was admitted, JSON."""
        graph: bytes | None = await self._redis.get(f"fluxgate:graph:{job_id}")
        return graph

    @translate_redis
    async def ids_before(self, caller: str, before: tuple[int, str] | None, limit: int) -> list[tuple[int, str]]:
        """A caller's jobs older than `before` = (created_ms, id), newest first, as such pairs."""
        return await read_index(self._redis, f"fluxgate:jobs:{caller}", before, limit)

    @translate_redis
    async def depth(self) -> int:
        """Jobs that wait for a slot."""
        return int(await self._redis.zcard("fluxgate:queued"))

    @translate_redis
    async def oldest_ms(self) -> int | None:
        """When the first in line was accepted; None when nobody waits."""
        for job_id in await self._redis.zrange("fluxgate:queued", 0, 0):
            if (raw := await self._redis.hget(f"fluxgate:job:{job_id.decode()}", "spec")) is not None:
                return JobSpec.model_validate_json(raw).created_ms
        return None

    @translate_redis
    async def position(self, job_id: str) -> int | None:
        """Jobs that go before this one, or None when it does not wait."""
        position = int(await self._position(args=[job_id]))
        return None if position < 0 else position

    @translate_redis
    async def position_of_next(self, caller: str, priority: str) -> int:
        """Jobs that would go before one that this caller made now."""
        return int(await self._position(args=["", priority, caller]))

    @translate_redis
    async def record_measurements(self, measured: Mapping[tuple[str, str], Sequence[Measurement]]) -> None:
        """Remember how long jobs ran, by (workflow, base model); the newest MEASUREMENTS of each are kept."""
        async with self._redis.pipeline(transaction=False) as pipeline:
            for (workflow, base_model), found in measured.items():
                key = f"fluxgate:measured:{workflow}:{base_model}"
                pipeline.lpush(key, *(one.dump() for one in found))
                pipeline.ltrim(key, 0, MEASUREMENTS - 1)
            await pipeline.execute()

    @translate_redis
    async def measurements(self, workflow: str, base_model: str) -> list[Measurement]:
        """How long the newest jobs of this kind ran."""
        return [read_measurement(raw) for raw in await self._redis.lrange(f"fluxgate:measured:{workflow}:{base_model}", 0, -1)]

    @translate_redis
    async def twins(self, cache_key: str) -> tuple[str | None, str | None]:
        """(the finished job that made this, the unfinished one that is at it)"""
        found = await self._redis.mget(f"fluxgate:cache:{cache_key}", f"fluxgate:twin:{cache_key}")
        source, leader = (raw.decode() if raw else None for raw in found)
        return source, leader

    # -- motion ------------------------------------------------------------------------------------------------

    @translate_redis
    async def peek(self, limit: int, instances: Sequence[str] = ()) -> tuple[list[str], dict[str, Load]]:
        """The ids that are next in line, fair among callers, and what each of the instances holds, at one moment."""
        answer = await self._peek(args=[limit, *instances])
        loads = {
            instance: Load(int(used), base_model.decode() or None, frozenset(json.loads(loras)), tuple(map(frozenset, json.loads(recent))))
            for instance, (used, base_model, loras, recent) in zip(instances, answer[1:], strict=True)
        }
        return [job_id.decode() for job_id in answer[0]], loads

    @translate_redis
    async def forget_warm(self, instance: str) -> None:
        """Nothing is loaded there any more."""
        await self._redis.delete(f"fluxgate:warm:{instance}")

    @translate_redis
    async def slots_used(self, instance: str) -> int:
        """Jobs of all processes that hold a slot there."""
        return int(await self._redis.scard(f"fluxgate:slots:{instance}"))

    @translate_redis
    async def claim(
        self,
        job_id: str,
        *,
        instance: str,
        lease: str,
        lease_s: float,
        slots: int,
        prompt_id: str,
        base_model: str,
        lora_files: Iterable[str],
        recent_loras: Sequence[Iterable[str]] = (),
        left: Sequence[Claim] = (),
        made: Made | None = None,
    ) -> Claim | None:
        """Take a queued job for an instance; None when somebody else has it, or the instance holds its share or drains.

        `base_model` to `recent_loras` is what the instance will have loaded then, for the others to know (`Load`). Jobs that have `left` it
        give their slots up in the same step. Who has the job as it was `made` is not told it again.
        """
        loras, recent = json.dumps(sorted(lora_files)), json.dumps([sorted(files) for files in recent_loras])
        asked_s, lease_ms = time.monotonic(), int(lease_s * 1000)
        leases = [part for claim in left for part in (claim.id, claim.lease)]
        fixed = [self._now(), job_id, instance, lease, lease_ms, slots, prompt_id, base_model, loras, recent, int(made is not None)]
        answer = await self._claim(args=[*fixed, *leases])
        for claim in left:
            claim.holds_slot = False
        if answer[0] == 1:
            return Claim(decode_job(pair_up(answer[1])), answer[2], lease, cached_in=answer[3].decode() or None, asked_s=asked_s)
        if answer[0] != 2 or made is None:
            return None
        claimed = {"instance": instance, "prompt_id": prompt_id, "claimed_ms": answer[1], "attempts": 1, "revision": 1}
        job = made.job.model_copy(update=claimed)
        return Claim(job, made.graph, lease, cached_in=answer[2].decode() or None, asked_s=asked_s)

    @translate_redis
    async def overdue(self, limit: int) -> list[str]:
        """Ids of waiting jobs whose time in the queue is up."""
        now = self._clock() if self._clock else now_ms()
        return [job_id.decode() for job_id in await self._redis.zrangebyscore("fluxgate:deadlines", "-inf", now, 0, limit)]

    @translate_redis
    async def take_over(
        self, *, lease: str, lease_s: float, limit: int, instances: Iterable[str] = (), foreign_s: float = 0.0
    ) -> list[Claim]:
        """Claim jobs whose lease ran out. Each still knows its instance and prompt_id: look there before submitting again.

        Who cannot look there, as it is none of `instances`, gets a job only once its lease has been out for `foreign_s`.
        """
        answer = await self._take_over(args=[self._now(), lease, int(lease_s * 1000), limit, int(foreign_s * 1000), *instances])
        return [Claim(decode_job(pair_up(flat)), graph, lease) for flat, graph in answer]

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
        flat = encode_fields(fields)
        drafts = [part for event in events for part in event]
        answer = await self._update.call([claim.id, claim.lease, write, int(free_slot), len(flat) // 2, len(drafts) // 3, *flat, *drafts])
        return str(answer.decode())

    @translate_redis
    async def finish(self, claim: Claim, job: Job, events: Iterable[EventDraft] = ()) -> bool:
        """End a leased job with the record given; False when it was not ours to end any more."""
        fields: dict[str, Any] = {
            "outputs": [output.model_dump() for output in job.outputs],
            "metrics": job.metrics,
            "progress": job.progress,
            "cached": job.cached,
        }
        if job.started_ms is not None:
            # Of a quick job the end is the first that is written.
            fields |= {"started_ms": job.started_ms, "warm": job.warm}
        if job.error is not None:
            fields["error"] = job.error
        if job.lora is not None:
            fields["lora"] = job.lora
        if job.made_on is not None:
            fields["made_on"] = job.made_on
        flat = encode_fields(fields)
        drafts = [part for event in (*events, status_event(job)) for part in event]
        answer = await self._finish(
            args=[self._now(), claim.id, claim.lease, job.status.value, self._ttl_s, self._cache_ttl_s, len(flat) // 2, *flat, *drafts]
        )
        if answer:
            self.ends.tell(job)
        return bool(answer)

    @translate_redis
    async def requeue(self, claim: Claim, *, avoid: tuple[str, ...] = ()) -> str:
        """Give a job back to its place in line. Returns `queued`, or `canceling`/`lost` when that is not to be."""
        job = claim.job.model_copy(update={"status": JobStatus.QUEUED, "instance": None, "started_ms": None, "avoid": avoid})
        answer = await self._requeue(args=[claim.id, claim.lease, json.dumps(avoid), status_event(job)[2]])
        return str(answer.decode())

    # -- callers' wishes ---------------------------------------------------------------------------------------

    @translate_redis
    async def cancel(self, job_id: str) -> str | None:
        """Cancel: gone at once while it waits, `canceling` while an instance has it, unchanged when it has ended. None: unknown."""
        return await self._end_waiting(job_id, JobStatus.CANCELED, None, stop_leased=True)

    @translate_redis
    async def expire(self, job_id: str, error: JobError) -> str | None:
        """End a job whose time in the queue is up; one that was claimed meanwhile is left alone."""
        return await self._end_waiting(job_id, JobStatus.EXPIRED, error, stop_leased=False)

    async def _end_waiting(self, job_id: str, status: JobStatus, error: JobError | None, *, stop_leased: bool) -> str | None:
        while True:
            fields = await self._redis.hgetall(f"fluxgate:job:{job_id}")
            if not fields:
                return None
            job = decode_job(fields)
            ended = job.model_copy(update={"status": status, "finished_ms": now_ms(), "error": error})
            canceling = status_event(job.model_copy(update={"status": JobStatus.CANCELING}))[2] if stop_leased else ""
            fixed = [self._now(), job_id, job.revision, self._ttl_s, status.value, status_event(ended)[2]]
            answer = (await self._end_waiting_script(args=[*fixed, error.model_dump_json() if error else "", canceling])).decode()
            if answer != "stale":
                return answer or None

    @translate_redis
    async def delete(self, job_id: str) -> bool:
        """Forget a job that has ended, or that is unknown; False while it still lives."""
        return int(await self._delete(args=[job_id])) != 0


def _batch_args(spec: JobSpec) -> tuple[str, int]:
    return (spec.batch, spec.batch_index or 0) if spec.batch else ("", 0)
