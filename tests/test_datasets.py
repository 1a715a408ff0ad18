"""Datasets over HTTP, on a real Redis and S3: made, read, changed from two sides at once, removed; and whose they are."""

from __future__ import annotations

import base64
import hashlib
import json
import socket
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import quote

import httpx
import pytest
import redis
from PIL import Image

from tests.dataset_api import DATASETS, MAX_UPLOAD_BYTES, Datasets, Json, read_error
from tests.dataset_files import MP4, WEBM, draw, encode, orient, picture, reopen, zip_of

pytest_plugins = ["tests.dataset_fixtures"]


def names_of(dataset: Json) -> list[str]:
    return [file["name"] for file in dataset["files"]]


def captions_of(dataset: Json) -> dict[str, str | None]:
    return {file["name"]: file["caption_used"] for file in dataset["files"]}


# -- made and read -------------------------------------------------------------------------------------------------


def test_pictures_and_captions_become_a_dataset(datasets: Datasets) -> None:
    files = [("a.png", picture(1)), ("a.txt", b"a red cup\n"), ("b.jpg", picture(2, kind="JPEG")), ("c.webp", picture(3, kind="WEBP"))]
    dataset = datasets.create(
        files, name="cups", captions=json.dumps({"b.jpg": "a TOK cup"}), trigger_word="TOK", caption_template="one {trigger}"
    )
    assert dataset["id"].startswith("ds_")
    assert (dataset["name"], dataset["asset"], dataset["trigger_word"], dataset["file_count"]) == ("cups", "image", "TOK", 3)
    assert captions_of(dataset) == {"a.png": "a red cup", "b.jpg": "a TOK cup", "c.webp": "one TOK"}
    assert dataset["upload"] == {"stored": ["a.png", "b.jpg", "c.webp"], "refused": [], "captions": ["a.png", "b.jpg"], "notices": []}
    assert dataset["preflight"]["trigger_coverage"] == 0.667
    assert datasets.get(dataset["id"]) == {key: value for key, value in datasets.strip(dataset).items() if key != "upload"}
    for (name, body), file in zip([files[0], files[2], files[3]], dataset["files"], strict=True):
        assert (file["name"], file["sha256"], file["size_bytes"]) == (name, hashlib.sha256(body).hexdigest(), len(body))
        assert httpx.get(file["url"]).content == body


def test_a_zip_becomes_a_dataset(datasets: Datasets) -> None:
    members = {
        "set/1.png": picture(1),
        "set/1.txt": b"one",
        "set/sub/1.png": picture(2),
        "set/sub/1.txt": b"two",
        "__MACOSX/set/._1.png": b"x",
    }
    dataset = datasets.create([("set.zip", zip_of(members))])
    assert captions_of(dataset) == {"1.png": "one", "1 (2).png": "two"}
    assert [notice["code"] for notice in dataset["upload"]["notices"]] == ["name_clash"]
    assert datasets.keys(dataset["id"]) == sorted(datasets.keys(dataset["id"]))
    assert len(datasets.keys(dataset["id"])) == 2


def test_no_name_of_a_caller_becomes_a_key(datasets: Datasets) -> None:
    dataset = datasets.create([("../../../etc/pass wd .png", picture(1)), ("..\\..\\b.png", picture(2))])
    assert names_of(dataset) == ["b.png", "pass wd .png"]
    for key in datasets.keys(dataset["id"]):
        assert key.isascii()
        assert key.startswith(f"datasets/{dataset['id']}/")
        assert key.rpartition("/")[2].partition("-")[0] in {file["sha256"][:32] for file in dataset["files"]}


def test_what_is_stored_is_upright_and_without_metadata(datasets: Datasets) -> None:
    body = encode(draw(1, 200, 100), "JPEG", exif=orient(draw(1), 6))
    (file,) = datasets.create([("phone.jpg", body)], trigger_word="TOK")["files"]
    stored = httpx.get(file["url"]).content
    assert (file["width"], file["height"]) == reopen(stored).size == (100, 200)
    assert b"secret" in body
    assert b"secret" not in stored
    assert file["sha256"] == hashlib.sha256(stored).hexdigest()


def test_clips_are_stored_as_they_are(datasets: Datasets) -> None:
    dataset = datasets.create(
        [("a.mp4", MP4), ("a.txt", b"a cup falls"), ("b.webm", WEBM), ("c.png", picture(1))], asset="video", trigger_word="TOK"
    )
    assert [file["content_type"] for file in dataset["files"]] == ["video/mp4", "video/webm", None]
    assert dataset["upload"]["refused"] == ["c.png"]
    assert httpx.get(dataset["files"][0]["url"]).content == MP4
    assert [(file["width"], file["height"], file["frames"]) for file in dataset["files"][:2]] == [(96, 64, 17), (96, 64, 17)]
    codes = {problem["code"]: problem["files"] for problem in dataset["preflight"]["errors"]}
    assert codes == {"video_unsupported": ["c.png"], "clip_too_short": ["a.mp4", "b.webm"]}
    assert "clip_too_short" not in str(datasets.get(dataset["id"], video_frames=17)["preflight"])
    assert dataset["preflight"]["buckets"] == []


def test_the_report_follows_the_settings_of_the_question(datasets: Datasets) -> None:
    dataset = datasets.create([(f"{n}.png", picture(n)) for n in range(6)])
    assert not dataset["preflight"]["ok"]
    asked = datasets.get(dataset["id"], resolution=256, batch_size=2, repeats=3, steps=60, trigger_word="TOK")["preflight"]
    assert asked["ok"], asked
    assert (asked["steps_per_epoch"], asked["epochs"]) == (12, 5.0)
    assert asked["buckets"] == [{"aspect": 1.0, "width": 256, "height": 256, "count": 6}]
    assert asked["plan"]["trigger_word"] == "TOK"
    assert datasets.get(dataset["id"])["trigger_word"] is None


def test_lists_are_by_time_and_whole(datasets: Datasets) -> None:
    made = [datasets.create([("a.png", picture(n))], name=f"n{n}")["id"] for n in range(5)]
    seen, cursor = list[str](), None
    while True:
        answer = datasets.http.get(DATASETS, params={"limit": 2, **({"cursor": cursor} if cursor else {})}).json()
        seen += [dataset["id"] for dataset in answer["data"]]
        assert len(answer["data"]) <= 2
        if (cursor := answer["next_cursor"]) is None:
            break
    assert seen[:5] == made[::-1]
    assert len(seen) == len(set(seen))


# -- changed -------------------------------------------------------------------------------------------------------


def test_files_are_added_replaced_and_captioned(datasets: Datasets) -> None:
    dataset = datasets.create([("a.png", picture(1)), ("b.png", picture(2))], trigger_word="TOK")
    before = datasets.keys(dataset["id"])
    changed = datasets.put(dataset["id"], [("b.png", picture(7)), ("c.png", picture(3)), ("a.txt", b"late words")])
    assert captions_of(changed) == {"a.png": "late words", "b.png": "TOK", "c.png": "TOK"}
    assert changed["files"][1]["sha256"] == hashlib.sha256(picture(7)).hexdigest()
    assert changed["updated_at"] > changed["created_at"]
    after = datasets.keys(dataset["id"])
    assert len(after) == 3
    assert len(set(after) & set(before)) == 1, "what was replaced is gone from S3"
    assert captions_of(datasets.put(dataset["id"], [], captions='{"c": "by the map"}'))["c.png"] == "by the map"


def test_a_refused_file_replaces_none_that_was_taken(datasets: Datasets) -> None:
    dataset = datasets.create([("a.png", picture(1))], trigger_word="TOK")
    changed = datasets.put(dataset["id"], [("a.png", picture(1)[:2000]), ("b.png", picture(2)[:2000])])
    assert changed["upload"]["refused"] == ["a.png", "b.png"]
    assert [file["url"] is None for file in changed["files"]] == [False, True]
    assert [problem["files"] for problem in changed["preflight"]["errors"]] == [["b.png"]]
    assert datasets.put(dataset["id"], [("b.png", picture(2))])["preflight"]["ok"]


def test_uploads_at_the_same_time_lose_nothing(datasets: Datasets) -> None:
    dataset = datasets.create([("0.png", picture(0))], trigger_word="TOK")

    def add(number: int) -> None:
        datasets.put(dataset["id"], [(f"{number}.png", picture(number)), ("0.txt", f"caption {number}".encode())])

    with ThreadPoolExecutor(6) as threads:
        list(threads.map(add, range(1, 13)))
    found = datasets.get(dataset["id"])
    assert sorted(names_of(found)) == sorted(f"{number}.png" for number in range(13))
    assert len(datasets.keys(dataset["id"])) == 13
    assert captions_of(found)["0.png"] in {f"caption {number}" for number in range(1, 13)}


def test_equal_pictures_go_one_by_one(datasets: Datasets) -> None:
    dataset = datasets.create([("a.png", picture(1)), ("b.png", picture(1))], trigger_word="TOK")
    assert "duplicate_content" in {problem["code"] for problem in dataset["preflight"]["warnings"]}
    left = datasets.http.delete(f"{DATASETS}/{dataset['id']}/files/a.png").json()
    assert names_of(left) == ["b.png"]
    assert httpx.get(left["files"][0]["url"]).content == picture(1)


def test_a_file_is_removed_by_any_name_it_can_have(datasets: Datasets) -> None:
    dataset = datasets.create([("été #1 100%?.png", picture(1)), ("b.png", picture(2)), ("b.txt", b"words")], trigger_word="TOK")
    for name in ("été #1 100%?.png", "b.png"):
        answer = datasets.http.delete(f"{DATASETS}/{dataset['id']}/files/{quote(name, safe='')}")
        assert answer.status_code == 200, answer.text
        assert name not in names_of(answer.json())
    assert datasets.keys(dataset["id"]) == []
    assert captions_of(datasets.put(dataset["id"], [("b.png", picture(2))])) == {"b.png": "TOK"}, "its caption went with it"
    read_error(datasets.http.delete(f"{DATASETS}/{dataset['id']}/files/a.png"), 404, "dataset_file_not_found")


def test_a_deleted_dataset_leaves_nothing(datasets: Datasets, redis_server: str) -> None:
    dataset = datasets.create([("a.png", picture(1)), ("a.txt", b"words"), ("b.png", b"broken")], trigger_word="TOK")
    assert datasets.keys(dataset["id"])
    assert datasets.http.delete(f"{DATASETS}/{dataset['id']}").json() == {"id": dataset["id"], "object": "dataset.deleted"}
    assert datasets.keys(dataset["id"]) == []
    with redis.Redis.from_url(redis_server) as connection:
        assert not [key for key in connection.scan_iter("*") if dataset["id"].encode() in key]
    read_error(datasets.http.get(f"{DATASETS}/{dataset['id']}"), 404, "dataset_not_found")
    read_error(datasets.http.put(f"{DATASETS}/{dataset['id']}/files", files=[("files", ("a.png", picture(1)))]), 404, "dataset_not_found")


def test_somebody_elses_dataset_is_as_absent_as_one_that_never_was(datasets: Datasets, redis_server: str) -> None:
    dataset = datasets.create([("a.png", picture(1))])
    place = f"fluxgate:dataset:{dataset['id']}"
    with redis.Redis.from_url(redis_server) as connection:
        head = json.loads(connection.hget(place, "head") or b"")
        connection.hset(place, "head", json.dumps({**head, "caller": "somebody else"}))
    for method, path in (("GET", ""), ("DELETE", ""), ("PUT", "/files"), ("DELETE", "/files/a.png")):
        foreign = read_error(datasets.http.request(method, f"{DATASETS}/{dataset['id']}{path}"), 404, "dataset_not_found")
        never = read_error(datasets.http.request(method, f"{DATASETS}/ds_0{path}"), 404, "dataset_not_found")
        assert json.loads(json.dumps(foreign).replace(dataset["id"], "ds_0")) == never
    assert len(datasets.keys(dataset["id"])) == 1


# -- large ---------------------------------------------------------------------------------------------------------


def test_an_upload_may_be_larger_than_other_bodies(datasets: Datasets) -> None:
    big = encode(Image.effect_noise((1200, 1200), 100))
    assert len(big) > 1 << 20
    assert datasets.create([("big.png", big)], trigger_word="TOK")["preflight"]["ok"]
    read_error(datasets.http.post("/v1/trainings", content=big, headers={"Content-Type": "application/json"}), 413, "payload_too_large")


@pytest.mark.parametrize("chunked", [False, True])
def test_an_upload_over_the_limit_is_refused(datasets: Datasets, chunked: bool) -> None:
    body = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n' + bytes(MAX_UPLOAD_BYTES) + b"\r\n--x--\r\n"
    content = (body[start : start + 65536] for start in range(0, len(body), 65536)) if chunked else body
    answer = datasets.http.post(DATASETS, content=content, headers={"Content-Type": "multipart/form-data; boundary=x"})
    read_error(answer, 413, "payload_too_large")


def test_a_hundred_pictures_are_one_upload(datasets: Datasets) -> None:
    files = [(f"{number:03}.jpg", picture(number, 512, 512, "JPEG")) for number in range(100)]
    dataset = datasets.create(files, trigger_word="TOK")
    assert dataset["file_count"] == 100
    assert datasets.get(dataset["id"], resolution=512, steps=1000)["preflight"]["epochs"] == 10.0


def test_an_upload_that_is_broken_off_leaves_nothing(datasets: Datasets) -> None:
    address = (datasets.http.base_url.host, datasets.http.base_url.port)
    before = datasets.http.get(DATASETS, params={"limit": 100}).json()
    head = f"POST {DATASETS} HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=x\r\nContent-Length: 100000\r\n\r\n"
    with socket.create_connection(address) as connection:
        connection.sendall(head.encode() + b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\nabc')
    assert datasets.http.get(DATASETS, params={"limit": 100}).json() == before


def test_a_cursor_that_is_none_is_refused(datasets: Datasets) -> None:
    for place in (f"{10**400}:ds_1", "x:ds_1", ""):
        cursor = base64.urlsafe_b64encode(place.encode()).decode() or "#"
        read_error(datasets.http.get(DATASETS, params={"cursor": cursor}), 400, "bad_request")
