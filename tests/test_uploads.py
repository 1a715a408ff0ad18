"""Uploads over HTTP, on a real Redis and S3: promised, sent past the gateway, verified, shared, deleted; and whose they are."""

from __future__ import annotations

import asyncio
import hashlib
import io
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from blake3 import blake3

from gateway.errors import NotFound, StorageUnavailable, Unprocessable
from gateway.inputs.asset_records import AssetRecords
from gateway.inputs.assets import AssetStore
from gateway.jobs.model import now_ms
from gateway.redis_client import RedisClient
from gateway.settings import Settings
from gateway.storage import Storage
from local.child import pick_free_port
from tests.conftest import S3Access
from tests.dataset_api import DATASETS, Datasets, Json, read_error
from tests.dataset_files import picture, zip_of

pytest_plugins = ["tests.dataset_fixtures", "tests.store_fixtures"]

UPLOADS = "/v1/uploads"
CALLER, OTHER = "ann", "bob"


# -- the store -----------------------------------------------------------------------------------------------------


@pytest.fixture
async def storage(s3: S3Access) -> AsyncIterator[Storage]:
    keys: dict[str, Any] = {"aws_access_key_id": s3.access_key_id, "aws_secret_access_key": s3.secret_access_key}
    made = Storage(Settings.model_validate({"s3_endpoint_url": s3.endpoint_url, "s3_bucket": s3.bucket, **keys}))
    await made.ensure_bucket()
    yield made
    made.close()


@pytest.fixture
async def assets(redis_client: RedisClient, storage: Storage) -> AssetStore:
    return AssetStore(AssetRecords(redis_client), storage, ttl_s=3600, url_ttl_s=60)


async def send(url: str, body: bytes, headers: dict[str, str]) -> httpx.Response:
    async with httpx.AsyncClient() as http:
        return await http.put(url, content=body, headers=headers)


async def test_what_was_put_is_read_and_found_by_both_hashes(assets: AssetStore) -> None:
    body = picture(1)
    asset = await assets.put_file(CALLER, io.BytesIO(body), "image/png; charset=x", "a.png", tags=("input",))
    assert (asset.status, asset.name, asset.content_type, asset.size_bytes, asset.tags) == (
        "ready",
        "a.png",
        "image/png",
        len(body),
        ("input",),
    )
    assert (asset.width, asset.height) == (256, 256)
    assert (asset.sha256, asset.blake3) == (hashlib.sha256(body).hexdigest(), blake3(body).hexdigest())
    assert await assets.read(await assets.ready(CALLER, asset.id)) == body
    found = await assets.find(CALLER, blake3=asset.blake3)
    assert found is not None
    assert found.id == asset.id
    assert await assets.find(CALLER, sha256="0" * 64) is None


async def test_one_that_is_deleted_while_somebody_reads_it_is_absent_as_any(assets: AssetStore, storage: Storage) -> None:
    asset = await assets.put_file(CALLER, io.BytesIO(b"a moment"), "text/plain", "a.txt")
    await assets.delete(CALLER, asset.id)
    await storage.delete([asset.key])
    for read in (assets.read(asset), assets.copy_to(io.BytesIO(), asset)):
        with pytest.raises(NotFound) as gone:
            await read
        assert gone.value.code == "asset_not_found"
    kept = await assets.put_file(CALLER, io.BytesIO(b"another"), "text/plain", "b.txt")
    await storage.delete([kept.key])
    with pytest.raises(StorageUnavailable):
        await assets.read(kept)


async def test_equal_bytes_of_one_caller_lie_there_once_until_the_last_of_them_goes(assets: AssetStore, storage: Storage) -> None:
    one, two = [await assets.put_file(CALLER, io.BytesIO(b"same"), "text/plain", name) for name in ("one", "two")]
    three = await assets.again(one, "three")
    assert one.key == two.key == three.key
    assert len({one.id, two.id, three.id}) == 3
    for asset in (one, two):
        await assets.delete(CALLER, asset.id)
        assert await assets.read(three) == b"same"
    await assets.delete(CALLER, three.id)
    assert await storage.size_bytes(one.key) is None
    assert await assets.find(CALLER, sha256=one.sha256) is None
    with pytest.raises(NotFound):
        await assets.again(three, "four")


async def test_two_callers_share_nothing(assets: AssetStore) -> None:
    one, two = [await assets.put_file(caller, io.BytesIO(b"same"), "text/plain") for caller in (CALLER, OTHER)]
    assert one.key != two.key
    assert one.blake3
    assert (found := await assets.find(OTHER, blake3=one.blake3)) is not None
    assert found.id == two.id
    for deed in (assets.load, assets.ready, assets.delete):
        with pytest.raises(NotFound):
            await deed(OTHER, one.id)
    assert [asset.id for asset in (await assets.page(CALLER, None, 10))[0]] == [one.id]


async def test_puts_of_the_same_at_once_leave_one_object(assets: AssetStore, storage: Storage) -> None:
    made = await asyncio.gather(*(assets.put_file(CALLER, io.BytesIO(b"same"), "text/plain") for _ in range(8)))
    await assets.collect()
    assert len({asset.key for asset in made}) == 1
    assert await assets.read(made[0]) == b"same"


async def test_a_promise_is_kept_only_by_the_promised_bytes(assets: AssetStore, storage: Storage) -> None:
    body = picture(2)
    promise = await assets.presign(CALLER, "image/png", len(body), hashlib.sha256(body).hexdigest().upper())
    with pytest.raises(Unprocessable) as early:
        await assets.ready(CALLER, promise.asset.id)
    assert early.value.code == "upload_not_sent"
    assert (await send(promise.url, body[:-1], {**promise.headers, "Content-Length": str(len(body) - 1)})).status_code == 403
    assert (await send(promise.url, body, {**promise.headers, "Content-Type": "text/html"})).status_code == 403
    # This S3 server does not look at the checksum that it was given; others refuse here already.
    await send(promise.url, b"x" * len(body), promise.headers)
    with pytest.raises(Unprocessable) as wrong:
        await assets.ready(CALLER, promise.asset.id)
    assert wrong.value.code == "upload_mismatch"
    assert (await send(promise.url, body, promise.headers)).status_code == 200
    ready = await assets.ready(CALLER, promise.asset.id)
    assert (ready.status, ready.width, ready.blake3) == ("ready", 256, blake3(body).hexdigest())
    # The URL lives on; what was verified does not change any more.
    await send(promise.url, b"x" * len(body), promise.headers)
    assert await assets.read(await assets.ready(CALLER, ready.id)) == body


async def test_first_uses_at_once_agree(assets: AssetStore) -> None:
    body = b"many" * 1000
    promise = await assets.presign(CALLER, "text/plain", len(body), hashlib.sha256(body).hexdigest())
    await send(promise.url, body, promise.headers)
    seen = await asyncio.gather(*(assets.ready(CALLER, promise.asset.id) for _ in range(6)))
    await assets.collect()
    assert len({asset.key for asset in seen}) == 1
    assert await assets.read(seen[0]) == body


async def test_what_nobody_used_goes(redis_client: RedisClient, storage: Storage, assets: AssetStore) -> None:
    brief = AssetStore(AssetRecords(redis_client), storage, ttl_s=0, url_ttl_s=60)
    gone = await brief.put_file(CALLER, io.BytesIO(b"gone"), "text/plain")
    kept = await assets.put_file(CALLER, io.BytesIO(b"kept"), "text/plain", ttl_s=0)
    await AssetRecords(redis_client).touch(kept.id, kept.created_ms + 3_600_000)
    with pytest.raises(NotFound):
        await assets.load(CALLER, gone.id)
    assert await AssetRecords(redis_client).remove_expired() == 1
    await assets.collect()
    assert await storage.size_bytes(gone.key) is None
    assert await assets.read(await assets.load(CALLER, kept.id)) == b"kept"
    await assets.delete(CALLER, kept.id)
    assert [key async for key in redis_client.scan_iter("fluxgate:*")] == []


async def test_an_object_that_may_have_been_written_is_garbage_in_time(redis_client: RedisClient, s3: S3Access) -> None:
    keys: dict[str, Any] = {"aws_access_key_id": s3.access_key_id, "aws_secret_access_key": s3.secret_access_key}
    gone = Storage(Settings.model_validate({"s3_endpoint_url": f"http://127.0.0.1:{pick_free_port()}", "s3_bucket": s3.bucket, **keys}))
    broken = AssetStore(AssetRecords(redis_client), gone, ttl_s=3600, url_ttl_s=60)
    with pytest.raises(StorageUnavailable):
        await broken.put_file(CALLER, io.BytesIO(b"x"), "text/plain")
    gone.close()
    ((key, due_ms),) = await redis_client.zrange("fluxgate:garbage", 0, -1, withscores=True)
    assert key.startswith(b"assets/")
    assert due_ms > now_ms()
    assert [key async for key in redis_client.scan_iter("fluxgate:*")] == [b"fluxgate:garbage"]


# -- over HTTP -----------------------------------------------------------------------------------------------------


def promise_of(datasets: Datasets, body: bytes, **fields: object) -> httpx.Response:
    wanted = {"content_type": "image/png", "size_bytes": len(body), "sha256": hashlib.sha256(body).hexdigest(), **fields}
    return datasets.http.post(UPLOADS, json=wanted)


def send_form(datasets: Datasets, body: bytes, name: str = "a.png") -> Json:
    answer = datasets.http.post(UPLOADS, files={"file": (name, body)})
    assert answer.status_code == 201, answer.text
    return dict(answer.json())


def test_a_file_goes_straight_to_s3(datasets: Datasets) -> None:
    body = picture(3)
    answer = promise_of(datasets, body, name="../mine.png")
    assert answer.status_code == 201, answer.text
    promise = answer.json()
    assert answer.headers["location"] == promise["urls"]["self"]
    assert (promise["status"], promise["method"], promise["name"], promise["content_url"]) == ("pending", "PUT", "mine.png", None)
    assert httpx.put(promise["url"], content=body, headers=promise["headers"]).status_code == 200
    assert datasets.http.get(f"{UPLOADS}/{promise['id']}").json()["status"] == "pending"


@pytest.mark.parametrize("content_type", ["image/png", "image/jpeg", "video/mp4", "application/zip"])
def test_what_was_sent_is_held_to_its_type_when_it_is_first_used(datasets: Datasets, content_type: str) -> None:
    """A page that was promised as a picture: S3 takes it, for its length and hash are right."""
    body = f"<script>alert('{content_type}')</script>".encode()
    promise = promise_of(datasets, body, content_type=content_type).json()
    assert httpx.put(promise["url"], content=body, headers={**promise["headers"], "Content-Type": "text/html"}).status_code == 403
    assert httpx.put(promise["url"], content=body, headers=promise["headers"]).status_code == 200
    used = datasets.http.post(DATASETS, json={"name": "x", "uploads": [{"id": promise["id"], "name": "a.png"}]})
    error = read_error(used, 422, "upload_mismatch")
    assert error["details"]["content_type"] == content_type
    assert datasets.http.get(f"{UPLOADS}/{promise['id']}").json()["content_url"] is None


def test_a_small_file_is_ready_at_once_and_found_in_the_list(datasets: Datasets) -> None:
    body = picture(4)
    upload = send_form(datasets, body, "..\\..\\b.jpg")
    assert (upload["status"], upload["name"], upload["content_type"], upload["width"]) == ("ready", "b.jpg", "image/png", 256)
    assert httpx.get(upload["content_url"]).content == body
    listed = datasets.http.get(UPLOADS, params={"limit": 1}).json()
    assert [item["id"] for item in listed["data"]] == [upload["id"]]
    following = datasets.http.get(UPLOADS, params={"cursor": listed["next_cursor"]}).json()
    assert upload["id"] not in [item["id"] for item in following["data"]]
    assert datasets.http.delete(f"{UPLOADS}/{upload['id']}").json() == {"id": upload["id"], "object": "upload.deleted"}
    assert httpx.get(upload["content_url"]).status_code == 404
    for method in ("GET", "DELETE"):
        read_error(datasets.http.request(method, f"{UPLOADS}/{upload['id']}"), 404, "asset_not_found")


def test_a_page_is_served_as_mere_bytes(datasets: Datasets) -> None:
    upload = send_form(datasets, b"<script>alert(1)</script>", "x.html")
    assert httpx.get(upload["content_url"]).headers["content-type"] == "application/octet-stream"
    assert promise_of(datasets, b"<svg/>", content_type="image/svg+xml").json()["headers"]["Content-Type"] == "application/octet-stream"


@pytest.mark.parametrize(
    ("fields", "status", "code", "parameter"),
    [
        ({"sha256": "abc"}, 422, "invalid_parameter", "sha256"),
        ({"size_bytes": 0}, 422, "invalid_parameter", "size_bytes"),
        ({"size_bytes": "5"}, 422, "invalid_parameter", "size_bytes"),
        ({"size_bytes": 1 << 60}, 413, "payload_too_large", "size_bytes"),
        ({"content_type": "image/png\r\nx: y"}, 422, "invalid_parameter", "content_type"),
        ({"content_type": "png"}, 422, "invalid_parameter", "content_type"),
        ({"key": "../../etc"}, 422, "invalid_parameter", "key"),
    ],
)
def test_promises_that_are_refused(datasets: Datasets, fields: dict[str, object], status: int, code: str, parameter: str) -> None:
    error = read_error(promise_of(datasets, b"x", **fields), status, code)
    assert error["details"]["parameter"] == parameter


def test_forms_and_bodies_that_are_refused(datasets: Datasets) -> None:
    post = datasets.http.post
    read_error(post(UPLOADS, files={"file": ("a", b"")}), 422, "invalid_parameter")
    read_error(post(UPLOADS, files={"file": ("a", b"x")}, data={"name": "b"}), 422, "invalid_parameter")
    read_error(post(UPLOADS, files=[("file", ("a", b"x")), ("file", ("b", b"x"))]), 413, "payload_too_large")
    read_error(post(UPLOADS, content=b"{", headers={"Content-Type": "application/json"}), 400, "invalid_json")
    read_error(post(UPLOADS, content=b"[" * 100_000, headers={"Content-Type": "application/json"}), 400, "invalid_json")
    read_error(datasets.http.get(f"{UPLOADS}/%2e%2e%2fx"), 404, "not_found")


# -- into datasets -------------------------------------------------------------------------------------------------


def make_dataset(datasets: Datasets, **body: object) -> httpx.Response:
    return datasets.http.post(DATASETS, json=body)


def test_uploads_become_a_dataset_as_files_would(datasets: Datasets) -> None:
    body = picture(11)
    promise = promise_of(datasets, body, name="straight.png").json()
    assert httpx.put(promise["url"], content=body, headers=promise["headers"]).status_code == 200
    uses: list[Json] = [
        {"id": promise["id"], "caption": "a red cup"},
        {"id": send_form(datasets, picture(12), "b.png")["id"], "name": "straight.png", "caption": "another"},
        {"id": send_form(datasets, picture(13), "c.png")["id"]},
        {"id": send_form(datasets, b"from a file", "c.txt")["id"]},
        {"id": send_form(datasets, picture(14), "d.png")["id"]},
    ]
    answer = make_dataset(datasets, name="cups", trigger_word="TOK", uploads=uses, captions={"d.png": "by the map"})
    assert answer.status_code == 201, answer.text
    dataset = answer.json()
    captions = {file["name"]: file["caption_used"] for file in dataset["files"]}
    assert captions == {"straight.png": "a red cup", "straight (2).png": "another", "c.png": "from a file", "d.png": "by the map"}
    assert (dataset["name"], dataset["trigger_word"], dataset["upload"]["refused"]) == ("cups", "TOK", [])
    for use in uses:
        assert datasets.http.delete(f"{UPLOADS}/{use['id']}").status_code == 200
    stored = {file["sha256"]: httpx.get(file["url"]).content for file in dataset["files"]}
    assert hashlib.sha256(body).hexdigest() in stored
    assert all(hashlib.sha256(content).hexdigest() == digest for digest, content in stored.items())


def test_an_uploaded_zip_is_unpacked_and_more_is_added_later(datasets: Datasets) -> None:
    upload = send_form(datasets, zip_of({"set/1.png": picture(21), "set/1.txt": b"one"}), "set.zip")
    assert upload["content_type"] == "application/octet-stream"
    dataset = make_dataset(datasets, uploads=[{"id": upload["id"]}]).json()
    assert [(file["name"], file["caption"]) for file in dataset["files"]] == [("1.png", "one")]
    again = [{"id": send_form(datasets, picture(22), "2.png")["id"], "caption": "two"}]
    answer = datasets.http.put(f"{DATASETS}/{dataset['id']}/files", json={"uploads": again})
    assert answer.status_code == 200, answer.text
    assert [(file["name"], file["caption"]) for file in answer.json()["files"]] == [("1.png", "one"), ("2.png", "two")]


def test_datasets_of_uploads_that_are_refused(datasets: Datasets) -> None:
    before = datasets.http.get(DATASETS).json()["data"]
    known = send_form(datasets, picture(31))["id"]
    error = read_error(make_dataset(datasets, uploads=[{"id": known}, {"id": "nobodys"}]), 404, "asset_not_found")
    assert error["details"] == {"parameter": "uploads.1.id", "value": "nobodys"}
    promise = promise_of(datasets, b"never sent").json()
    read_error(make_dataset(datasets, uploads=[{"id": promise["id"]}]), 422, "upload_not_sent")
    for body, parameter in (
        ({}, "uploads"),
        ({"uploads": []}, "uploads"),
        ({"uploads": [{"id": known, "path": "x"}]}, "uploads.0.path"),
        ({"uploads": [{"id": known}], "nam": "x"}, "nam"),
        ({"uploads": [{"id": known}], "name": "a\nb"}, "name"),
    ):
        error = read_error(datasets.http.post(DATASETS, json=body), 422, "invalid_parameter")
        assert error["details"]["parameter"] == parameter
    read_error(datasets.http.post(DATASETS, content=b"[]", headers={"Content-Type": "application/json"}), 422, "invalid_parameter")
    read_error(datasets.http.post(DATASETS, content=b"{", headers={"Content-Type": "application/json"}), 400, "invalid_json")
    assert datasets.http.get(DATASETS).json()["data"] == before
