"""Training jobs in Redis: the same records, events and endings as generations, but leased by trainer workers and queued by RQ."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from gateway.jobs.model import Job, JobSpec
from gateway.jobs.records import Admitted, Claim, IdempotencyKey, Limits, decode_job, pair_up, private_webhook, status_event
from gateway.jobs.scripts import load_scripts
from gateway.jobs.store import JobStore
from gateway.redis_client import RedisClient, read_index, translate_redis

# What a job of the worker's is about, in its spec's `workflow`.
TRAINING, CAPTIONING, IMPORT = "training", "captioning", "lora_import"
IMPORT_ID = "imp"  # what ids of imports begin with


class TrainingStore(JobStore):
    """A JobStore that also makes and claims trainings. Updating, finishing, canceling and reading are the same."""

    def __init__(self, redis: RedisClient, *, ttl_s: int, limits: Limits | None = None, clock: Callable[[], int] | None = None) -> None:
        super().__init__(redis, ttl_s=ttl_s, limits=limits, clock=clock)
        names = ("create_training", "claim_training", "lost_trainings")
        self._create_training, self._claim_training, self._lost_trainings = load_scripts(redis, *names)

    @translate_redis
    async def create_training(self, spec: JobSpec, *, key: IdempotencyKey | None = None, source: str = "") -> Admitted:
        """Accept a training. It still has to be put into the worker's queue; one that is not is found by `lost`.

        `source` is for the worker alone and gone when the job ends, whatever way: a URL may hold a key.
        """
        event = status_event(Job(spec=spec))[2]
        answer = await self._create_training(
            args=[
                *(self._now(), spec.id, spec.caller, spec.created_ms, spec.model_dump_json(), event, self._limits.jobs_per_caller),
                *self._idempotency_args(key),
                *(private_webhook(spec), self._limits.gpu_seconds_per_day, source),
            ]
        )
        parts = [part.decode() if isinstance(part, bytes) else part for part in answer]
        return self._admitted(spec, parts, key)

    @translate_redis
    async def source_of(self, job_id: str) -> bytes | None:
        """As it was given to `create_training`; None when the job has ended."""
        found: bytes | None = await self._redis.hget(f"fluxgate:job:{job_id}", "source")
        return found

    @translate_redis
    async def claim_training(self, job_id: str, *, lease: str, lease_s: float) -> Claim | None:
        """The worker's hold on a training; None when it has ended or somebody else works on it."""
        flat = await self._claim_training(args=[self._now(), job_id, lease, int(lease_s * 1000)])
        return Claim(decode_job(pair_up(flat)), b"", lease) if flat else None

    @translate_redis
    async def lost(self, *, pause_s: float, limit: int = 16) -> list[str]:
        """Trainings that nobody works on: never queued, or their worker died. Each is told to one asker in `pause_s`."""
        return [job_id.decode() for job_id in await self._lost_trainings(args=[self._now(), int(pause_s * 1000), limit])]

    @translate_redis
    async def count_unfinished(self) -> dict[str, int]:
        """Trainings and captionings that wait or run, by status."""
        ids = [job_id.decode() for job_id in await self._redis.zrange("fluxgate:leases:training", 0, -1)]
        async with self._redis.pipeline(transaction=False) as pipeline:
            for job_id in ids:
                pipeline.hget(f"fluxgate:job:{job_id}", "status")
            statuses = await pipeline.execute() if ids else []
        return dict(Counter(status.decode() for status in statuses if status is not None))

    @translate_redis
    async def training_ids_before(self, caller: str, before: tuple[int, str] | None, limit: int) -> list[tuple[int, str]]:
        """A caller's trainings older than `before`, newest first, as (created_ms, id)."""
        return await read_index(self._redis, f"fluxgate:trainings:{caller}", before, limit)
