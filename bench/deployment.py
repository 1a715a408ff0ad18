"""The servers a bench needs, started for it and ended with it: Redis, S3, the engine unless COMFYUI_URL is set, gateways."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from local.child import Child, pick_free_port
from local.services import LOOPBACK, Engine, Gateway, RedisServer, S3Server, ask

WORKFLOWS = Path(__file__).with_name("workflows")


@dataclass(frozen=True, slots=True)
class Servers:
    """What runs. `engine` is None when a ComfyUI from outside is used."""

    state_dir: Path
    redis: RedisServer
    s3: S3Server
    engine: Engine | None
    comfyui_url: str

    def pids(self) -> dict[str, int]:
        """Processes whose CPU time is of interest, by name."""
        children: dict[str, Child | None] = {"redis": self.redis, "s3": self.s3, "engine": self.engine}
        return {name: child.pid for name, child in children.items() if child is not None}


async def _start(children: Sequence[Child]) -> None:
    for child in children:
        # Not in a thread: on Linux a child dies with the thread that started it.
        child.start()
    for child in children:
        await asyncio.to_thread(child.wait_ready)


@asynccontextmanager
async def open_servers(state_dir: Path, *, with_engine: bool = True) -> AsyncIterator[Servers]:
    """Everything but the gateway. Raises ChildError, which says in one line what did not start."""
    redis, s3 = RedisServer(state_dir, pick_free_port()), S3Server(state_dir, pick_free_port())
    outside = os.environ.get("COMFYUI_URL")
    engine = None if outside or not with_engine else Engine(state_dir, pick_free_port(), flags=["--nodes", "bench.nodes"])
    url = outside.rstrip("/") if outside else engine.url if engine else ""
    children: list[Child] = [redis, s3, *([engine] if engine else [])]
    try:
        await _start(children)
        yield Servers(state_dir, redis, s3, engine, url)
    finally:
        for child in reversed(children):
            child.stop()


def _tell(servers: Servers, env: Mapping[str, str] | None) -> dict[str, str]:
    credentials = servers.s3.credentials
    return {
        "LOG_LEVEL": "WARNING",
        "REDIS_URL": servers.redis.url,
        "S3_ENDPOINT_URL": servers.s3.endpoint_url,
        "S3_BUCKET": "bench",
        "S3_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": credentials.access_key_id,
        "AWS_SECRET_ACCESS_KEY": credentials.secret_access_key,
        "COMFYUI_URLS": servers.comfyui_url,
        "WORKFLOWS_DIR": str(WORKFLOWS),
        **(env or {}),
    }


@asynccontextmanager
async def _running(child: Child) -> AsyncIterator[None]:
    try:
        await _start([child])
        yield
    except aiohttp.ClientError:
        # When it is the child that died, its last words say more than a refused connection.
        child.check()
        raise
    finally:
        child.stop()


@asynccontextmanager
async def open_gateway(servers: Servers, env: Mapping[str, str] | None = None) -> AsyncIterator[Gateway]:
    """A gateway in front of the servers; `env` replaces what it would be told."""
    gateway = Gateway(servers.state_dir, LOOPBACK, pick_free_port(), _tell(servers, env))
    async with _running(gateway):
        yield gateway


@asynccontextmanager
async def open_dispatcher(servers: Servers, env: Mapping[str, str] | None = None, name: str = "dispatcher") -> AsyncIterator[Child]:
    """A dispatcher in a process of its own. A gateway is ready when it has heard of an instance from one: open this first."""
    command, log_path = [sys.executable, "-m", "gateway.dispatch"], servers.state_dir / "logs" / f"{name}.log"
    dispatcher = Child(name, command, env=_tell(servers, env), log_path=log_path, is_ready=lambda: None)
    async with _running(dispatcher):
        yield dispatcher


@dataclass(frozen=True, slots=True)
class SimulatedFleet:
    """Instances that sleep, all in one process."""

    child: Child
    urls: list[str]

    async def start_ticks(self) -> None:
        """Open the gate of a fleet that was opened with `held`."""
        async with aiohttp.ClientSession() as session, session.post(f"{self.urls[0]}/bench/start") as response:
            response.raise_for_status()


def _pick_free_ports(count: int) -> list[int]:
    """All different: each is held until the last is drawn."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind((LOOPBACK, 0))
        return [int(probe.getsockname()[1]) for probe in probes]


@asynccontextmanager
async def open_fleet(state_dir: Path, size: int, *, at_once: int = 1, held: bool = False) -> AsyncIterator[SimulatedFleet]:
    """`size` simulated instances that run `at_once` prompts each at one time; `held`: no progress before `start_ticks`."""
    ports = _pick_free_ports(size)
    urls = [f"http://{LOOPBACK}:{port}" for port in ports]
    command = [sys.executable, "-m", "bench.simulated", "--ports", ",".join(map(str, ports)), "--at-once", str(at_once)]
    command += ["--held"] if held else []
    child = Child("fleet", command, log_path=state_dir / "logs" / "fleet.log", is_ready=lambda: ask(f"{urls[-1]}/system_stats"))
    async with _running(child):
        yield SimulatedFleet(child, urls)
