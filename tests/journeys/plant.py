"""A deployment of which every part is the test's own, to be killed and started again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from local.child import Child, pick_free_port
from local.services import Engine, Gateway, RedisServer, S3Server
from tests.conftest import choose_engine_flags
from tests.deployment import describe_deployment, make_dispatcher, make_gateway, running, wait_for_answers
from tests.journeys.api import Api, Job, SseEvent, wait_until

STEPS = 30
# 3 s of work: longer than it takes to kill a part and start it again.
SLOW = {"workflow": "slow", "steps": STEPS, "delay_ms": 100}


@dataclass
class Plant:
    redis: RedisServer
    s3: S3Server
    engine: Engine
    gateway: Gateway
    dispatcher: Child | None
    api: Api
    env: dict[str, str]  # of the gateway and the dispatcher

    @property
    def parts(self) -> list[Child]:
        return [part for part in (self.redis, self.s3, self.engine, self.gateway, self.dispatcher) if part is not None]

    def mend(self) -> None:
        """Start what a test left dead."""
        for part in self.parts:
            if not part.is_alive():
                part.stop()
                part.start()
                part.wait_ready()

    def saved_files(self, job: Job) -> list[str]:
        """What the engine wrote for a job. A second run adds a second file."""
        return sorted(path.name for path in (self.engine.base_dir / "output" / job["id"]).glob("*"))

    def start_until_step(self, step: int) -> Job:
        """A slow job that has come this far."""
        job = self.api.create(**SLOW)
        wait_until(lambda: (self.api.get(job["id"])["progress"]["step"] or 0) >= step, f"step {step}")
        return job


def restart(child: Child) -> None:
    child.kill()
    child.start()
    child.wait_ready()


def list_steps(events: list[SseEvent]) -> list[int]:
    """The steps of the slow node, as its progress events told them."""
    told = [event.data for event in events if event.kind == "progress" and event.data["current_node_class"] == "SlowImage"]
    return [data["step"] for data in told if data["step"] is not None]


def list_statuses(events: list[SseEvent]) -> list[str]:
    return [event.data["status"] for event in events if event.kind == "status"]


def is_strictly_rising(events: list[SseEvent]) -> bool:
    positions = [event.position for event in events]
    return positions == sorted(set(positions))


@contextmanager
def running_plant(folder: Path, *, split: bool) -> Iterator[Plant]:
    """All parts, running; `split` puts the dispatcher into a process of its own."""
    redis, s3 = RedisServer(folder, pick_free_port()), S3Server(folder, pick_free_port())
    engine = Engine(folder, pick_free_port(), flags=choose_engine_flags())
    with running(redis, s3, engine):
        env = describe_deployment(redis.url, s3, engine.url, DISPATCHER="off" if split else "embedded")
        gateway = make_gateway(folder, env)
        dispatcher = make_dispatcher(folder, env, gateway.url) if split else None
        gateway.start()
        try:
            # A gateway without a dispatcher is not ready before one has told it of an instance.
            wait_for_answers(gateway)
            with running(*([dispatcher] if dispatcher else [])):
                gateway.wait_ready()
                api = Api(gateway.url)
                with api.http:
                    yield Plant(redis, s3, engine, gateway, dispatcher, api, env)
        finally:
            gateway.stop()
