"""Around trainings, on one deployment: captions from a provider, pages of trainings, a data set that changes meanwhile."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from local.services import S3Server
from tests.journeys.studio import Studio, draw_png, running_studio
from tests.webhook_receiver import Receiver

PROVIDERS = """
import time

def slow(pictures, options):
    for number, path in enumerate(pictures):
        if number:
            time.sleep(600)
        yield f"picture {number}"

def gated(pictures, options):
    raise OSError("Access to model x/y is restricted: it is a gated repo.")
    yield
"""


@pytest.fixture(scope="module")
def studio(redis_server: str, s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Studio]:
    folder = tmp_path_factory.mktemp("studio")
    (folder / "providers").mkdir()
    (folder / "providers" / "their_captioners.py").write_text(PROVIDERS)
    named = {"colours": "trainer_worker.captioners.colours:describe", "slow": "their_captioners:slow", "gated": "their_captioners:gated"}
    changes = {
        "CAPTION_PROVIDERS": json.dumps(named),
        "CAPTION_PATH": json.dumps([str(folder / "providers")]),
        "CAPTION_PROVIDER": "colours",
    }
    with running_studio(redis_server, s3_server, folder, TRAINER="tiny", **changes) as running:
        yield running


def upload(studio: Studio, count: int, own: dict[str, str], **fields: str) -> dict[str, Any]:
    """A data set of TOK on `count` grounds, captioned where `own` says so."""
    files = [("files", (f"{number}.png", draw_png(number), "image/png")) for number in range(count)]
    answer = studio.http.post("/v1/datasets", data={"captions": json.dumps(own), **fields}, files=files)
    assert answer.status_code == 201, answer.text
    return dict(answer.json())


def read_captions(studio: Studio, dataset_id: str) -> dict[str, str | None]:
    return {file["name"]: file["caption"] for file in studio.http.get(f"/v1/datasets/{dataset_id}").json()["files"]}


def test_missing_captions_are_written_and_the_report_is_content(studio: Studio) -> None:
    dataset = upload(studio, 3, {"1.png": "a thing I know"})
    assert [problem["code"] for problem in dataset["preflight"]["errors"]] == ["caption_missing"]
    job = studio.http.post(f"/v1/datasets/{dataset['id']}/captions").json()
    assert (job["object"], job["parameters"]["provider"], job["parameters"]["pictures"]) == ("captioning", "colours", 2)
    done = studio.wait(job["id"])
    assert (done["status"], done["progress"]["step"], done["progress"]["steps"]) == ("succeeded", 2, 2), done
    captions = read_captions(studio, dataset["id"])
    assert captions["1.png"] == "a thing I know"
    assert all(str(captions[name]).endswith("background") for name in ("0.png", "2.png"))
    told = [data["message"] for _, kind, data in studio.events(job["id"]) if kind == "progress" and data["step"]]
    assert told == [captions["0.png"], captions["2.png"]]
    assert studio.http.get(f"/v1/datasets/{dataset['id']}").json()["preflight"]["errors"] == []
    again = studio.http.post(f"/v1/datasets/{dataset['id']}/captions")
    assert (again.status_code, again.json()["error"]["code"]) == (409, "nothing_to_caption")
    asked = {"overwrite": True}
    replaced = studio.http.post(f"/v1/datasets/{dataset['id']}/captions", json=asked, headers={"Idempotency-Key": "once"}).json()
    assert replaced["parameters"]["overwrite"] is True
    twin = studio.http.post(f"/v1/datasets/{dataset['id']}/captions", json=asked, headers={"Idempotency-Key": "once"}).json()
    assert twin["id"] == replaced["id"]
    assert studio.wait(replaced["id"])["status"] == "succeeded"
    assert read_captions(studio, dataset["id"])["1.png"] != "a thing I know"
    resume = studio.http.post(f"/v1/trainings/{job['id']}/resume")
    assert (resume.status_code, resume.json()["error"]["code"]) == (409, "not_resumable")
    assert not list(studio.training_dir.glob("cap_*"))


def test_a_cancel_keeps_what_was_said(studio: Studio) -> None:
    dataset = upload(studio, 3, {}, trigger_word="TOK")
    job = studio.http.post(f"/v1/datasets/{dataset['id']}/captions", json={"provider": "slow"}).json()
    studio.wait_for_step(job["id"], 1)
    studio.http.post(f"/v1/trainings/{job['id']}/cancel")
    assert studio.wait(job["id"])["status"] == "canceled"
    assert read_captions(studio, dataset["id"]) == {"0.png": "TOK, picture 0", "1.png": None, "2.png": None}


def test_a_provider_that_fails_says_why(studio: Studio) -> None:
    dataset = upload(studio, 1, {})
    job = studio.wait(studio.http.post(f"/v1/datasets/{dataset['id']}/captions", json={"provider": "gated"}).json()["id"])
    assert (job["status"], job["error"]["code"]) == ("failed", "model_access_denied"), job


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [({"provider": "nobody"}, 422, "'nobody'"), ({"model": "../../etc"}, 422, "model"), ({"others": 1}, 422, "others")],
)
def test_what_no_provider_takes_is_refused(studio: Studio, body: dict[str, Any], status: int, words: str) -> None:
    answer = studio.http.post(f"/v1/datasets/{studio.dataset}/captions", json=body)
    assert answer.status_code == status
    assert words in answer.text
    assert studio.http.post("/v1/datasets/ds_none/captions").status_code == 404


def test_a_data_set_that_was_spoilt_meanwhile_fails_as_such(studio: Studio, receiver: Receiver) -> None:
    """Accepted while it was whole; what came later has no caption, and nothing to make one from."""
    first = studio.train(name="first", steps=3000)
    dataset = upload(studio, 2, {"0.png": "one", "1.png": "two"})
    second = studio.train(name="second", dataset=dataset["id"], trigger_word="", batch_size=1, webhook=receiver.url())
    studio.http.put(f"/v1/datasets/{dataset['id']}/files", files={"files": ("2.png", draw_png(2), "image/png")})
    studio.http.post(f"/v1/trainings/{first['id']}/cancel")
    job = studio.wait(second["id"])
    assert (job["status"], job["error"]["code"]) == ("failed", "dataset_not_ready"), job
    assert "2.png" in job["error"]["message"]
    assert studio.told(receiver, job["id"]) == ("training", job["id"], "failed")


def test_trainings_come_in_pages_and_by_what_is_asked(studio: Studio) -> None:
    ids = [studio.train(name="paged" if number % 2 else "other", seed=number)["id"] for number in range(4)]
    for job_id in ids:
        studio.http.post(f"/v1/trainings/{job_id}/cancel")
    for job_id in ids:
        assert studio.wait(job_id)["status"] == "canceled"

    def list_ids(**query: object) -> tuple[list[str], str | None]:
        answer = studio.http.get("/v1/trainings", params={name: str(value) for name, value in query.items()})
        assert answer.status_code == 200, answer.text
        return [job["id"] for job in answer.json()["data"]], answer.json()["next_cursor"]

    newest, cursor = list_ids(limit=3)
    assert newest == ids[:0:-1]
    following, _ = list_ids(limit=1, cursor=cursor)
    assert following == ids[:1]
    assert list_ids(lora="paged")[0] == [ids[3], ids[1]]
    assert list_ids(status="succeeded", dataset=studio.dataset)[0] == []
    assert set(ids) <= set(list_ids(status="canceled", base="tinyflux")[0])
    everything = list_ids(limit=100)[0]
    captionings = list_ids(limit=100, object="captioning")[0]
    assert captionings
    assert not set(everything) & set(captionings)
    assert all(job_id.startswith("trn_") for job_id in everything)
    made = studio.read(ids[1])["created_at"]
    assert list_ids(created_after=made)[0] == [ids[3], ids[2]]
    assert studio.http.get("/v1/trainings", params={"cursor": "nonsense"}).status_code == 400
    assert studio.http.get("/v1/trainings", params={"created_after": "yesterday"}).status_code == 400
