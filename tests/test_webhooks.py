"""Telling the ends of jobs: which are due when, signed how, tried again until when, and that nobody waits for somebody else's receiver."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import standardwebhooks
from pydantic import SecretStr

from gateway.errors import Conflict, NotFound, Unprocessable
from gateway.jobs.deliveries import LOG_LENGTH, DeliveryStore
from gateway.jobs.model import Delivery, Job, JobError, JobStatus, Webhook
from gateway.jobs.store import JobStore
from gateway.jobs.trainings import TrainingStore
from gateway.outside.urls import Outside
from gateway.presentation import present_job
from gateway.redis_client import RedisClient
from gateway.settings import Settings
from gateway.storage import Storage
from gateway.telemetry import Metrics
from gateway.webhooks import JITTER, MOST_PER_HOST, PAUSES_S, Webhooks, WebhookWish
from tests.job_specs import GRAPH, Clock, create, finish, make_spec, take
from tests.webhook_receiver import SECRET, Receiver

pytest_plugins = ["tests.store_fixtures"]

OTHER_SECRET = "whsec_" + "A" * 40
HOOK = Webhook(url="http://127.0.0.1:9/hook", secret=SecretStr(SECRET), base_url="http://gateway")


@pytest.fixture
def deliveries(redis_client: RedisClient, clock: Clock) -> DeliveryStore:
    return DeliveryStore(redis_client, clock=clock)


async def due_ids(deliveries: DeliveryStore, lease_s: float = 10.0) -> list[str]:
    return [due.job.id for due in await deliveries.claim_due(lease_s=lease_s, limit=100)]


def make_delivery(attempt: int = 1, status: int | None = 500) -> Delivery:
    return Delivery(at_ms=1_767_225_600_000, attempt=attempt, status=status, ms=3, error=None if status == 204 else "it answered badly")


# -- when the end is due to be told ------------------------------------------------------------------------------


async def succeed(store: JobStore, job_id: str) -> None:
    assert await finish(store, await take(store, job_id))


async def fail(store: JobStore, job_id: str) -> None:
    assert await finish(store, await take(store, job_id), JobStatus.FAILED)


async def cancel_waiting(store: JobStore, job_id: str) -> None:
    assert await store.cancel(job_id) == "canceled"


async def cancel_running(store: JobStore, job_id: str) -> None:
    claim = await take(store, job_id)
    assert await store.cancel(job_id) == "canceling"
    assert await finish(store, claim, JobStatus.CANCELED)


async def expire(store: JobStore, job_id: str) -> None:
    assert await store.expire(job_id, JobError(code="queue_timeout", message="too long")) == "expired"


Ending = Callable[[JobStore, str], Any]


@pytest.mark.parametrize("end", [succeed, fail, cancel_waiting, cancel_running, expire])
async def test_every_end_is_due_at_once_and_no_earlier(end: Ending, store: JobStore, deliveries: DeliveryStore) -> None:
    await create(store, "told", webhook=HOOK)
    await create(store, "untold")
    assert await due_ids(deliveries) == []
    await end(store, "told")
    await end(store, "untold")
    [due] = await deliveries.claim_due(lease_s=10, limit=100)
    assert (due.job.id, due.webhook, due.tries) == ("told", HOOK, 0)
    assert due.job.is_terminal
    assert due.job == await store.load("told")


async def test_of_a_deleted_job_nothing_waits_to_be_told(store: JobStore, redis_client: RedisClient) -> None:
    await create(store, "told", webhook=HOOK)
    await succeed(store, "told")
    assert await redis_client.zcard("fluxgate:webhooks") == 1
    assert await store.delete("told")
    assert await redis_client.keys("fluxgate:webhooks") == []


async def test_an_end_that_came_from_the_cache_is_told(store: JobStore, deliveries: DeliveryStore) -> None:
    await store.create_finished(Job(spec=make_spec("told", webhook=HOOK), status=JobStatus.SUCCEEDED, cached=True), GRAPH)
    await store.create_finished(Job(spec=make_spec("untold"), status=JobStatus.SUCCEEDED, cached=True), GRAPH)
    assert await due_ids(deliveries) == ["told"]


@pytest.mark.parametrize("status", [JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELED])
async def test_the_end_of_a_training_is_told(status: JobStatus, redis_client: RedisClient, clock: Clock, deliveries: DeliveryStore) -> None:
    """Written by the trainer worker, through the same script."""
    trainings = TrainingStore(redis_client, ttl_s=1000, clock=clock)
    spec = make_spec("told", kind="training", webhook=HOOK)
    await trainings.create_training(spec)
    claim = await trainings.claim_training("told", lease="worker", lease_s=10)
    assert claim is not None
    assert await due_ids(deliveries) == []
    assert await trainings.finish(claim, claim.job.model_copy(update={"status": status}))
    [due] = await deliveries.claim_due(lease_s=10, limit=100)
    assert (due.job.spec.kind, due.job.status, due.webhook) == ("training", status, HOOK)


async def test_a_job_without_a_webhook_costs_nothing(store: JobStore, redis_client: RedisClient) -> None:
    async def count_calls(job_id: str, **fields: Any) -> int:
        await redis_client.config_resetstat()
        await create(store, job_id, **fields)
        await succeed(store, job_id)
        return sum(entry["calls"] for entry in (await redis_client.info("commandstats")).values())

    await count_calls("first")  # the scripts are loaded with it
    plain, told = await count_calls("plain"), await count_calls("told", webhook=HOOK)
    assert told == plain + 2, "the webhook's field and its place in the set"


async def test_the_secret_is_in_no_event_and_no_answer(store: JobStore, redis_client: RedisClient) -> None:
    await create(store, "told", webhook=HOOK.model_copy(update={"url": "https://a.example/x?key=hidden"}))
    await succeed(store, "told")
    job = await store.load("told")
    assert job is not None
    kept = [*(await redis_client.xrange("fluxgate:events:told")), *(await redis_client.xrange("fluxgate:feed"))]
    shown = present_job(job, base_url="", storage=Storage(Settings()))
    assert SECRET not in f"{kept} {job!r} {HOOK!r} {HOOK.model_dump_json()} {shown}"
    assert shown["webhook"] == "https://a.example/x"


async def test_one_claim_at_a_time_and_again_after_its_lease(store: JobStore, deliveries: DeliveryStore, clock: Clock) -> None:
    """What a killed process had in hand is told by another."""
    await create(store, "a", "b", webhook=HOOK)
    await succeed(store, "a")
    clock.pass_s(1)
    await succeed(store, "b")
    assert [due.job.id for due in await deliveries.claim_due(lease_s=10, limit=1)] == ["a"]
    assert await due_ids(deliveries) == ["b"]
    assert await due_ids(deliveries) == []
    clock.pass_s(10)
    assert await due_ids(deliveries) == ["a", "b"]


async def test_what_was_deleted_is_not_told(store: JobStore, deliveries: DeliveryStore, redis_client: RedisClient) -> None:
    await create(store, "a", webhook=HOOK)
    await succeed(store, "a")
    await store.delete("a")
    await deliveries.settle("a", make_delivery(), next_in_s=5)
    assert await due_ids(deliveries) == []
    assert not await redis_client.exists("fluxgate:webhooks", "fluxgate:job:a")


async def test_tries_are_written_into_the_record_and_do_not_lengthen_its_life(
    store: JobStore, deliveries: DeliveryStore, redis_client: RedisClient, clock: Clock
) -> None:
    await create(store, "a", webhook=HOOK)
    await succeed(store, "a")
    for attempt in range(1, LOG_LENGTH + 3):
        assert await due_ids(deliveries) == ["a"]
        await deliveries.settle("a", make_delivery(attempt), next_in_s=5)
        assert await due_ids(deliveries) == []
        clock.pass_s(5)
    job = await store.load("a")
    assert job is not None
    assert [one.attempt for one in job.deliveries] == list(range(3, LOG_LENGTH + 3))
    assert job.deliveries[0] == make_delivery(3)
    assert 0 < await redis_client.ttl("fluxgate:job:a") <= 1000
    [due] = await deliveries.claim_due(lease_s=10, limit=1)
    assert due.tries == LOG_LENGTH + 2
    await deliveries.settle("a", make_delivery(due.tries + 1, 204), next_in_s=None)
    # A try of another process that failed meanwhile does not bring it back.
    await deliveries.settle("a", make_delivery(due.tries + 1), next_in_s=0)
    clock.pass_s(100)
    assert await due_ids(deliveries) == []


async def test_replay_is_for_what_has_ended_and_has_a_webhook(store: JobStore, deliveries: DeliveryStore) -> None:
    await create(store, "told", webhook=HOOK)
    await create(store, "untold")
    for job_id, kind, code in (
        ("told", Conflict, "job_not_ended"),
        ("untold", Conflict, "no_webhook"),
        ("none", NotFound, "job_not_found"),
    ):
        with pytest.raises(kind) as refused:
            await deliveries.replay(job_id)
        assert refused.value.code == code
    await succeed(store, "told")
    assert await due_ids(deliveries) == ["told"]
    await deliveries.settle("told", make_delivery(8), next_in_s=None)
    await deliveries.replay("told")
    [due] = await deliveries.claim_due(lease_s=10, limit=1)
    assert due.tries == 0, "it has all its tries again"


# -- telling -----------------------------------------------------------------------------------------------------


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver().listening() as receiver:
        yield receiver


@asynccontextmanager
async def telling(redis_client: RedisClient, *processes: Webhooks) -> AsyncIterator[None]:
    tasks = [asyncio.create_task(process.run()) for process in processes]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


MakeWebhooks = Callable[..., Webhooks]


@pytest.fixture
async def make_webhooks(redis_client: RedisClient) -> AsyncIterator[MakeWebhooks]:
    """Each is what one process runs."""
    opened = list[Outside]()

    def make(*, pauses_s: tuple[float, ...] = (0.01,) * len(PAUSES_S), allow: str = "127.0.0.0/8", secret: str | None = SECRET) -> Webhooks:
        settings = Settings.model_validate({"webhook_secret": secret, "aws_access_key_id": "a", "aws_secret_access_key": "b"})
        opened.append(Outside([allow]))
        return Webhooks(settings, DeliveryStore(redis_client), Storage(settings), opened[-1], Metrics(), pauses_s=pauses_s)

    yield make
    for outside in opened:
        outside.close()


@pytest.fixture
def live_store(redis_client: RedisClient) -> JobStore:
    """By Redis's own clock."""
    return JobStore(redis_client, ttl_s=1000)


async def end_told(store: JobStore, job_id: str, url: str, secret: str | None = None, status: JobStatus = JobStatus.SUCCEEDED) -> None:
    webhook = Webhook(url=url, secret=SecretStr(secret) if secret else None, base_url="http://gateway")
    await create(store, job_id, webhook=webhook)
    assert await finish(store, await take(store, job_id, slots=1000), status)


async def tries_of(store: JobStore, job_id: str, count: int) -> list[Delivery]:
    """The job's log once it has that many entries."""
    for _ in range(1000):
        job = await store.load(job_id)
        assert job is not None
        if len(job.deliveries) >= count:
            return list(job.deliveries)
        await asyncio.sleep(0.02)
    raise AssertionError(f"no {count} tries to tell {job_id}: {job}")


async def test_what_is_told_is_the_job_signed(
    redis_client: RedisClient, live_store: JobStore, receiver: Receiver, make_webhooks: MakeWebhooks
) -> None:
    webhooks = make_webhooks()
    await end_told(live_store, "a", receiver.url("/a"))
    await end_told(live_store, "b", receiver.url("/b"), OTHER_SECRET, JobStatus.FAILED)
    async with telling(redis_client, webhooks):
        [one] = await tries_of(live_store, "a", 1)
        await tries_of(live_store, "b", 1)
    assert (one.attempt, one.status, one.error) == (1, 204, None)
    [told], [other] = receiver.told("a"), receiver.told("b")
    assert (told.path, told.headers["Content-Type"], told.headers["webhook-id"]) == ("/a", "application/json", "msg_a")
    content = told.open()
    assert (content["object"], content["status"], content["webhook"]) == ("generation", "succeeded", receiver.url("/a"))
    assert content["urls"]["self"] == "http://gateway/v1/generations/a"
    job = await live_store.load("a")
    assert job is not None
    expected = present_job(job.model_copy(update={"deliveries": ()}), base_url="http://gateway", storage=Storage(Settings()))
    assert content == json.loads(json.dumps(expected))
    assert other.open(OTHER_SECRET)["status"] == "failed"
    with pytest.raises(standardwebhooks.WebhookVerificationError):
        other.open()
    assert not await redis_client.exists("fluxgate:webhooks")


@pytest.mark.parametrize(
    ("status", "tries", "said"),
    [(200, 1, None), (299, 1, None), (500, 8, "status 500"), (404, 8, "status 404"), (302, 8, "status 302"), (410, 1, "status 410")],
)
async def test_what_an_answer_means(
    status: int,
    tries: int,
    said: str | None,
    redis_client: RedisClient,
    live_store: JobStore,
    receiver: Receiver,
    make_webhooks: MakeWebhooks,
) -> None:
    """Two processes at it change nothing: each try is made by one."""
    receiver.status, receiver.location = status, receiver.url("/elsewhere")
    await end_told(live_store, "a", receiver.url())
    async with telling(redis_client, make_webhooks(), make_webhooks()):
        log = await tries_of(live_store, "a", tries)
        assert not await redis_client.exists("fluxgate:webhooks")
    assert [(one.attempt, one.status) for one in log] == [(number, status) for number in range(1, tries + 1)]
    assert (log[-1].error or "").endswith(said or "")
    assert [one.path for one in receiver.received] == ["/hook"] * tries, "no redirect is followed"
    assert len({one.headers["webhook-id"] for one in receiver.received}) == 1


def test_eight_tries_take_a_day() -> None:
    assert len(PAUSES_S) + 1 == 8
    assert 23 * 3600 < sum(PAUSES_S) < 25 * 3600
    assert all(two > one * (1 + JITTER) / (1 - JITTER) for one, two in itertools.pairwise(PAUSES_S)), "each pause is longer than the last"


async def test_a_place_that_became_private_is_not_gone_to(
    redis_client: RedisClient, live_store: JobStore, receiver: Receiver, make_webhooks: MakeWebhooks
) -> None:
    await end_told(live_store, "a", receiver.url())
    async with telling(redis_client, make_webhooks(allow="10.0.0.0/8")):
        [one, *_] = await tries_of(live_store, "a", 1)
    assert (one.status, one.error) == (None, "leads to a loopback address")
    assert not receiver.received


async def test_without_the_secret_nothing_is_sent(
    redis_client: RedisClient, live_store: JobStore, receiver: Receiver, make_webhooks: MakeWebhooks
) -> None:
    """It was there when the job was made; an operator took it away."""
    await end_told(live_store, "a", receiver.url())
    async with telling(redis_client, make_webhooks(secret=None)):
        [one, *_] = await tries_of(live_store, "a", 1)
    assert "WEBHOOK_SECRET" in (one.error or "")
    assert not receiver.received


async def test_a_slow_receiver_holds_up_nobody_else(
    redis_client: RedisClient, live_store: JobStore, receiver: Receiver, make_webhooks: MakeWebhooks
) -> None:
    receiver.gate.clear()
    for number in range(50):
        await end_told(live_store, f"slow-{number}", receiver.url())
    with Receiver().listening() as quick:
        for number in range(20):
            await end_told(live_store, f"quick-{number}", quick.url())
        async with telling(redis_client, make_webhooks()):
            for number in range(20):
                await tries_of(live_store, f"quick-{number}", 1)
            assert len(receiver.received) == MOST_PER_HOST, "all of them wait"
            receiver.gate.set()
            for number in range(50):
                await tries_of(live_store, f"slow-{number}", 1)
    assert sorted(json.loads(one.body)["id"] for one in receiver.received) == sorted(f"slow-{number}" for number in range(50))


# -- accepting ---------------------------------------------------------------------------------------------------


async def test_what_cannot_be_signed_is_refused(make_webhooks: MakeWebhooks) -> None:
    wish, secret = WebhookWish(url="https://93.184.215.14/hook"), SecretStr(OTHER_SECRET)
    with pytest.raises(Unprocessable) as refused:
        await make_webhooks(secret=None).accept(wish, "")
    assert (refused.value.code, refused.value.details["parameter"]) == ("webhook_secret_missing", "webhook.secret")
    assert await make_webhooks(secret=None).accept(wish.model_copy(update={"secret": secret}), "http://gateway") == Webhook(
        url=wish.url, secret=secret, base_url="http://gateway"
    )
    assert await make_webhooks().accept(wish, "") == Webhook(url=wish.url)
    assert await make_webhooks(secret=None).accept(None, "") is None


async def test_where_the_gateway_does_not_go_is_refused_at_once(make_webhooks: MakeWebhooks) -> None:
    for url, code in (
        ("https://10.0.0.1/", "url_refused"),
        ("http://93.184.215.14/", "url_refused"),
        ("https://none.invalid/", "url_failed"),
    ):
        with pytest.raises(Unprocessable) as refused:
            await make_webhooks().accept(WebhookWish(url=url), "")
        assert (refused.value.code, refused.value.details["parameter"]) == (code, "webhook")
