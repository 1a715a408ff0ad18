"""Queue, leases and endings of jobs against a real Redis. The clock of the leases is the test's."""

from __future__ import annotations

from dataclasses import replace

from gateway.instances import FleetRegistry, Member
from gateway.jobs.model import EventKind, JobError, JobStatus, Output
from gateway.jobs.records import Load, status_event
from gateway.jobs.store import JobStore
from gateway.redis_client import RedisClient
from tests.job_specs import GRAPH, LEASE_S, START_MS, Clock, claim, create, finish, is_in_order, line, read_all, statuses, take

pytest_plugins = ["tests.store_fixtures"]

ERROR = JobError(code="queue_timeout", message="too long")


# -- the line --------------------------------------------------------------------------------------------------


async def test_callers_take_turns(store: JobStore) -> None:
    await create(store, *(f"a{number}" for number in range(6)))
    await create(store, "b0", "b1", caller="bob")
    await create(store, "c0", caller="cat")
    served = []
    while waiting := await line(store):
        job_id = waiting[0]
        served.append(job_id)
        assert await finish(store, await take(store, job_id))
    assert served[:5] in (["a0", "b0", "c0", "a1", "b1"], ["a0", "c0", "b0", "a1", "b1"])
    assert served[5:] == ["a2", "a3", "a4", "a5"]


async def test_a_newcomer_is_not_behind_a_long_line_of_anothers(store: JobStore) -> None:
    await create(store, *(f"a{number:02}" for number in range(20)))
    for _ in range(5):
        await finish(store, await take(store, (await line(store))[0]))
    await create(store, "late", caller="bob")
    assert "late" in (await line(store))[:2]


async def test_priority_goes_before_turns(store: JobStore) -> None:
    await create(store, "low", priority="low")
    await create(store, "normal1", "normal2")
    await create(store, "high1", "high2", priority="high")
    assert await line(store) == ["high1", "high2", "normal1", "normal2", "low"]
    assert (await store.peek(2))[0] == ["high1", "high2"]


async def test_position_is_the_place_in_line_as_it_is_served(store: JobStore) -> None:
    await create(store, "l0", "l1", priority="low", caller="bob")
    await create(store, "a0", "a1", "a2", "a3")
    await create(store, "b0", "b1", caller="bob")
    await create(store, "h0", priority="high", caller="cat")
    for _ in range(4):
        waiting = await line(store)
        for place, job_id in enumerate(waiting):
            assert await store.position(job_id) == place
        taken = await take(store, waiting[0])
        assert await store.position(waiting[0]) is None, "it does not wait any more"
        await finish(store, taken)


async def test_peek_says_what_instances_hold(store: JobStore) -> None:
    await create(store, "one", "two", "three")
    await take(store, "one", instance="a", base_model="dev", lora_files=["z", "y"])
    await take(store, "two", instance="c", base_model="dev", lora_files=["y"], recent_loras=[["x"], [], ["y"]])
    ids, loads = await store.peek(10, ["a", "b", "c"])
    assert ids == ["three"]
    assert loads["a"] == Load(1, "dev", frozenset({"y", "z"}))
    assert loads["b"] == Load(0, None, frozenset())
    assert loads["c"] == Load(1, "dev", frozenset({"y"}), (frozenset({"x"}), frozenset(), frozenset({"y"})))


# -- leases ----------------------------------------------------------------------------------------------------


async def test_a_job_is_claimed_by_one(store: JobStore) -> None:
    await create(store, "one")
    taken = await take(store, "one", lease="mine")
    assert (taken.job.instance, taken.job.prompt_id, taken.job.attempts) == ("a", "prompt-of-mine", 1)
    assert taken.job.status is JobStatus.QUEUED, "it has not begun until the instance says so"
    assert taken.graph == GRAPH
    assert await claim(store, "one") is None


async def test_an_instance_is_not_given_more_than_its_slots(store: JobStore) -> None:
    await create(store, "one", "two", "three")
    first = await take(store, "one")
    await take(store, "two")
    assert await claim(store, "three") is None
    assert await line(store) == ["three"], "a refused claim leaves the job in line"
    await store.update(first, {}, free_slot=True, write=1)
    await take(store, "three")


async def test_one_that_drains_or_was_removed_is_given_nothing_from_that_moment(store: JobStore, redis_client: RedisClient) -> None:
    """Whatever the dispatcher has heard; what it holds it keeps."""
    fleet = FleetRegistry(redis_client)
    await create(store, "one", "two")
    held = await take(store, "one", instance="a-1")
    name = await fleet.put(Member(url="http://a:1"))
    assert (name, held.job.instance) == ("a-1", "a-1")
    for leave in (lambda: fleet.put(Member(url="http://a:1", draining=True)), lambda: fleet.remove(name)):
        await leave()
        assert await claim(store, "two", instance="a-1") is None
        assert await store.renew([held], LEASE_S) == {"one": "queued"}
    await fleet.put(Member(url="http://a:1"))
    await take(store, "two", instance="a-1")


async def test_a_slot_that_was_left_goes_to_the_job_that_is_claimed_with_that_news(store: JobStore) -> None:
    await create(store, "one", "two", "three", "four")
    first, second = await take(store, "one"), await take(store, "two")
    foreign = replace(second, lease="another's")
    assert await claim(store, "three", left=(foreign,)) is None, "only who has the lease may say so"
    await take(store, "three", left=(first,))
    assert (first.holds_slot, second.holds_slot) == (False, True)
    assert await store.slots_used("a") == 2
    assert await claim(store, "four", left=(first,)) is None


async def test_an_end_that_is_the_first_to_be_written_tells_of_the_start(store: JobStore) -> None:
    await create(store, "one")
    taken = await take(store, "one")
    ended = taken.job.model_copy(update={"status": JobStatus.SUCCEEDED, "started_ms": 5, "warm": True})
    assert await store.finish(taken, ended)
    job = await store.load("one")
    assert job is not None
    assert (job.started_ms, job.warm) == (5, True)


async def test_a_lease_lives_by_renewal(store: JobStore, clock: Clock) -> None:
    await create(store, "one")
    taken = await take(store, "one")
    for _ in range(3):
        clock.pass_s(LEASE_S * 0.9)
        assert await store.take_over(lease="thief", lease_s=LEASE_S, limit=10) == []
        assert await store.renew([taken], LEASE_S) == {"one": "queued"}
    clock.pass_s(LEASE_S)
    [stolen] = await store.take_over(lease="thief", lease_s=LEASE_S, limit=10)
    assert (stolen.id, stolen.job.prompt_id, stolen.graph) == ("one", taken.job.prompt_id, GRAPH)
    assert stolen.job.takeovers == 1


async def test_who_lost_the_lease_changes_nothing_any_more(store: JobStore, clock: Clock, redis_client: RedisClient) -> None:
    await create(store, "one")
    old = await take(store, "one")
    clock.pass_s(LEASE_S + 1)
    [new] = await store.take_over(lease="new", lease_s=LEASE_S, limit=10)
    before, events = await store.load("one"), await read_all(redis_client, "one")
    assert await store.renew([old], LEASE_S) == {"one": "lost"}
    assert await store.update(old, {"status": "running"}, [status_event(old.job)], write=1) == "lost"
    assert await store.requeue(old) == "lost"
    assert await finish(store, old) is False
    await store.release([old])
    assert await store.take_over(lease="third", lease_s=LEASE_S, limit=10) == [], "a foreign release does not end a lease"
    assert (await store.load("one"), await read_all(redis_client, "one")) == (before, events)
    assert await finish(store, new)


async def test_jobs_on_instances_that_one_does_not_know_are_left_to_others_for_a_while(store: JobStore, clock: Clock) -> None:
    await create(store, "one", "two", "three")
    for job_id, instance in (("one", "a"), ("two", "b"), ("three", "a")):
        await take(store, job_id, instance=instance)

    async def take_over(*instances: str) -> list[str]:
        taken = await store.take_over(lease="next", lease_s=1000, limit=1, instances=instances, foreign_s=30)
        return [claim.id for claim in taken]

    clock.pass_s(LEASE_S + 29)
    assert (await take_over("b"), await take_over("b"), await take_over()) == (["two"], [], [])
    assert await take_over("a", "b") == ["one"]
    clock.pass_s(1)
    assert await take_over("b") == ["three"]


async def test_released_leases_are_taken_over_at_once(store: JobStore) -> None:
    await create(store, "one", "two")
    kept, given = await take(store, "one"), await take(store, "two")
    await store.release([given])
    assert [found.id for found in await store.take_over(lease="next", lease_s=LEASE_S, limit=10)] == ["two"]
    assert await store.renew([kept], LEASE_S) == {"one": "queued"}


async def test_redis_clock_decides_without_an_injected_one(redis_client: RedisClient) -> None:
    store = JobStore(redis_client, ttl_s=1000)
    await create(store, "one", "two")
    await take(store, "one")
    ended = await take(store, "two")
    await store.release([ended])
    assert [found.id for found in await store.take_over(lease="next", lease_s=LEASE_S, limit=10)] == ["two"]


# -- writing ---------------------------------------------------------------------------------------------------


async def test_an_update_sent_twice_counts_once(store: JobStore, redis_client: RedisClient) -> None:
    await create(store, "one")
    taken = await take(store, "one")
    running = taken.job.model_copy(update={"status": JobStatus.RUNNING})
    for _ in range(2):
        assert await store.update(taken, {"status": "running", "started_ms": 5}, [status_event(running)], write=1) == "running"
    assert statuses(await read_all(redis_client, "one")) == ["queued", "running"]
    job = await store.load("one")
    assert job is not None
    assert (job.status, job.started_ms) == (JobStatus.RUNNING, 5)


async def test_previews_are_not_kept(store: JobStore, redis_client: RedisClient) -> None:
    await create(store, "one")
    taken = await take(store, "one")
    await store.update(taken, {}, [(EventKind.PREVIEW, "", "{}"), (EventKind.PROGRESS, "", "{}")], write=1)
    assert [event.kind for event in await read_all(redis_client, "one")] == ["status", "progress"]


async def test_a_finished_job_keeps_what_it_ended_with(store: JobStore, redis_client: RedisClient) -> None:
    await create(store, "one")
    taken = await take(store, "one")
    output = Output(index=0, key="k", content_type="image/png", size_bytes=3, sha256="s")
    ended = taken.job.model_copy(update={"status": JobStatus.SUCCEEDED, "outputs": (output,)})
    assert await store.finish(taken, ended, [(EventKind.OUTPUT, "", output.model_dump_json())])
    job = await store.load("one")
    assert job is not None
    assert (job.status, job.outputs, job.finished_ms) == (JobStatus.SUCCEEDED, (output,), START_MS)
    events = await read_all(redis_client, "one")
    assert [event.kind for event in events] == ["status", "output", "status"]
    assert is_in_order(events)
    assert await finish(store, taken, JobStatus.FAILED) is False, "it ends once"
    assert (await store.peek(1, ["a"]))[1]["a"].slots_used == 0
    assert 0 < await redis_client.ttl("fluxgate:job:one") <= 1000


async def test_a_requeued_job_keeps_its_place(store: JobStore, redis_client: RedisClient) -> None:
    await create(store, "one", "two", "three")
    taken = await take(store, "one")
    assert await store.requeue(taken, avoid=("a",)) == "queued"
    assert await line(store) == ["one", "two", "three"]
    job = await store.load("one")
    assert job is not None
    assert (job.attempts, job.avoid, job.instance, job.prompt_id) == (1, ("a",), None, None)
    assert (await store.peek(1, ["a"]))[1]["a"].slots_used == 0
    assert (await take(store, "one")).job.attempts == 2
    assert statuses(await read_all(redis_client, "one")) == ["queued", "queued"]


# -- ending from outside ---------------------------------------------------------------------------------------


async def test_a_waiting_job_is_canceled_at_once(store: JobStore, redis_client: RedisClient) -> None:
    await create(store, "one", "two")
    assert await store.cancel("one") == "canceled"
    assert await store.cancel("one") == "canceled"
    assert await line(store) == ["two"]
    assert await claim(store, "one") is None
    assert statuses(await read_all(redis_client, "one")) == ["queued", "canceled"]


async def test_a_claimed_job_is_being_canceled_until_its_holder_ends_it(store: JobStore, redis_client: RedisClient) -> None:
    await create(store, "one")
    taken = await take(store, "one")
    assert await store.cancel("one") == "canceling"
    assert await store.cancel("one") == "canceling"
    assert await store.renew([taken], LEASE_S) == {"one": "canceling"}
    running = taken.job.model_copy(update={"status": JobStatus.RUNNING})
    assert await store.update(taken, {"status": "running"}, [status_event(running)], write=1) == "canceling"
    assert await store.requeue(taken) == "canceling"
    assert await finish(store, taken, JobStatus.CANCELED)
    assert statuses(await read_all(redis_client, "one")) == ["queued", "canceling", "canceled"]


async def test_a_job_that_waits_too_long_expires(store: JobStore, clock: Clock, redis_client: RedisClient) -> None:
    await create(store, "short", "claimed", queue_timeout_s=60)
    await create(store, "long", queue_timeout_s=600)
    await take(store, "claimed")
    assert await store.overdue(10) == []
    clock.pass_s(61)
    assert await store.overdue(10) == ["short"], "a claimed job waits for nothing"
    assert await store.expire("claimed", ERROR) == "queued"
    assert await store.expire("short", ERROR) == "expired"
    job = await store.load("short")
    assert job is not None
    assert (job.status, job.error) == (JobStatus.EXPIRED, ERROR)
    assert [event.kind for event in await read_all(redis_client, "short")] == ["status", "error", "status"]
    assert await store.overdue(10) == []


async def test_only_an_ended_job_is_forgotten(store: JobStore, redis_client: RedisClient) -> None:
    await create(store, "one")
    assert await store.delete("one") is False
    await store.cancel("one")
    assert await store.delete("one") is True
    assert await store.load("one") is None
    assert await read_all(redis_client, "one") == []
    assert await store.ids_before("ann", None, 10) == []
