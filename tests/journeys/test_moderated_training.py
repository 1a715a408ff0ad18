"""Pictures that a training draws, and those of the LoRA that comes of it, before a judge that refuses them all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx

from local.services import S3Server
from tests.journeys.api import wait_until
from tests.journeys.studio import running_studio
from tests.moderator import running_moderator


def test_pictures_of_a_training_and_of_its_lora_are_judged_too(redis_server: str, s3_server: S3Server, tmp_path: Path) -> None:
    """A judge that refuses them all costs the training nothing but its pictures."""
    with running_moderator() as judge:
        judge.blind = True
        with running_studio(redis_server, s3_server, tmp_path, TRAINER="tiny", MODERATION=judge.url) as studio:
            job = studio.train(steps=3)
            done = studio.wait(job["id"])
            assert (done["status"], done["lora"]) == ("succeeded", "thing")
            asked = [case for case in judge.of("picture") if case["job"] == job["id"]]
            assert [case["texts"] for case in asked] == [["TOK on a green background"]] * len(asked)
            assert all(case["picture"]["bytes"].startswith(b"\x89PNG") for case in asked)
            events = studio.events(job["id"])
            notes = [data["message"] for _, kind, data in events if kind == "log" and "A sample was not stored" in data.get("message", "")]
            assert len(notes) == len(asked) > 0
            assert not [kind for _, kind, _ in events if kind == "sample"]
            assert not [path for path in s3_server.data_dir.rglob("*") if job["id"] in str(path) and "samples" in str(path)]
            drawn = wait_for_both(studio.http)
            assert [(one["status"], one["error"]["code"], one["outputs"]) for one in drawn] == [("failed", "moderated", [])] * 2
            shown = studio.http.get("/v1/loras/thing").json()
            assert (shown["before"], shown["after"]) == (None, None)


def wait_for_both(http: httpx.Client) -> list[dict[str, Any]]:
    """The jobs of the before and the after picture, once they have ended."""
    jobs: list[dict[str, Any]] = []

    def have_ended() -> bool:
        jobs[:] = [job for job in http.get("/v1/generations").json()["data"] if job["metadata"].get("lora") == "thing"]
        return [job["status"] in ("succeeded", "failed") for job in jobs] == [True, True]

    wait_until(have_ended, "both pictures' end")
    return jobs
