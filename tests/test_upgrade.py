"""Today's code on the state folders of earlier commits, as `tests/record_state.py` recorded them: nothing is lost, what waited runs."""

from __future__ import annotations

import hashlib
import json
import tarfile
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis

from gateway.state_version import STATE_VERSION
from tests.record_state import RECORDINGS
from tests.test_up import launch

PATIENCE_S = 60.0


class Upgraded:
    """A recording with today's deployment on it."""

    def __init__(self, http: httpx.Client, said: dict[str, Any], state_dir: Path) -> None:
        self.http, self.said, self.state_dir = http, said, state_dir

    def read(self, path: str) -> dict[str, Any]:
        answer: dict[str, Any] = self.http.get(path).raise_for_status().json()
        return answer

    def wait(self, job_id: str) -> dict[str, Any]:
        deadline = time.monotonic() + PATIENCE_S
        while (job := self.read(f"/v1/generations/{job_id}"))["status"] in ("queued", "running"):
            assert time.monotonic() < deadline, job
            time.sleep(0.1)
        return job


def check_jobs(upgraded: Upgraded) -> None:
    for before in upgraded.said["done"]:
        job = upgraded.read(f"/v1/generations/{before['id']}")
        same = ("status", "parameters", "seed", "loras", "created_at", "finished_at", "instance")
        assert {name: job[name] for name in same} == {name: before[name] for name in same}
        stored = upgraded.state_dir / "s3" / "fluxgate" / "generations" / job["id"] / "0.png"
        assert httpx.get(job["outputs"][0]["url"]).content == stored.read_bytes()
        assert upgraded.http.get(f"/v1/generations/{job['id']}/events").text.count("event: output") == 1


def check_lora(upgraded: Upgraded) -> None:
    before, lora = upgraded.said["lora"], upgraded.read("/v1/loras/old")
    same = ("file", "sha256", "family", "trigger_word", "rank", "training", "created_at")
    assert {name: lora[name] for name in same} == {name: before[name] for name in same}
    assert hashlib.sha256(httpx.get(lora["url"]).content).hexdigest() == lora["sha256"]
    training = upgraded.read(f"/v1/trainings/{lora['training']}")
    assert (training["status"], training["parameters"]["steps"], training["lora"]) == ("succeeded", 6, "old")
    again = {"prompt": "a TOK house", "width": 256, "height": 256, "steps": 2, "loras": [{"name": "old"}]}
    job = upgraded.http.post("/v1/generations", json=again).raise_for_status().json()
    assert upgraded.wait(job["id"])["status"] == "succeeded", "a LoRA from before works in a new job"


def check_what_was_left(upgraded: Upgraded) -> None:
    assert [job["status"] for job in upgraded.said["left"]] == ["running", *["queued"] * 5]
    for before in upgraded.said["left"]:
        job = upgraded.wait(before["id"])
        assert (job["status"], job["seed"]) == ("succeeded", before["seed"]), job
        assert httpx.get(job["outputs"][0]["url"]).content.startswith(b"\x89PNG")


def check_key_and_batch(upgraded: Upgraded, key: str) -> None:
    assert httpx.get(f"{upgraded.http.base_url}/v1/generations").status_code == 401
    assert [held["name"] for held in upgraded.read("/v1/keys")["data"]] == ["old"]
    before = upgraded.said["batch"]
    batch = upgraded.read(f"/v1/batches/{before['id']}")
    assert (batch["status"], batch["counts"]["succeeded"]) == ("succeeded", 2)


def check_what_was_brought(upgraded: Upgraded) -> None:
    before = upgraded.said["upload"]
    upload = upgraded.read(f"/v1/uploads/{before['id']}")
    assert {name: upload[name] for name in ("sha256", "size_bytes", "name")} == {
        name: before[name] for name in ("sha256", "size_bytes", "name")
    }
    assert hashlib.sha256(httpx.get(upload["content_url"]).content).hexdigest() == before["sha256"]
    version = upgraded.read("/v1/workflows/mine")["version"]
    assert version == upgraded.said["workflow"]["version"]
    for body in ({"workflow": "flux-img2img", "prompt": "a ring", "image": before["id"], "steps": 2}, {"workflow": "mine", "color": 255}):
        job = upgraded.http.post("/v1/generations", json=body).raise_for_status().json()
        assert upgraded.wait(job["id"])["status"] == "succeeded", body


@pytest.mark.parametrize("recording", sorted(RECORDINGS.glob("*.tar.xz")), ids=lambda path: path.name.partition(".")[0])
def test_an_upgrade_keeps_everything(recording: Path, tmp_path: Path) -> None:
    state_dir = tmp_path / "state"
    with tarfile.open(recording) as tar:
        tar.extractall(state_dir, filter="data")
    said = json.loads((state_dir / "recorded.json").read_text())
    headers = {"Authorization": f"Bearer {said['key']}"} if said["key"] else {}
    with launch(state_dir) as launcher, httpx.Client(base_url=launcher.url, headers=headers, timeout=30) as http:
        launcher.wait_ready()
        upgraded = Upgraded(http, said, state_dir)
        check_jobs(upgraded)
        check_what_was_left(upgraded)
        check_lora(upgraded)
        if said["key"]:
            check_key_and_batch(upgraded, said["key"])
        if "workflow" in said:
            check_what_was_brought(upgraded)
        port = (state_dir / "ports" / "redis_port").read_text()
        with redis.Redis(port=int(port)) as connection:
            assert connection.get("fluxgate:state_version") == str(STATE_VERSION).encode()
    assert (state_dir / "version").read_text() == f"{STATE_VERSION}\n"


def test_there_are_recordings_from_before_keys_with_keys_and_with_what_callers_bring() -> None:
    assert sorted(path.name for path in RECORDINGS.iterdir()) == sorted(f"{commit}.tar.xz" for commit in ("03929d1", "24e1b9b", "c6fe8ec"))
