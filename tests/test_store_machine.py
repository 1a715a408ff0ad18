"""Any order of creations, claims, crashes, lost answers, cancels and endings, against a model of what the store promises.

Three dispatchers share one Redis. A crash forgets what a dispatcher holds; an answer may get lost after Redis acted on the call.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, precondition, rule, run_state_machine_as_test

from gateway.jobs.model import TERMINAL, EventKind, Job, JobError, JobStatus
from gateway.jobs.records import Claim, status_event
from gateway.jobs.store import JobStore
from gateway.redis_client import connect_redis
from tests.job_specs import GRAPH, LEASE_S, Clock, is_in_order, make_spec, read_all, statuses

T = TypeVar("T")

INSTANCES = ("a", "b")
SLOTS = 2
QUEUE_TIMEOUT_S = 1000.0
ERROR = JobError(code="queue_timeout", message="too long")
ENDINGS = st.sampled_from([JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELED])


@dataclass
class Expected:
    """What the store should hold of one job."""

    number: int
    twin: str | None
    status: JobStatus = JobStatus.QUEUED
    leader: str | None = None  # whose result it waits for; then it stands in no line
    lease: str | None = None
    lease_ends_ms: int = 0
    slot_on: str | None = None
    attempts: int = 0

    @property
    def waits(self) -> bool:
        return self.status not in TERMINAL and self.lease is None and self.leader is None


class StoreMachine(RuleBasedStateMachine):
    claims: Bundle[Claim] = Bundle("claims")
    redis_url = ""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.redis = connect_redis(self.redis_url)
        self.clock = Clock()
        self.store = JobStore(self.redis, ttl_s=10_000, cache_ttl_s=10_000, clock=self.clock)
        self.jobs: dict[str, Expected] = {}
        self.leaders: dict[str, str] = {}
        self.cache: dict[str, str] = {}
        self.held: list[dict[str, Claim]] = [{}, {}, {}]
        self.leases = 0
        self.run(self.redis.flushall())

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(work)

    def teardown(self) -> None:
        try:
            self.drain()
            for job_id in self.jobs:
                self.check_stream(job_id, [])
        finally:
            self.run(self.redis.aclose(close_connection_pool=True))
            self.loop.close()

    # -- the model's own motion --------------------------------------------------------------------------------

    def new_lease(self) -> str:
        self.leases += 1
        return f"lease-{self.leases}"

    def is_live(self, claim: Claim) -> bool:
        job = self.jobs.get(claim.id)
        return job is not None and job.lease == claim.lease

    def end(self, job_id: str, status: JobStatus) -> None:
        job = self.jobs[job_id]
        job.status, job.lease, job.slot_on, job.leader = status, None, None, None
        if job.twin is None:
            return
        if self.leaders.get(job.twin) == job_id:
            del self.leaders[job.twin]
        followers = sorted((j.number, name) for name, j in self.jobs.items() if j.leader == job_id)
        if status is JobStatus.SUCCEEDED:
            self.cache[job.twin] = job_id
            for _, name in followers:
                self.jobs[name].leader = None
        elif followers:
            first = followers[0][1]
            self.leaders[job.twin] = first
            for _, name in followers:
                self.jobs[name].leader = None if name == first else first

    def pick(self, number: int, names: list[str]) -> str:
        return sorted(names, key=lambda name: self.jobs[name].number)[number % len(names)]

    # -- callers -----------------------------------------------------------------------------------------------

    @precondition(lambda self: len(self.jobs) < 9)
    @rule(
        caller=st.sampled_from(["ann", "bob"]),
        priority=st.sampled_from(["low", "normal", "high"]),
        twin=st.sampled_from([None, "x", "x", "y"]),
        reuse=st.booleans(),
        sent=st.sampled_from([1, 2]),
    )
    def create(self, caller: str, priority: str, twin: str | None, reuse: bool, sent: int) -> None:
        job_id = f"job{len(self.jobs)}"
        spec = make_spec(job_id, caller=caller, priority=priority, cache_key=twin, queue_timeout_s=QUEUE_TIMEOUT_S)
        spec = spec.model_copy(update={"created_ms": self.clock()})
        admitted, *_ = [self.run(self.store.create(spec, GRAPH, reuse=reuse)) for _ in range(sent)]
        if twin is not None and reuse and twin in self.cache:
            assert admitted == ("cached", self.cache[twin])
            assert self.run(self.store.load(job_id)) is None
            return
        leader = self.leaders.get(twin) if twin is not None and reuse else None
        assert admitted == ("following" if leader else "created", job_id)
        self.jobs[job_id] = Expected(len(self.jobs), twin, leader=leader)
        if twin is not None and leader is None:
            self.leaders[twin] = job_id

    @precondition(lambda self: self.jobs)
    @rule(number=st.integers(0, 8), leased=st.booleans())
    def cancel(self, number: int, leased: bool) -> None:
        wanted = [name for name, job in self.jobs.items() if job.lease is not None] if leased else []
        job_id = self.pick(number, wanted or list(self.jobs))
        job = self.jobs[job_id]
        answer = self.run(self.store.cancel(job_id))
        if job.status not in TERMINAL:
            if job.lease is None:
                self.end(job_id, JobStatus.CANCELED)
            else:
                job.status = JobStatus.CANCELING
        assert answer == job.status

    @precondition(lambda self: self.jobs)
    @rule(number=st.integers(0, 8))
    def expire(self, number: int) -> None:
        job_id = self.pick(number, list(self.jobs))
        job = self.jobs[job_id]
        answer = self.run(self.store.expire(job_id, ERROR))
        if job.status not in TERMINAL and job.lease is None:
            self.end(job_id, JobStatus.EXPIRED)
        assert answer == job.status

    # -- dispatchers -------------------------------------------------------------------------------------------

    @precondition(lambda self: self.jobs)
    @rule(
        target=claims,
        who=st.integers(0, 2),
        instance=st.sampled_from(INSTANCES),
        number=st.integers(0, 8),
        in_line=st.booleans(),
        is_answered=st.sampled_from([True, True, True, False]),
        left=st.lists(claims, max_size=2),
    )
    def claim(self, who: int, instance: str, number: int, in_line: bool, is_answered: bool, left: list[Claim]) -> Any:
        """Who claims says also which jobs have left the instance; one that somebody else leads now, or elsewhere, keeps its slot."""
        line = self.run(self.store.peek(100))[0]
        job_id = line[number % len(line)] if in_line and line else self.pick(number, list(self.jobs))
        job, lease = self.jobs[job_id], self.new_lease()
        for gone in left:
            if self.is_live(gone) and self.jobs[gone.id].slot_on == instance:
                self.jobs[gone.id].slot_on = None
        used = sum(other.slot_on == instance for other in self.jobs.values())
        claim = self.send_claim(job_id, instance, lease, left)
        assert (claim is not None) == (job.waits and used < SLOTS)
        if claim is None:
            return multiple()
        job.lease, job.lease_ends_ms, job.slot_on = lease, self.clock() + int(LEASE_S * 1000), instance
        job.attempts += 1
        assert (claim.job.attempts, claim.job.prompt_id, claim.job.instance) == (job.attempts, f"prompt-{lease}", instance)
        if not is_answered:
            return multiple()
        self.held[who][job_id] = claim
        return claim

    def send_claim(self, job_id: str, instance: str, lease: str, left: Iterable[Claim] = ()) -> Claim | None:
        return self.run(
            self.store.claim(
                job_id,
                instance=instance,
                lease=lease,
                lease_s=LEASE_S,
                slots=SLOTS,
                prompt_id=f"prompt-{lease}",
                base_model="flux1-dev",
                lora_files=(),
                left=tuple(left),
            )
        )

    @rule(seconds=st.sampled_from([0.5, LEASE_S / 2, LEASE_S, 3 * LEASE_S]))
    def pass_time(self, seconds: float) -> None:
        self.clock.pass_s(seconds)

    @rule(who=st.integers(0, 2))
    def renew(self, who: int) -> None:
        mine = list(self.held[who].values())
        answers = self.run(self.store.renew(mine, LEASE_S))
        assert answers == {claim.id: self.jobs[claim.id].status if self.is_live(claim) else "lost" for claim in mine}
        for claim in mine:
            if self.is_live(claim):
                self.jobs[claim.id].lease_ends_ms = self.clock() + int(LEASE_S * 1000)
            else:
                del self.held[who][claim.id]

    @rule(target=claims, who=st.integers(0, 2), is_answered=st.sampled_from([True, True, False]))
    def take_over(self, who: int, is_answered: bool) -> Any:
        lease = self.new_lease()
        due = {name for name, job in self.jobs.items() if job.lease is not None and job.lease_ends_ms <= self.clock()}
        taken = self.run(self.store.take_over(lease=lease, lease_s=LEASE_S, limit=100))
        assert {claim.id for claim in taken} == due
        for claim in taken:
            job = self.jobs[claim.id]
            job.lease, job.lease_ends_ms = lease, self.clock() + int(LEASE_S * 1000)
            assert claim.job.prompt_id is not None, "who takes over must know where to look"
            assert claim.graph == GRAPH
            if is_answered:
                self.held[who][claim.id] = claim
        return multiple(*(taken if is_answered else []))

    @rule(who=st.integers(0, 2))
    def crash(self, who: int) -> None:
        self.held[who].clear()

    @rule(who=st.integers(0, 2))
    def stop_in_order(self, who: int) -> None:
        mine = list(self.held[who].values())
        self.run(self.store.release(mine))
        for claim in mine:
            if self.is_live(claim):
                self.jobs[claim.id].lease_ends_ms = self.clock() - 1
        self.held[who].clear()

    @rule(claim=claims, free_slot=st.booleans(), sent=st.sampled_from([1, 2]))
    def update(self, claim: Claim, free_slot: bool, sent: int) -> None:
        """Anyone who ever held the job may still believe to: only the live lease writes."""
        claim.writes += 1
        running = claim.job.model_copy(update={"status": JobStatus.RUNNING})
        before = self.run(read_all(self.redis, claim.id))
        fields = {"status": "running", "started_ms": self.clock()}
        for _ in range(sent):
            answer = self.run(self.store.update(claim, fields, [status_event(running)], free_slot=free_slot, write=claim.writes))
        job = self.jobs[claim.id]
        told = len(self.run(read_all(self.redis, claim.id))) - len(before)
        if not self.is_live(claim):
            assert (answer, told) == ("lost", 0)
            return
        if job.status is not JobStatus.CANCELING:
            job.status = JobStatus.RUNNING
            assert told == 1
        else:
            assert told == 0, "a job that is being canceled does not start to run"
        job.slot_on = None if free_slot else job.slot_on
        assert answer == job.status

    @rule(claim=claims)
    def requeue(self, claim: Claim) -> None:
        answer = self.run(self.store.requeue(claim))
        job = self.jobs[claim.id]
        if not self.is_live(claim):
            assert answer == "lost"
        elif job.status is JobStatus.CANCELING:
            assert answer == "canceling"
        else:
            assert answer == "queued"
            job.status, job.lease, job.slot_on = JobStatus.QUEUED, None, None

    @rule(claim=consumes(claims), status=ENDINGS, sent=st.sampled_from([1, 2]))
    def finish(self, claim: Claim, status: JobStatus, sent: int) -> None:
        ended = claim.job.model_copy(update={"status": status})
        answer = self.run(self.store.finish(claim, ended, [(EventKind.PROGRESS, "", "{}")]))
        assert answer == self.is_live(claim)
        if answer:
            self.end(claim.id, status)
        told = len(self.run(read_all(self.redis, claim.id)))
        for _ in range(sent - 1):
            assert self.run(self.store.finish(claim, ended)) == answer, "sent twice over a broken connection: the first one counts"
        assert len(self.run(read_all(self.redis, claim.id))) == told

    # -- what always holds -------------------------------------------------------------------------------------

    @invariant()
    def records_are_as_expected(self) -> None:
        loaded = {job.id: job for job in self.run(self.store.load_many(list(self.jobs)))}
        assert {name: job.status for name, job in loaded.items()} == {name: job.status for name, job in self.jobs.items()}

    @invariant()
    def nothing_is_forgotten_and_nothing_is_in_two_places(self) -> None:
        line, loads = self.run(self.store.peek(1000, INSTANCES))
        assert sorted(line) == sorted(name for name, job in self.jobs.items() if job.waits)
        assert self.run(self.store.depth()) == len(line)
        for instance in INSTANCES:
            used = sum(job.slot_on == instance for job in self.jobs.values())
            assert loads[instance].slots_used == used <= SLOTS
        for place, job_id in enumerate(line):
            assert self.run(self.store.position(job_id)) == place

    @precondition(lambda self: self.jobs)
    @rule(number=st.integers(0, 8))
    def read_stream(self, number: int) -> None:
        job_id = self.pick(number, list(self.jobs))
        self.check_stream(job_id, [] if self.jobs[job_id].status in TERMINAL else [self.jobs[job_id].status])

    def check_stream(self, job_id: str, open_as: list[JobStatus]) -> None:
        """Ids rise; the last status told is the job's; exactly one ending, and nothing after it."""
        events = self.run(read_all(self.redis, job_id))
        told = statuses(events)
        assert is_in_order(events)
        assert told[0] == "queued"
        assert told[-1] == self.jobs[job_id].status
        endings = [status for status in told if status in TERMINAL]
        assert len(endings) == (0 if open_as else 1)
        if endings:
            assert events[-1].kind == EventKind.STATUS
            assert Job.model_validate_json(events[-1].data).is_terminal

    def drain(self) -> None:
        """Whatever happened before, one dispatcher that lives on brings every job to its end."""
        for _ in range(4 * len(self.jobs) + 1):
            self.clock.pass_s(LEASE_S + 1)
            for claim in self.run(self.store.take_over(lease=self.new_lease(), lease_s=LEASE_S, limit=100)):
                assert self.run(self.store.finish(claim, claim.job.model_copy(update={"status": JobStatus.FAILED})))
                self.end(claim.id, JobStatus.FAILED)
            for job_id in self.run(self.store.peek(100))[0]:
                claim_or_none = self.send_claim(job_id, INSTANCES[0], self.new_lease())
                if claim_or_none is not None:
                    assert self.run(self.store.finish(claim_or_none, claim_or_none.job.model_copy(update={"status": JobStatus.SUCCEEDED})))
                    self.end(job_id, JobStatus.SUCCEEDED)
        assert {name: job.status for name, job in self.jobs.items() if job.status not in TERMINAL} == {}
        self.records_are_as_expected()
        self.nothing_is_forgotten_and_nothing_is_in_two_places()


def test_the_store_keeps_its_promises_in_any_order(redis_url: str) -> None:
    machine = type("MachineHere", (StoreMachine,), {"redis_url": redis_url})
    bounds = settings(max_examples=100, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck))
    run_state_machine_as_test(machine, settings=bounds)
