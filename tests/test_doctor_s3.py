"""The doctor before an S3 that is well, and before each way in which it may not be."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from pydantic import SecretStr

from gateway.doctor.s3 import examine_s3
from gateway.settings import Settings
from gateway.storage import Storage
from local.child import pick_free_port
from tests.conftest import S3Access
from tests.doctor_parts import require, states
from tests.s3_proxy import S3Proxy, running_proxy


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


def s3_settings(s3: S3Access, **changes: Any) -> Settings:
    return Settings(
        **{
            "s3_endpoint_url": s3.endpoint_url,
            "aws_access_key_id": s3.access_key_id,
            "aws_secret_access_key": SecretStr(s3.secret_access_key),
            "s3_bucket": s3.bucket,
            **changes,
        }
    )


@pytest.fixture
async def bucket(s3: S3Access) -> S3Access:
    storage = Storage(s3_settings(s3))
    await storage.ensure_bucket()
    storage.close()
    return s3


async def test_a_healthy_s3(bucket: S3Access, session: aiohttp.ClientSession) -> None:
    findings = await examine_s3(s3_settings(bucket), session)
    assert [(each.check, each.state) for each in findings] == [
        (f"s3.{what}", "ok") for what in ("reach", "clock", "write", "region", "checksum", "public", "delete")
    ]


async def test_s3_out_of_reach(bucket: S3Access, session: aiohttp.ClientSession) -> None:
    settings = s3_settings(bucket, s3_endpoint_url=f"http://127.0.0.1:{pick_free_port()}")
    require(await examine_s3(settings, session), "s3.reach", "does not answer", "S3_ENDPOINT_URL")


async def test_a_wrong_secret(bucket: S3Access, session: aiohttp.ClientSession) -> None:
    settings = s3_settings(bucket, aws_secret_access_key=SecretStr("not-the-secret-of-it"))
    findings = await examine_s3(settings, session)
    require(findings, "s3.write", "SignatureDoesNotMatch", "AWS_SECRET_ACCESS_KEY")
    assert "not-the-secret" not in str(findings)


async def test_an_unknown_access_key(bucket: S3Access, session: aiohttp.ClientSession) -> None:
    settings = s3_settings(bucket, aws_access_key_id="NOBODY")
    require(await examine_s3(settings, session), "s3.write", "InvalidAccessKeyId", "AWS_ACCESS_KEY_ID")


async def test_a_bucket_that_is_not_there(s3: S3Access, session: aiohttp.ClientSession) -> None:
    require(await examine_s3(s3_settings(s3), session), "s3.write", "NoSuchBucket", "S3_BUCKET")


async def test_a_wrong_region(bucket: S3Access, session: aiohttp.ClientSession) -> None:
    async with running_proxy(S3Proxy(bucket.endpoint_url, region="eu-central-1")) as proxy:
        findings = await examine_s3(s3_settings(bucket, s3_endpoint_url=proxy.url), session)
        require(findings, "s3.region", "does not take us-east-1", "S3_REGION=eu-central-1")
        assert states(await examine_s3(s3_settings(bucket, s3_endpoint_url=proxy.url, s3_region="eu-central-1"), session)) == {"ok"}


async def test_a_clock_that_is_off(bucket: S3Access, session: aiohttp.ClientSession) -> None:
    async with running_proxy(S3Proxy(bucket.endpoint_url, late_s=-3600)) as proxy:
        settings = s3_settings(bucket, s3_endpoint_url=proxy.url)
        require(await examine_s3(settings, session), "s3.clock", "s apart", "NTP")
        proxy.late_s = 300
        require(await examine_s3(settings, session), "s3.clock", "s apart", "NTP", "warning")


async def test_a_bucket_that_may_not_be_written(bucket: S3Access, session: aiohttp.ClientSession) -> None:
    async with running_proxy(S3Proxy(bucket.endpoint_url, read_only=True)) as proxy:
        findings = await examine_s3(s3_settings(bucket, s3_endpoint_url=proxy.url), session)
        require(findings, "s3.write", "AccessDenied", "s3:PutObject")


async def test_a_public_endpoint_that_leads_elsewhere(bucket: S3Access, session: aiohttp.ClientSession) -> None:
    nobody = s3_settings(bucket, s3_public_endpoint_url=f"http://127.0.0.1:{pick_free_port()}")
    require(await examine_s3(nobody, session), "s3.public", "does not answer", "S3_PUBLIC_ENDPOINT_URL")
    async with running_proxy(S3Proxy(bucket.endpoint_url, rename_host=True)) as proxy:
        renamed = s3_settings(bucket, s3_public_endpoint_url=proxy.url)
        require(await examine_s3(renamed, session), "s3.public", "answers 403", "keep the Host header")
