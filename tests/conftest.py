"""Real servers for every test: Redis, S3, the engine. Each starts once per session, when a test first asks for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from uuid import uuid4

import pytest
import redis
from hypothesis import HealthCheck, settings

from local.child import pick_free_port
from local.services import Engine, Gateway, RedisServer, S3Server
from tests.deployment import describe_deployment, make_gateway, running

ENGINE_NODES = "tests.engine_nodes"

# Machines are shared and slow at times: how long an example took says nothing about the code.
settings.register_profile("fluxgate", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("fluxgate")


@dataclass(frozen=True)
class S3Access:
    """Everything a client needs. The bucket's name is fresh; the bucket does not exist yet."""

    endpoint_url: str
    access_key_id: str
    secret_access_key: str
    bucket: str


def choose_engine_flags() -> tuple[str, ...]:
    """The extra nodes for tests (slow, failing, hungry ones), where that module is there."""
    return ("--nodes", ENGINE_NODES) if find_spec(ENGINE_NODES) else ()


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a Redis that lives as long as the session and is shared by all its tests."""
    server = RedisServer(tmp_path_factory.mktemp("redis"), pick_free_port())
    server.start()
    try:
        server.wait_ready()
        yield server.url
    finally:
        server.stop()


@pytest.fixture
def redis_url(redis_server: str) -> str:
    """The URL of an empty Redis."""
    with redis.Redis.from_url(redis_server) as connection:
        connection.flushall()
    return redis_server


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """An S3 server that lives as long as the session."""
    server = S3Server(tmp_path_factory.mktemp("s3"), pick_free_port())
    server.start()
    try:
        server.wait_ready()
        yield server
    finally:
        server.stop()


@pytest.fixture
def s3(s3_server: S3Server) -> S3Access:
    """The S3 server with a bucket name that no other test uses."""
    keys = s3_server.credentials
    return S3Access(s3_server.endpoint_url, keys.access_key_id, keys.secret_access_key, f"test-{uuid4().hex[:12]}")


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of an engine that lives as long as the session; its queue and history are shared by all its tests."""
    child = Engine(tmp_path_factory.mktemp("engine"), pick_free_port(), flags=choose_engine_flags())
    child.start()
    try:
        child.wait_ready()
        yield child.url
    finally:
        child.stop()


OpenGateway = Callable[..., AbstractContextManager[Gateway]]


@pytest.fixture(scope="session")
def open_gateway(redis_server: str, s3_server: S3Server, engine: str, tmp_path_factory: pytest.TempPathFactory) -> OpenGateway:
    """`with open_gateway(CACHE_TTL_S="3600") as gateway`: one with its dispatcher inside, over the session's servers.

    Its Redis is empty at the start, and at the end: a key made there would shut the door of the next.
    """

    @contextmanager
    def open_one(**changes: str) -> Iterator[Gateway]:
        with redis.Redis.from_url(redis_server) as connection:
            connection.flushall()
            gateway = make_gateway(tmp_path_factory.mktemp("gateway"), describe_deployment(redis_server, s3_server, engine, **changes))
            with running(gateway):
                yield gateway
            connection.flushall()

    return open_one


EngineFactory = Callable[..., Engine]


@pytest.fixture
def engine_factory(tmp_path: Path) -> Iterator[EngineFactory]:
    """Makes engines of one's own: `engine_factory(port=None, flags=())` answers a ready one.

    It keeps its port and folder, so `kill()` or `stop()` and then `start()` and `wait_ready()` is a crash and a restart.
    """
    made: list[Engine] = []

    def make(port: int | None = None, flags: tuple[str, ...] = ()) -> Engine:
        child = Engine(tmp_path / f"engine-{len(made)}", port or pick_free_port(), flags=(*choose_engine_flags(), *flags))
        made.append(child)
        child.start()
        child.wait_ready()
        return child

    yield make
    for child in made:
        child.stop()
