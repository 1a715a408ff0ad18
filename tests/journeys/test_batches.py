"""Many pictures under one id: accepted whole or not at all, made a window at a time, canceled in the middle, and nothing lost."""

from __future__ import annotations

import io
import json
import zipfile
from collections import Counter
from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import httpx
import pytest

from gateway.jobs.batch_records import PACKET
from tests.journeys.api import Api, fetch, open_picture, wait_until

Batch = dict[str, Any]
ENDED = {"succeeded", "failed", "canceled"}


def create(api: Api, headers: dict[str, str] | None = None, **body: Any) -> Batch:
    answer = api.http.post("/v1/batches", json=body, headers=headers)
    assert answer.status_code == 202, answer.text
    return dict(answer.json())


def get(api: Api, batch_id: str) -> Batch:
    answer = api.http.get(f"/v1/batches/{batch_id}")
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def wait(api: Api, batch_id: str) -> Batch:
    wait_until(lambda: get(api, batch_id)["status"] in ENDED, f"the end of {batch_id}")
    return get(api, batch_id)


def items(api: Api, batch_id: str, **query: Any) -> Iterator[dict[str, Any]]:
    """All pages."""
    cursor: str | None = None
    while True:
        answer = api.http.get(f"/v1/batches/{batch_id}/items", params={"limit": 100, **query, **({"cursor": cursor} if cursor else {})})
        assert answer.status_code == 200, answer.text
        page = answer.json()
        yield from page["data"]
        cursor = page["next_cursor"]
        if cursor is None:
            return


def refuse(api: Api, **body: Any) -> tuple[int, dict[str, Any]]:
    answer = api.http.post("/v1/batches", json=body)
    return answer.status_code, answer.json()["error"]


def color_of(item: dict[str, Any]) -> int:
    red, green, blue = open_picture(fetch(item["outputs"][0])).getpixel((0, 0))  # type: ignore[misc]
    return (red << 16) + (green << 8) + blue


def test_a_list_becomes_jobs_like_any_other(api: Api) -> None:
    given = [
        {"color": 0xFF0000, "metadata": {"mine": 1}},
        {"color": 0x00FF00},
        {"workflow": "slow", "steps": 1, "delay_ms": 1, "color": 255},
    ]
    batch = create(api, workflow="trivial", items=given, metadata={"name": "three"})
    assert batch["total"] == 3
    ended = wait(api, batch["id"])
    assert ended["status"] == "succeeded"
    assert ended["counts"]["succeeded"] == 3
    assert ended["metadata"] == {"name": "three"}
    found = list(items(api, batch["id"]))
    assert [item["index"] for item in found] == [0, 1, 2]
    assert [item["workflow"] for item in found] == ["trivial", "trivial", "slow"]
    assert [color_of(item) for item in found] == [0xFF0000, 0x00FF00, 255]
    job = api.get(found[0]["id"])
    assert (job["batch"], job["batch_index"], job["metadata"]) == (batch["id"], 0, {"mine": 1})
    listed = api.http.get("/v1/generations", params={"batch": batch["id"]}).json()["data"]
    assert {job["id"] for job in listed} == {item["id"] for item in found}
    assert batch["id"] in [one["id"] for one in api.http.get("/v1/batches").json()["data"]]


def test_a_sweep_makes_every_combination_and_shows_them_on_one_sheet(api: Api) -> None:
    sweep = {"color": {"from": 0x100000, "to": 0xF00000, "step": 0x200000}, "size": [32, 64]}
    batch = create(api, workflow="trivial", parameters={"num_images": 1}, sweep=sweep)
    assert batch["total"] == 16
    assert wait(api, batch["id"])["status"] == "succeeded"
    found = list(items(api, batch["id"]))
    assert [(item["parameters"]["color"], item["parameters"]["size"]) for item in found] == [
        (color, size) for color in range(0x100000, 0xF00001, 0x200000) for size in (32, 64)
    ]
    sheet = api.http.get(f"/v1/batches/{batch['id']}/contact-sheet").json()
    assert (sheet["first"], sheet["last"], sheet["pages"], sheet["complete"]) == (0, 15, 1, True)
    picture = open_picture(httpx.get(sheet["url"]).content)
    # Two columns, because the last parameter has two values; each cell shows the colour of its item.
    reds = {red for red, green, blue in set(zip(*[iter(picture.tobytes())] * 3, strict=True)) if max(green, blue) < 8}
    for item in found:
        assert any(abs(red - (item["parameters"]["color"] >> 16)) < 8 for red in reds), f"{item['parameters']} is not on the sheet"
    missing = api.http.get(f"/v1/batches/{batch['id']}/contact-sheet", params={"page": 2})
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "page_not_found")


def test_the_archive_holds_every_picture_and_a_table(api: Api) -> None:
    batch = create(api, workflow="trivial", items=[{"color": 1}, {"color": 2, "num_images": 2}, {"color": 3}])
    early = api.http.post(f"/v1/batches/{batch['id']}/archive")
    assert early.status_code in (202, 409), "before its end there is nothing to archive"
    wait(api, batch["id"])
    assert api.http.post(f"/v1/batches/{batch['id']}/archive").status_code == 202
    wait_until(lambda: get(api, batch["id"])["archive"]["status"] == "ready", "the archive")
    archive = get(api, batch["id"])["archive"]
    body = httpx.get(archive["url"]).content
    assert (archive["pictures"], archive["size_bytes"], archive["done"]) == (4, len(body), 3)
    with zipfile.ZipFile(io.BytesIO(body)) as whole:
        assert whole.testzip() is None
        assert whole.namelist() == ["00000.png", "00001-0.png", "00001-1.png", "00002.png", "items.jsonl"]
        rows = [json.loads(line) for line in whole.read("items.jsonl").splitlines()]
        found = list(items(api, batch["id"]))
        assert whole.read("00002.png") == fetch(found[2]["outputs"][0])
    assert [(row["index"], row["id"], row["files"]) for row in rows] == [
        (0, found[0]["id"], ["00000.png"]),
        (1, found[1]["id"], ["00001-0.png", "00001-1.png"]),
        (2, found[2]["id"], ["00002.png"]),
    ]


def test_a_thousand_are_canceled_in_the_middle_and_nothing_is_lost(api: Api) -> None:
    batch = create(api, workflow="trivial", cache="off", sweep={"color": {"from": 1, "to": 1000}})
    assert sum(batch["counts"].values()) == 1000
    wait_until(lambda: get(api, batch["id"])["counts"]["succeeded"] >= 200, "some of it")
    # A job of the same caller stands behind a window of the batch, not behind the batch; another caller's would stand behind one job of it.
    alone = api.run(workflow="trivial", color=0xABCDEF)
    assert get(api, batch["id"])["counts"]["queued"] > 100
    assert api.get(alone["id"])["status"] == "succeeded"
    answer = api.http.post(f"/v1/batches/{batch['id']}/cancel").json()
    assert answer["status"] in ("canceling", "canceled")
    ended = wait(api, batch["id"])
    assert ended["status"] == "canceled"
    assert ended["counts"]["succeeded"] + ended["counts"]["canceled"] == 1000, ended["counts"]
    assert ended["counts"]["canceled"] > 100
    found = list(items(api, batch["id"]))
    assert [item["index"] for item in found] == list(range(1000))
    assert len({item["id"] for item in found}) == 1000
    assert Counter(item["status"] for item in found) == {status: count for status, count in ended["counts"].items() if count}, (
        "items and counts agree"
    )
    made = [item for item in found if item["status"] == "succeeded"]
    assert all(len(item["outputs"]) == 1 for item in made)
    for item in made[::40]:
        assert color_of(item) == item["parameters"]["color"]
    # Canceling again changes nothing, and what never became a job is none.
    assert api.http.post(f"/v1/batches/{batch['id']}/cancel").json()["counts"] == ended["counts"]
    canceled = next(item for item in items(api, batch["id"], status="canceled") if item["index"] == 999)
    assert api.http.get(f"/v1/generations/{canceled['id']}").status_code == 404
    assert [item["id"] for item in items(api, batch["id"], status="succeeded", limit=37)] == [item["id"] for item in made]


def test_a_deleted_batch_takes_its_jobs_and_pictures_along(api: Api) -> None:
    batch = create(api, workflow="trivial", items=[{"color": 11}, {"color": 12}])
    wait(api, batch["id"])
    found = list(items(api, batch["id"]))
    sheet = api.http.get(f"/v1/batches/{batch['id']}/contact-sheet").json()["url"]
    assert httpx.get(sheet).status_code == 200
    assert api.http.delete(f"/v1/batches/{batch['id']}").json() == {"id": batch["id"], "object": "batch.deleted"}
    assert api.http.get(f"/v1/batches/{batch['id']}").status_code == 404
    wait_until(lambda: api.http.get(f"/v1/generations/{found[1]['id']}").status_code == 404, "the jobs' end")
    wait_until(lambda: httpx.get(sheet).status_code == 404, "the sheet's end")
    assert httpx.get(found[0]["outputs"][0]["url"]).status_code == 404


def test_the_same_key_makes_one_batch(api: Api) -> None:
    headers, body = {"Idempotency-Key": uuid4().hex}, {"workflow": "trivial", "items": [{"color": 21}]}
    first = api.http.post("/v1/batches", json=body, headers=headers)
    again = api.http.post("/v1/batches", json=body, headers=headers)
    assert again.json() == first.json()
    assert again.headers["Idempotency-Replayed"] == "true"
    other = api.http.post("/v1/batches", json={"workflow": "trivial", "items": [{"color": 22}]}, headers=headers)
    assert (other.status_code, other.json()["error"]["code"]) == (422, "idempotency_key_reuse")


def test_one_wrong_item_refuses_them_all_and_is_named(api: Api) -> None:
    before = [one["id"] for one in api.http.get("/v1/batches").json()["data"]]
    status, error = refuse(api, workflow="trivial", items=[{"color": 1}, {"color": -1}, {"colour": 2}])
    assert status == 422
    assert error["message"].startswith("items[1]: ")
    assert [(fault["item"], fault["code"]) for fault in error["details"]["items"]] == [(1, "invalid_parameter"), (2, "unknown_parameter")]
    assert (error["details"]["item"], error["details"]["parameter"]) == (1, "color")
    status, error = refuse(api, workflow="trivial", sweep={"color": [1, "red"]})
    assert status == 422
    assert error["message"].startswith("items[1] (color='red'): ")
    assert [one["id"] for one in api.http.get("/v1/batches").json()["data"]] == before, "nothing was accepted"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({}, "either `items` or `sweep`"),
        ({"items": [{}], "sweep": {"color": [1]}}, "either `items` or `sweep`"),
        ({"items": []}, "at least 1 item"),
        ({"sweep": {"color": []}}, "has no values"),
        ({"sweep": {"color": {"from": 1, "to": 200}, "size": {"from": 1, "to": 100}}}, "20000 items"),
        ({"sweep": {"color": {"from": 1, "to": 1e300}}}, "more than 10000 values"),
        ({"sweep": {"color": {"from": 5, "to": 1}}}, "`to` is less than `from`"),
        ({"sweep": {"color": {"from": 1, "to": 5, "step": 0}}}, "greater than 0"),
        ({"items": [{"color": 1, "metadata": {"x": "y" * 20_000}}]}, "metadata is"),
        ({"items": [{}] * 10_001}, "at most 10000"),
        ({"items": [{"color": 1}], "unheard_of": 1}, "not permitted"),
    ],
)
def test_a_batch_that_makes_no_sense_is_refused_with_the_reason(api: Api, body: dict[str, Any], said: str) -> None:
    status, error = refuse(api, workflow="trivial", **body)
    assert status == 422
    assert said in error["message"], error


def test_more_items_than_a_plain_body_may_hold(api: Api) -> None:
    """1.6 MB of requests: over the limit of every other body. Accepted, and canceled before much of it is made."""
    batch = create(api, workflow="trivial", items=[{"color": number, "metadata": {"note": "n" * 150}} for number in range(8000)])
    api.http.post(f"/v1/batches/{batch['id']}/cancel")
    ended = wait(api, batch["id"])
    assert sum(ended["counts"].values()) == ended["total"] == 8000


def walk(api: Api, batch_id: str, limit: int, **query: Any) -> list[int]:
    """Indices of all items, by pages of this size."""
    found: list[int] = []
    cursor: str | None = None
    while True:
        page = api.http.get(
            f"/v1/batches/{batch_id}/items", params={"limit": limit, **query, **({"cursor": cursor} if cursor else {})}
        ).json()
        assert len(page["data"]) <= limit
        found += [item["index"] for item in page["data"]]
        cursor = page["next_cursor"]
        if cursor is None:
            return found


def test_a_walk_over_the_items_meets_each_once_in_order(api: Api) -> None:
    count = 2 * PACKET + 3
    batch = create(api, workflow="trivial", items=[{"color": color} for color in range(count)])
    # While it runs, and when it has ended: its items stay where they are.
    for limit in (100, 77):
        assert walk(api, batch["id"], limit) == list(range(count))
    api.http.post(f"/v1/batches/{batch['id']}/cancel")
    wait(api, batch["id"])
    for limit in (100, 64, 41):
        parts = [walk(api, batch["id"], limit, status=status) for status in ("succeeded", "canceled", "failed")]
        assert sorted(index for part in parts for index in part) == list(range(count))
        assert all(part == sorted(part) for part in parts)
    path = f"/v1/batches/{batch['id']}/items"
    for place in (count, count + 1, 999_999):
        assert api.http.get(path, params={"cursor": str(place)}).json() == {"data": [], "next_cursor": None}
    for odd in ("-1", "1.0", "x", "1000000", "\u0661", " 1", "0x1"):
        answer = api.http.get(path, params={"cursor": odd})
        assert (answer.status_code, answer.json()["error"]["details"]) == (400, {"parameter": "cursor", "value": odd})


def test_a_walk_over_batches_meets_each_once_newest_first(api: Api) -> None:
    made = [create(api, workflow="trivial", items=[{"color": color}])["id"] for color in range(5)]
    found: list[str] = []
    cursor: str | None = None
    while not set(made) <= set(found):
        page = api.http.get("/v1/batches", params={"limit": 2, **({"cursor": cursor} if cursor else {})}).json()
        found += [batch["id"] for batch in page["data"]]
        cursor = page["next_cursor"]
        assert cursor or set(made) <= set(found)
    assert [batch for batch in found if batch in made] == made[::-1]
