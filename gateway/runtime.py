"""Opens and closes every long-lived object of a process, in one typed place. Connections are made here and nowhere else."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import AsyncIterator, Coroutine, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp

import comfy_workflows
from comfy_workflows.catalog import Catalog
from comfy_workflows.raw import allow_nodes
from gateway.admission import Admission
from gateway.auth import Doorkeeper, Rates
from gateway.batches.admission import Batches
from gateway.batches.pictures import BatchPictures
from gateway.callers.hub_tokens import HubTokens
from gateway.callers.keys import KeyStore
from gateway.callers.tickets import Tickets
from gateway.callers.usage import Usage
from gateway.datasets.curation import Curation
from gateway.datasets.store import DatasetStore
from gateway.dispatch.dispatcher import Dispatcher
from gateway.errors import RedisUnavailable, StorageUnavailable
from gateway.foresight import Foresight
from gateway.gauges import StateGauges, build_metrics_app, serve_metrics
from gateway.gpu import GpuLease
from gateway.inputs.asset_records import AssetRecords
from gateway.inputs.assets import AssetStore
from gateway.inputs.bringing import Inputs
from gateway.instances import FleetRegistry, InstanceRegistry
from gateway.jobs.answers import AnswerStore
from gateway.jobs.batches import BatchStore
from gateway.jobs.deliveries import DeliveryStore
from gateway.jobs.events import BLOCK_MS, EventFeed
from gateway.jobs.records import Limits
from gateway.jobs.store import JobStore
from gateway.jobs.trainings import TrainingStore
from gateway.loras.before_after import BeforeAfter
from gateway.loras.imports import LoraImports
from gateway.loras.registry import LoraRegistry
from gateway.models.hashes import ModelHashes
from gateway.models.warmth import Warmth
from gateway.moderation.verdicts import open_moderation
from gateway.outside.hub import HubAccess
from gateway.outside.urls import Outside
from gateway.plain_http import PlainHttp
from gateway.raw_admission import RawAdmission
from gateway.redis_client import RedisClient, connect_reader, connect_redis
from gateway.reproduction import Reproduction
from gateway.settings import Settings
from gateway.state_version import prepare_state
from gateway.storage import Storage
from gateway.telemetry import Metrics
from gateway.trainings.captioning import Captionings
from gateway.trainings.machines import TrainerMachines
from gateway.trainings.requests import Trainings
from gateway.webhooks import Webhooks
from gateway.workflows.edits import WorkflowEdits
from gateway.workflows.records import WorkflowRecords

log = logging.getLogger(__name__)

Loop = Coroutine[Any, Any, None]


@dataclass(frozen=True, slots=True)
class Runtime:
    """What a request or a loop may need. Opened once a process."""

    settings: Settings
    catalog: Catalog
    redis: RedisClient
    store: JobStore
    feed: EventFeed
    storage: Storage
    outside: Outside
    loras: LoraRegistry
    registry: InstanceRegistry
    fleet: FleetRegistry
    keys: KeyStore
    usage: Usage
    doorkeeper: Doorkeeper
    tickets: Tickets
    answers: AnswerStore
    admission: Admission
    raw: RawAdmission
    datasets: DatasetStore
    curation: Curation
    assets: AssetStore
    trainings: Trainings
    captionings: Captionings
    deliveries: DeliveryStore
    webhooks: Webhooks
    gpu: GpuLease | None
    metrics: Metrics
    lora_imports: LoraImports
    gauges: StateGauges
    foresight: Foresight
    reproduction: Reproduction
    warmth: Warmth
    workflow_records: WorkflowRecords
    workflow_edits: WorkflowEdits
    batch_store: BatchStore
    batches: Batches
    batch_pictures: BatchPictures


def load_catalog(settings: Settings) -> Catalog:
    """The workflows that ship, and those of WORKFLOWS_DIR. Raises BrokenWorkflow."""
    own = Path(comfy_workflows.__file__).parent
    return Catalog.load(own, *([settings.workflows_dir] if settings.workflows_dir else []))


async def _ensure_bucket(storage: Storage) -> None:
    """S3 may come up after us; `/ready` says so until it has."""
    while True:
        try:
            await storage.ensure_bucket()
            return
        except StorageUnavailable as error:
            log.warning("bucket not ready", extra={"error": error.message})
        await asyncio.sleep(2)


async def _open_feed(redis: RedisClient, feed: EventFeed) -> None:
    """Redis may come up after us: wait for it, since nothing works without. Raises StateRefused."""
    while True:
        try:
            await prepare_state(redis)
            await feed.open()
            return
        except RedisUnavailable as error:
            log.warning("Redis not ready", extra={"error": error.message})
        await asyncio.sleep(1)


async def _essential(name: str, work: Loop) -> None:
    """A loop without which the process is of no use: when it breaks the process ends, and says why."""
    try:
        await work
    except Exception:  # boundary: the last line before a silent half-alive process
        log.critical("%s broke; the process ends", name, exc_info=True)
        os.kill(os.getpid(), signal.SIGTERM)


class _Connections(NamedTuple):
    redis: RedisClient
    feed_redis: RedisClient  # for blocking reads
    session: aiohttp.ClientSession
    plain: PlainHttp
    storage: Storage
    outside: Outside


@asynccontextmanager
async def _running(loops: Mapping[str, Loop], storage: Storage) -> AsyncIterator[None]:
    """Loops by name, for as long as the process serves."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(_essential(name, loop)) for name, loop in loops.items()]
        tasks.append(group.create_task(_ensure_bucket(storage)))
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()


@asynccontextmanager
async def _open_connections(settings: Settings) -> AsyncIterator[_Connections]:
    """What is closed whatever happened."""
    redis, feed_redis = connect_redis(settings.redis_url), connect_reader(settings.redis_url, BLOCK_MS / 1000)
    outside = Outside(settings.allow_private_urls)
    # limit=0: connections are bounded by slots and by the ingest's own semaphore.
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=30)) as session:
        plain = PlainHttp()
        storage = Storage(settings, session, plain)
        try:
            yield _Connections(redis, feed_redis, session, plain, storage, outside)
        finally:
            storage.close()
            plain.close()
            outside.close()
            # A pool that was handed to a client is not closed with it.
            await redis.aclose(close_connection_pool=True)
            await feed_redis.aclose(close_connection_pool=True)


@asynccontextmanager
async def open_runtime(settings: Settings, *, dispatch: bool) -> AsyncIterator[Runtime]:
    """Everything, running. `dispatch` also claims and runs jobs here."""
    catalog, metrics = load_catalog(settings), Metrics()
    async with _open_connections(settings) as (redis, feed_redis, session, plain, storage, outside):
        limits = Limits(settings.max_queue_depth, settings.max_jobs_per_caller, settings.gpu_seconds_per_day)
        store = JobStore(redis, ttl_s=settings.job_ttl_s, cache_ttl_s=settings.cache_ttl_s, limits=limits)
        feed, loras, registry, fleet = EventFeed(redis, feed_redis), LoraRegistry(redis), InstanceRegistry(redis), FleetRegistry(redis)
        datasets = DatasetStore(redis)
        assets = AssetStore(AssetRecords(redis), storage, ttl_s=settings.asset_ttl_s, url_ttl_s=settings.url_ttl_s)
        inputs = Inputs(assets, outside, keep_s=settings.job_ttl_s)
        moderation = open_moderation(settings, session, metrics)
        rules = allow_nodes(catalog, settings.raw_nodes)
        workflow_records = WorkflowRecords(redis)
        workflow_edits = WorkflowEdits(catalog, workflow_records, registry, rules)
        gpu = GpuLease(redis, settings.shared_gpu) if settings.shared_gpu else None
        told = (settings, session, store, feed, storage, registry, fleet, loras, metrics, moderation)
        dispatcher = Dispatcher(*told, gpu, plain) if dispatch else None
        expect = dispatcher.expect if dispatcher else None
        admission = Admission(settings, catalog, store, storage, inputs, loras, registry, metrics, workflow_edits, moderation, expect)
        training_store = TrainingStore(redis, ttl_s=settings.job_ttl_s, limits=limits)
        hub = HubAccess(settings.hf_endpoint, settings.hf_token)
        machines = TrainerMachines(redis)
        gauges = StateGauges(metrics, redis, store, training_store, machines, registry)
        trainings = Trainings(settings, catalog, training_store, datasets, machines, hub, moderation)
        batch_store = BatchStore(redis, ttl_s=settings.job_ttl_s, per_caller=settings.max_batches_per_caller)
        batches = Batches(batch_store, store, admission, registry, feed)
        batch_pictures = BatchPictures(batch_store, store, storage)
        warmth, warmed = Warmth(settings, catalog, admission, registry, fleet), asyncio.Event()
        measured = build_metrics_app(
            gauges, lambda: dispatcher is None or (dispatcher.is_ready and (warmed.is_set() or not settings.warm_up))
        )
        deliveries = DeliveryStore(redis)
        webhooks = Webhooks(settings, deliveries, storage, outside, metrics)
        keys, usage = KeyStore(redis), Usage(redis)
        rates = Rates(redis)
        tokens = HubTokens(redis, settings.hf_endpoint, settings.hf_users, rates.take) if settings.auth == "hf" else None
        doorkeeper = Doorkeeper(settings, keys, rates, usage, tokens)
        await _open_feed(redis, feed)
        await doorkeeper.refresh()
        await workflow_edits.refresh()
        loops: dict[str, Loop] = {
            "the event feed": feed.run(),
            "the webhooks": webhooks.run(),
            "the watch over keys": doorkeeper.run(),
            # In every process: a cluster may be scaled to no dispatcher at all.
            "the watch over trainings": trainings.watch(),
            "the sweep of uploads": assets.sweep(),
            "the workflows": workflow_edits.watch(),
            "the batches": batches.watch(),
            "the pictures of batches": batch_pictures.watch(),
            "the before and after pictures": BeforeAfter(admission, store, loras).watch(),
        }
        if settings.models_dir:
            files = {file for model in catalog.base_models.values() for file in model.files.values()}
            loops["the hashes of models"] = ModelHashes(registry, settings.models_dir, files).watch()
        if settings.metrics_port:
            loops["the metrics port"] = serve_metrics(settings, measured)
        if dispatcher is not None:
            loops["the dispatcher"] = dispatcher.run()
            if settings.warm_up:
                loops["the warm-up"] = warmth.warm_up(store, warmed)
        async with _running(loops, storage):
            yield Runtime(
                settings=settings,
                catalog=catalog,
                redis=redis,
                store=store,
                feed=feed,
                storage=storage,
                outside=outside,
                loras=loras,
                registry=registry,
                fleet=fleet,
                keys=keys,
                usage=usage,
                doorkeeper=doorkeeper,
                tickets=Tickets(redis),
                answers=AnswerStore(redis),
                admission=admission,
                raw=RawAdmission(settings, catalog, store, storage, assets, inputs, admission, rules),
                datasets=datasets,
                curation=Curation(datasets, storage),
                assets=assets,
                trainings=trainings,
                captionings=Captionings(settings, trainings),
                deliveries=deliveries,
                webhooks=webhooks,
                gpu=gpu,
                metrics=metrics,
                lora_imports=LoraImports(settings, catalog, trainings, assets, outside, loras),
                gauges=gauges,
                foresight=Foresight(admission, store, registry),
                reproduction=Reproduction(admission, store, storage),
                warmth=warmth,
                workflow_records=workflow_records,
                workflow_edits=workflow_edits,
                batch_store=batch_store,
                batches=batches,
                batch_pictures=batch_pictures,
            )
            if dispatcher is not None:
                await dispatcher.drain(settings.stop_after_running_s)
