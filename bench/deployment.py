"""The servers a bench needs, started for it and ended with it: Redis, S3, the engine unless COMFYUI_URL is set, gateways."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from local.child import Child, pick_free_port
from local.services import LOOPBACK, Engine, Gateway, RedisServer, S3Server

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
async def open_servers(state_dir: Path) -> AsyncIterator[Servers]:
    """Everything but the gateway. Raises ChildError, which says in one line what did not start."""
    redis, s3 = RedisServer(state_dir, pick_free_port()), S3Server(state_dir, pick_free_port())
    outside = os.environ.get("COMFYUI_URL")
    engine = None if outside else Engine(state_dir, pick_free_port(), flags=["--nodes", "bench.nodes"])
    url = outside.rstrip("/") if outside else engine.url if engine else ""
    children: list[Child] = [redis, s3, *([engine] if engine else [])]
    try:
        await _start(children)
        yield Servers(state_dir, redis, s3, engine, url)
    finally:
        for child in reversed(children):
            child.stop()


@asynccontextmanager
async def open_gateway(servers: Servers, env: Mapping[str, str] | None = None) -> AsyncIterator[Gateway]:
    """A gateway in front of the servers; `env` replaces what it would be told."""
    credentials = servers.s3.credentials
    told = {
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
    gateway = Gateway(servers.state_dir, LOOPBACK, pick_free_port(), told)
    try:
        await _start([gateway])
        yield gateway
    except aiohttp.ClientError:
        # When it is the gateway that died, its last words say more than a refused connection.
        gateway.check()
        raise
    finally:
        gateway.stop()
