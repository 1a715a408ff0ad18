"""Keys and bytes against a real S3 server, and what is said when it is not there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import parse_qs, urlsplit

import aiohttp
import httpx
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from gateway.errors import StorageUnavailable
from gateway.plain_http import PlainHttp
from gateway.settings import Settings
from gateway.storage import Storage
from local.child import pick_free_port
from tests.conftest import S3Access

WAYS = pytest.mark.parametrize("way", ["boto3", "aiohttp", "plain"])
AWKWARD_KEYS = ["plain.png", "generations/gen_1/0.png", "naïve/日本 語.png", "a+b&c=d?e#f%20g.png", "'quoted' \"twice\".png"]


def settings_for(s3: S3Access, **fields: object) -> Settings:
    given: dict[str, object] = {
        "s3_endpoint_url": s3.endpoint_url,
        "s3_bucket": s3.bucket,
        "aws_access_key_id": s3.access_key_id,
        "aws_secret_access_key": s3.secret_access_key,
    }
    return Settings.model_validate(given | fields)


@asynccontextmanager
async def open_storage(settings: Settings, way: str) -> AsyncIterator[Storage]:
    """A storage that puts small objects in one of its ways."""
    plain = PlainHttp()
    async with aiohttp.ClientSession() as session:
        storage = Storage(settings, None if way == "boto3" else session, plain if way == "plain" else None)
        yield storage
        storage.close()
        plain.close()


@pytest.fixture(params=["boto3", "aiohttp", "plain"])
async def storage(s3: S3Access, request: pytest.FixtureRequest) -> AsyncIterator[Storage]:
    """A storage whose bucket is there."""
    async with open_storage(settings_for(s3), request.param) as made:
        await made.ensure_bucket()
        yield made


async def fetch(url: str) -> httpx.Response:
    async with httpx.AsyncClient(timeout=10) as client:
        return await client.get(url)


@pytest.mark.parametrize("key", AWKWARD_KEYS)
async def test_what_was_put_is_got_and_signed_for_anyone(storage: Storage, key: str) -> None:
    body = key.encode() * 3
    await storage.put(key, body, "image/png")
    assert await storage.get(key) == body
    answer = await fetch(storage.sign(key))
    assert (answer.status_code, answer.content) == (200, body)
    assert answer.headers["content-type"] == "image/png"


async def test_putting_again_replaces(storage: Storage) -> None:
    await storage.put("k", b"one", "image/png")
    await storage.put("k", b"", "image/webp")
    assert await storage.get("k") == b""


async def test_a_large_object_comes_back_whole(storage: Storage) -> None:
    body = bytes(range(256)) * (16 << 10)
    await storage.put("big.bin", body, "application/octet-stream")
    assert await storage.get("big.bin") == body


async def test_a_copy_does_not_depend_on_its_source(storage: Storage) -> None:
    await storage.put("source.png", b"picture", "image/png")
    await storage.copy("source.png", "copies/target.png")
    await storage.delete(["source.png"])
    assert await storage.get("copies/target.png") == b"picture"
    with pytest.raises(StorageUnavailable):
        await storage.copy("source.png", "other.png")


async def test_deleting_takes_what_is_there(storage: Storage) -> None:
    await storage.put("a", b"1", "image/png")
    await storage.put("b", b"2", "image/png")
    await storage.delete(["a", "never-there"])
    await storage.delete([])
    with pytest.raises(StorageUnavailable):
        await storage.get("a")
    assert await storage.get("b") == b"2"


async def test_a_signature_opens_one_object_for_a_while(storage: Storage) -> None:
    await storage.put("mine.png", b"mine", "image/png")
    await storage.put("other.png", b"other", "image/png")
    url = storage.sign("mine.png")
    assert (await fetch(url.replace("mine.png", "other.png"))).status_code == 403
    assert (await fetch(url.partition("?")[0])).status_code in (400, 403)
    query = parse_qs(urlsplit(url).query)
    assert query["X-Amz-Expires"] == ["3600"]
    assert query["X-Amz-Algorithm"] == ["AWS4-HMAC-SHA256"]


async def test_callers_are_sent_to_the_public_endpoint(s3: S3Access, storage: Storage) -> None:
    await storage.put("k.png", b"picture", "image/png")
    port = urlsplit(s3.endpoint_url).port
    outside = Storage(settings_for(s3, s3_public_endpoint_url=f"http://localhost:{port}", url_ttl_s=60))
    url = outside.sign("k.png")
    outside.close()
    assert url.startswith(f"http://localhost:{port}/{s3.bucket}/k.png?"), (
        "the host is part of what is signed, so it cannot be replaced later"
    )
    assert (await fetch(url)).content == b"picture"
    assert (await fetch(url.replace("//localhost", "//127.0.0.1"))).status_code == 403


@WAYS
async def test_the_bucket_is_made_once(s3: S3Access, way: str) -> None:
    async with open_storage(settings_for(s3), way) as storage:
        with pytest.raises(StorageUnavailable):
            await storage.check()
        with pytest.raises(StorageUnavailable) as refused:
            await storage.put("k", b"", "image/png")
        assert refused.value.details["bucket"] == s3.bucket
        await storage.ensure_bucket()
        await storage.ensure_bucket()
        await storage.check()


async def test_on_aws_there_is_no_endpoint_and_the_bucket_is_in_the_host() -> None:
    storage = Storage(Settings.model_validate({"s3_bucket": "pictures", "aws_access_key_id": "a", "aws_secret_access_key": "b"}))
    assert storage.sign("k.png").startswith("https://pictures.s3.amazonaws.com/k.png?")
    storage.close()


@WAYS
async def test_an_endpoint_that_is_not_there_is_unavailable(s3: S3Access, way: str) -> None:
    async with open_storage(settings_for(s3, s3_endpoint_url=f"http://127.0.0.1:{pick_free_port()}"), way) as storage:
        for call in (storage.check(), storage.ensure_bucket(), storage.put("k", b"", "image/png"), storage.get("k"), storage.delete(["k"])):
            with pytest.raises(StorageUnavailable) as refused:
                await call
            assert refused.value.status == 503
            assert refused.value.hint
            assert refused.value.__cause__ is not None


@WAYS
async def test_wrong_keys_are_unavailable(s3: S3Access, way: str) -> None:
    async with open_storage(settings_for(s3), way) as owner:
        await owner.ensure_bucket()
    async with open_storage(settings_for(s3, aws_secret_access_key="wrong"), way) as stranger:
        with pytest.raises(StorageUnavailable) as refused:
            await stranger.put("k", b"", "image/png")
        assert refused.value.details["s3_code"] == "SignatureDoesNotMatch"


async def test_the_first_object_of_a_folder_goes_alone(s3: S3Access) -> None:
    began, go_on = list[str](), asyncio.Event()

    async def take(request: web.Request) -> web.Response:
        began.append(request.path)
        if request.path.endswith("/new/0.png"):
            await go_on.wait()
        return web.Response()

    app = web.Application()
    app.router.add_put("/{key:.*}", take)
    async with TestServer(app) as server, aiohttp.ClientSession() as session:
        storage = Storage(settings_for(s3, s3_endpoint_url=str(server.make_url("")).rstrip("/")), session)
        puts = [asyncio.create_task(storage.put(f"new/{n}.png", b"x", "image/png")) for n in range(5)]
        await storage.put("other/0.png", b"x", "image/png")
        assert [path.rpartition("/")[2] for path in began if "/new/" in path] == ["0.png"]
        go_on.set()
        await asyncio.gather(*puts)
        assert len(began) == 6
        storage.close()
