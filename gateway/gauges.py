"""What is true of the whole deployment now, read from Redis when somebody scrapes: any process says the same, whoever dispatches."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from gateway.errors import RedisUnavailable
from gateway.instances import InstanceFacts, InstanceRegistry
from gateway.jobs.model import now_ms
from gateway.jobs.store import JobStore
from gateway.jobs.trainings import TrainingStore
from gateway.redis_client import RedisClient, read_memory, translate_redis
from gateway.settings import Settings
from gateway.telemetry import Metrics
from gateway.trainings.machines import TrainerMachines

log = logging.getLogger(__name__)

TRAINING_STATES = ("queued", "running", "canceling")


class StateGauges:
    """Fills the gauges of `metrics` that are about state, and prints all metrics of the process."""

    def __init__(
        self,
        metrics: Metrics,
        redis: RedisClient,
        store: JobStore,
        trainings: TrainingStore,
        machines: TrainerMachines,
        registry: InstanceRegistry,
    ) -> None:
        self._metrics, self._redis, self._store, self._trainings = metrics, redis, store, trainings
        self._machines, self._registry = machines, registry

    async def render(self) -> bytes:
        """Prometheus text. While Redis is away the gauges keep quiet, all but the one that says so."""
        try:
            depth, oldest_ms = await self._store.depth(), await self._store.oldest_ms()
            unfinished, trainers = await self._trainings.count_unfinished(), len(await self._machines.all())
            facts, memory = await self._registry.all(), await _ask_memory(self._redis)
        except RedisUnavailable as error:
            log.warning("state not read for a scrape", extra={"error": error.message})
            self._forget()
        else:
            # Nothing is awaited from here on: two scrapes at once do not mix.
            self._forget()
            metrics = self._metrics
            metrics.redis_up.set(1)
            metrics.redis_used.set(memory[0])
            metrics.redis_limit.set(memory[1])
            metrics.queue_depth.set(depth)
            metrics.queue_oldest_s.set(max(0, now_ms() - oldest_ms) / 1000 if oldest_ms is not None else 0)
            metrics.trainers.set(trainers)
            for status in TRAINING_STATES:
                metrics.trainings.labels(status).set(unfinished.get(status, 0))
            for instance in facts:
                self._show(instance)
        return generate_latest(self._metrics.registry)

    def _forget(self) -> None:
        metrics = self._metrics
        metrics.redis_up.set(0)
        for number in (metrics.queue_depth, metrics.queue_oldest_s, metrics.trainers, metrics.redis_used, metrics.redis_limit):
            number.set(math.nan)
        for gauge in (metrics.trainings, *metrics.of_instances):
            gauge.clear()

    def _show(self, facts: InstanceFacts) -> None:
        metrics = self._metrics
        metrics.instance_up.labels(facts.id).set(int(facts.state == "up"))
        metrics.slots.labels(facts.id).set(facts.slots)
        metrics.slots_used.labels(facts.id).set(facts.slots_used)
        metrics.instance_training.labels(facts.id).set(int(facts.state == "training"))
        for gauge, size_bytes in ((metrics.vram_total, facts.vram_total_bytes), (metrics.vram_free, facts.vram_free_bytes)):
            if size_bytes is not None:
                gauge.labels(facts.id).set(size_bytes)


@translate_redis
async def _ask_memory(redis: RedisClient) -> tuple[int, int]:
    return read_memory(await redis.info("memory"))


def build_metrics_app(gauges: StateGauges, is_ready: Callable[[], bool]) -> web.Application:
    """What METRICS_PORT answers, without a key: for a network that callers do not reach."""

    async def show(_: web.Request) -> web.Response:
        return web.Response(body=await gauges.render(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def live(_: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def ready(_: web.Request) -> web.Response:
        return web.json_response({"ready": is_ready()}, status=200 if is_ready() else 503)

    app = web.Application()
    app.router.add_get("/metrics", show)
    app.router.add_get("/health", live)
    app.router.add_get("/ready", ready)
    return app


async def serve_metrics(settings: Settings, app: web.Application) -> None:
    """For ever."""
    runner = web.AppRunner(app, access_log=None, handle_signals=False)
    await runner.setup()
    try:
        await web.TCPSite(runner, settings.host, settings.metrics_port).start()
        await asyncio.Event().wait()
    finally:
        await runner.cleanup()
