"""What is refused before a training is queued, with a real Redis and a hub that is out of reach: machines, families, settings, access."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from comfy_workflows.catalog import PACKAGE_FOLDER, Catalog
from gateway.auth import LOCAL
from gateway.datasets.records import Asset, DatasetFile, DatasetHead
from gateway.datasets.store import Change, DatasetStore
from gateway.errors import FluxgateError
from gateway.jobs.model import Job
from gateway.jobs.trainings import TrainingStore
from gateway.moderation.verdicts import Moderation
from gateway.outside.hub import HubAccess
from gateway.redis_client import RedisClient, connect_redis
from gateway.settings import Settings
from gateway.trainings.machines import TrainerMachines
from gateway.trainings.presets import GB, Machine
from gateway.trainings.requests import TrainingRequest, Trainings
from local.child import pick_free_port

VIDEO_BASES = "".join(
    f"""
[{family}-base]
title = "{family}"
family = "{family}"
files = {{ unet = "{family}.safetensors" }}
size_bytes = 1
source = "nobody/{family}"
licence = "any"
steps = 20
guidance_scale = 5.0
"""
    for family in ("wan", "hunyuanvideo")
)
LARGE = Machine(
    gpu="present", gpu_name="A100", gpu_total_bytes=80 * GB, gpu_free_bytes=80 * GB, ram_total_bytes=200 * GB, disk_free_bytes=900 * GB
)
SMALL = LARGE.model_copy(update={"gpu_name": "T4", "gpu_total_bytes": 16 * GB, "gpu_free_bytes": 15 * GB})


@dataclass
class Desk:
    """Trainings of a deployment, and the data sets that they may be asked for."""

    redis: RedisClient
    redis_url: str
    catalog: Catalog
    settings: dict[str, Any] = field(default_factory=dict)

    async def admit(self, **asked: Any) -> Job:
        settings = Settings(redis_url=self.redis_url, trainer="simpletuner", default_base_model="flux1-dev", **self.settings)
        hub = HubAccess(f"http://127.0.0.1:{pick_free_port()}", None)
        datasets, machines = DatasetStore(self.redis), TrainerMachines(self.redis)
        trainings = Trainings(settings, self.catalog, TrainingStore(self.redis, ttl_s=60), datasets, machines, hub, Moderation(None))
        return await trainings.admit(TrainingRequest.model_validate({"name": "thing", "dataset": "ds_image", **asked}), LOCAL)

    async def refusal(self, **asked: Any) -> FluxgateError:
        with pytest.raises(FluxgateError) as refused:
            await self.admit(**asked)
        return refused.value

    async def report(self, *machines: Machine) -> None:
        for number, machine in enumerate(machines):
            await TrainerMachines(self.redis).publish(f"worker-{number}", machine)

    async def store(self, asset: Asset, **facts: Any) -> None:
        """A data set of nine files by the name of its asset."""
        store, name = DatasetStore(self.redis), f"ds_{asset}"
        await store.create(DatasetHead(id=name, caller=LOCAL.id, name="d", asset=asset, trigger_word="TOK", created_ms=1))
        shape = {"width": 1024, "height": 1024, "size_bytes": 1_000_000, "sha256": None, **facts}
        files = {f"{number}": DatasetFile(name=f"{number}", key=f"k{number}", **shape) for number in range(9)}
        await store.commit(name, Change(files, {}))


@pytest.fixture
async def desk(redis_url: str, tmp_path: Path) -> AsyncIterator[Desk]:
    (tmp_path / "base_models.toml").write_text(VIDEO_BASES)
    redis = connect_redis(redis_url)
    made = Desk(redis, redis_url, Catalog.load(PACKAGE_FOLDER, tmp_path))
    await made.store("image")
    await made.store("video", frames=60)
    yield made
    await redis.aclose(close_connection_pool=True)


async def test_a_machine_that_fits_is_enough(desk: Desk) -> None:
    await desk.report(SMALL, LARGE)
    job = await desk.admit(precision="bf16")
    assert job.status == "queued"
    assert str(job.spec.parameters["access"]).startswith("not known: "), "the hub is out of reach, and nothing is refused for that"
    assert job.spec.parameters["precision"] == "bf16"


async def test_what_fits_no_machine_is_refused_before_it_is_queued(desk: Desk) -> None:
    await desk.report(SMALL)
    refused = await desk.refusal(precision="int8")
    assert (refused.status, refused.code, refused.details["allowed"]) == (422, "insufficient_gpu_memory", ["int4", "nf4"])
    assert (await desk.admit()).spec.parameters["precision"] is None, "the worker chooses when it begins"
    await desk.report(SMALL.model_copy(update={"disk_free_bytes": GB}))
    assert (await desk.refusal()).code == "insufficient_disk"
    await desk.report(SMALL.model_copy(update={"ram_total_bytes": 12 * GB}))
    assert (await desk.refusal()).code == "insufficient_ram"
    await desk.report(Machine(gpu="absent"))
    assert (await desk.refusal()).code == "insufficient_gpu_memory"


async def test_while_no_worker_reports_nothing_is_refused(desk: Desk) -> None:
    assert (await desk.admit(precision="nf4")).status == "queued"


@pytest.mark.parametrize("family", ["wan", "hunyuanvideo"])
async def test_a_family_whose_loras_comfyui_ignores_is_refused_unless_wanted(desk: Desk, family: str) -> None:
    asked = {"base": f"{family}-base", "dataset": "ds_video"}
    assert (await desk.refusal(**asked)).code == "family_not_publishable"
    desk.settings["train_unpublishable"] = True
    assert (await desk.admit(**asked)).spec.parameters["family"] == family


@pytest.mark.parametrize(
    ("asked", "parameter"),
    [
        ({"base": "wan-base"}, "dataset"),
        ({"dataset": "ds_video"}, "dataset"),
        ({"base": "wan-base", "dataset": "ds_video", "precision": "nf4"}, "precision"),
        ({"base": "hunyuanvideo-base", "dataset": "ds_video", "video_frames": 48}, "video_frames"),
        ({"base": "wan-base", "dataset": "ds_video", "video_frames": 81}, "dataset"),
        ({"video_frames": 49}, "video_frames"),
        ({"lr_scheduler": "cosine"}, "warmup"),
        ({"lr_scheduler": "sine"}, "warmup"),
        ({"alpha": 8}, "alpha"),
        ({"dataset": "ds_none"}, "dataset"),
        ({"resume_from": "trn_none"}, "resume_from"),
    ],
)
async def test_what_does_not_go_together_is_refused_by_name(desk: Desk, asked: dict[str, Any], parameter: str) -> None:
    desk.settings["train_unpublishable"] = True
    refused = await desk.refusal(**asked)
    assert refused.status in (404, 422)
    assert refused.details["parameter"] == parameter


async def test_clips_shorter_than_what_is_taken_of_them_are_refused(desk: Desk) -> None:
    desk.settings["train_unpublishable"] = True
    refused = await desk.refusal(base="wan-base", dataset="ds_video", video_frames=81)
    assert refused.code == "dataset_not_ready"
    assert refused.hint == "Set video_frames to at most 60, or use longer clips."
