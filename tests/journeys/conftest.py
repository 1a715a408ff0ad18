"""One deployment for a file of tests: a gateway with its dispatcher inside, over the session's servers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import redis

from local.services import S3Server
from tests.deployment import describe_deployment, make_gateway, running
from tests.journeys.api import Api
from tests.webhook_receiver import Receiver


@pytest.fixture(scope="session")
def receiver() -> Iterator[Receiver]:
    """Who is told of the ends of jobs; deployments must be allowed to go there."""
    with Receiver().listening() as receiver:
        yield receiver


@pytest.fixture(scope="module")
def api(redis_server: str, s3_server: S3Server, engine: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """A caller of a gateway that lives as long as the file's tests; its Redis is empty at the start."""
    with redis.Redis.from_url(redis_server) as connection:
        connection.flushall()
    gateway = make_gateway(tmp_path_factory.mktemp("gateway"), describe_deployment(redis_server, s3_server, engine))
    with running(gateway):
        caller = Api(gateway.url)
        with caller.http:
            yield caller
