"""A caller of `/v1/datasets`, on a gateway of its own. A module that wants it says `pytest_plugins = ["tests.dataset_fixtures"]`."""

from __future__ import annotations

from collections.abc import Iterator

import boto3
import httpx
import pytest
import redis

from local.services import S3Server
from tests.dataset_api import MAX_UPLOAD_BYTES, Datasets
from tests.deployment import describe_deployment, make_gateway, running


@pytest.fixture(scope="module")
def datasets(redis_server: str, s3_server: S3Server, engine: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Datasets]:
    """A caller of a gateway that lives as long as the file's tests; its Redis is empty at the start."""
    with redis.Redis.from_url(redis_server) as connection:
        connection.flushall()
    env = describe_deployment(redis_server, s3_server, engine, MAX_UPLOAD_BYTES=str(MAX_UPLOAD_BYTES))
    s3 = boto3.client(
        "s3",
        endpoint_url=env["S3_ENDPOINT_URL"],
        region_name="us-east-1",
        aws_access_key_id=env["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=env["AWS_SECRET_ACCESS_KEY"],
    )
    gateway = make_gateway(tmp_path_factory.mktemp("gateway"), env)
    with running(gateway), httpx.Client(base_url=gateway.url, timeout=60.0) as http:
        yield Datasets(http, s3, env["S3_BUCKET"])
    s3.close()
