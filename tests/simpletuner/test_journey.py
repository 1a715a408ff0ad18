"""Train, then generate, with the real SimpleTuner from the request to the picture: success, failure, cancel and resume, a killed worker.
Each ends with the right status and leaves no process."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from local.services import S3Server
from local.tinyflux.weights import MODEL_DIR
from tests.journeys.studio import Studio, draw_png, running_studio
from tests.training_parts import find_processes, wait_for

# An epoch long enough for the steps of each test; SimpleTuner's epochs end a run that is longer.
REPEATS = 400
SHAPE = {"batch_size": 2, "repeats": REPEATS, "gradient_checkpointing": False, "checkpoint_every": 2}

# Of the small model's family, so that a machine without a GPU is no reason to refuse them.
OTHER_BASES = "".join(
    f"""
[{name}]
title = "{name}"
family = "tinyflux"
files = {{ unet = "tinyflux.safetensors", vae = "tinyflux_vae.safetensors" }}
size_bytes = 1
source = "built-in"
licence = "as this project"
steps = 20
guidance_scale = 3.5
"""
    for name in ("hollow", "lost")
)


@pytest.fixture(scope="module")
def studio(redis_server: str, s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Studio]:
    folder = tmp_path_factory.mktemp("studio")
    (folder / "no-model").mkdir()
    (folder / "workflows").mkdir()
    (folder / "workflows" / "base_models.toml").write_text(OTHER_BASES)
    paths = {"tinyflux": str(MODEL_DIR), "hollow": str(folder / "no-model"), "lost": str(folder / "nowhere")}
    changes = {
        "TRAINER": "simpletuner",
        "SIMPLETUNER_PYTHON": os.environ["SIMPLETUNER_PYTHON"],
        "BASE_MODEL_PATHS": json.dumps(paths),
        "WORKFLOWS_DIR": str(folder / "workflows"),
        # flux1-dev is asked for here only to be refused.
        "HF_ACCESS_CHECK": "false",
    }
    with running_studio(redis_server, s3_server, folder, SHARED_GPU="the-only-one", **changes) as running:
        yield running
        assert_nothing_runs(running.training_dir)


def assert_nothing_runs(folder: Path) -> None:
    wait_for(lambda: not find_processes(folder), "no process of a training is left")


def test_pictures_become_a_lora_that_changes_pictures(studio: Studio) -> None:
    job = studio.train(**SHAPE, steps=20, rank=8, sample_every=10)
    done = studio.wait(job["id"])
    assert (done["status"], done["lora"], done["attempts"]) == ("succeeded", "thing", 1), done
    assert studio.steps(job["id"]) == list(range(1, 21))
    events = studio.events(job["id"])
    assert [data["step"] for _, kind, data in events if kind == "checkpoint"][-1] == 20
    samples = [data for _, kind, data in events if kind == "sample"]
    assert [sample["step"] for sample in samples] == [10, 20]
    assert all(httpx.get(sample["url"]).content.startswith(b"\x89PNG") for sample in samples)
    lora = studio.wait_for_pictures("thing")
    assert (lora["format"], lora["rank"], lora["patched_layers"], lora["training"]) == ("diffusers", 8, 31, job["id"])
    assert httpx.get(lora["before"]).content != httpx.get(lora["after"]).content
    assert len({studio.generate(weight) for weight in (0.0, 0.5, 1.0)}) == 3
    assert_nothing_runs(studio.training_dir)


def test_a_folder_without_a_model_is_told_as_such(studio: Studio) -> None:
    hollow = studio.wait(studio.train(**SHAPE, name="baseless", base="hollow")["id"])
    assert (hollow["status"], hollow["error"]["code"]) == ("failed", "model_not_found"), hollow
    assert hollow["error"]["hint"]
    assert hollow["error"]["details"]["log_tail"]
    lost = studio.wait(studio.train(**SHAPE, name="baseless", base="lost")["id"])
    assert (lost["status"], lost["error"]["code"]) == ("failed", "model_not_found"), lost
    assert "nowhere" in lost["error"]["message"]
    assert_nothing_runs(studio.training_dir)


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="this machine may have what Flux takes")
def test_flux_without_a_gpu_is_refused_before_it_is_queued(studio: Studio) -> None:
    """The worker has asked torch in SimpleTuner's interpreter."""
    answer = studio.http.post("/v1/trainings", json={"name": "large", "dataset": studio.dataset, "base": "flux1-dev", "resolution": 512})
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "insufficient_gpu_memory"), answer.text


def test_a_caption_that_is_missing_is_named_at_once(studio: Studio) -> None:
    """What SimpleTuner itself does about one, test_simpletuner.py shows."""
    files = {"files": ("bare.png", draw_png(1), "image/png")}
    dataset = studio.http.post("/v1/datasets", data={"name": "bare"}, files=files).json()
    body = {"name": "bare", "dataset": dataset["id"], "resolution": 128}
    answer = studio.http.post("/v1/trainings", json=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "dataset_not_ready"), answer.text
    assert "bare.png" in answer.json()["error"]["message"]


def test_a_cancel_keeps_the_checkpoint_and_a_resume_goes_on_from_it(studio: Studio) -> None:
    job = studio.train(**SHAPE, name="stopped", steps=900, sample_prompts=[])
    studio.wait_for_step(job["id"], 5)
    studio.http.post(f"/v1/trainings/{job['id']}/cancel")
    assert studio.wait(job["id"])["status"] == "canceled"
    assert_nothing_runs(studio.training_dir)
    last = max(data["step"] for _, kind, data in studio.events(job["id"]) if kind == "checkpoint")
    resumed = studio.train(**SHAPE, name="stopped", steps=last + 3, sample_prompts=[], resume_from=job["id"])
    done = studio.wait(resumed["id"])
    assert (done["status"], done["lora"]) == ("succeeded", "stopped"), done
    assert studio.steps(resumed["id"]) == [last + 1, last + 2, last + 3]


def test_a_killed_worker_takes_the_trainer_along_and_the_next_goes_on(studio: Studio) -> None:
    job = studio.train(**SHAPE, name="survivor", steps=30, sample_prompts=[])
    studio.wait_for_step(job["id"], 5)
    studio.worker.kill()
    assert_nothing_runs(studio.training_dir)
    studio.worker.start()
    studio.worker.wait_ready()
    done = studio.wait(job["id"])
    assert (done["status"], done["lora"], done["attempts"]) == ("succeeded", "survivor", 2), done
    assert studio.steps(job["id"])[-1] == 30
