"""One attempt at a training: what it needs is there, the data set is fetched, the trainer runs, the LoRA is published."""

from __future__ import annotations

import asyncio
import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from gateway.datasets.preflight import inspect
from gateway.datasets.records import DEFAULT_VIDEO_FRAMES, Dataset
from gateway.errors import Conflict, NotFound, Unprocessable
from gateway.jobs.model import Job, JobError, JobStatus
from gateway.settings import Settings
from gateway.trainings.presets import Machine, Preset, choose_preset, estimate_disk, require_disk
from trainer_worker.config import TrainingConfig
from trainer_worker.dataset import write_dataset
from trainer_worker.held import Held
from trainer_worker.machine import measure
from trainer_worker.plan import base_path_of, choose_trainer, find_base_fault, plan_training
from trainer_worker.process import Limits
from trainer_worker.progress import TrainerEvent
from trainer_worker.publish import describe_training, publish
from trainer_worker.train import Outcome, train
from trainer_worker.trainers import Trainer


async def train_lora(held: Held) -> None:
    """From the claim to a published LoRA. Raises FluxgateError, OSError and ValueError for what keeps it from starting."""
    job, settings = held.claim.job, held.settings
    await held.journal.start("prepare", "The data set is fetched.")
    dataset = await load_dataset(held)
    machine = await asyncio.to_thread(measure, settings)
    require_disk(estimate_needs(job, dataset), machine)
    folder = settings.training_dir.absolute() / str(job.spec.parameters["run"])
    with alone_in(folder):
        await train_in(held, folder, dataset, machine)


async def train_in(held: Held, folder: Path, dataset: Dataset, machine: Machine) -> None:
    job, settings = held.claim.job, held.settings
    await write_dataset(dataset, held.storage, folder / "data", str(job.spec.parameters.get("trigger_word") or "") or None)
    trainer = choose_trainer(settings)
    if fault := find_base_fault(base_path_of(job, settings)):
        raise NotFound(fault, code="model_not_found", hint="Check BASE_MODEL_PATHS on the trainer's machine.")
    await held.turn.take(held.stop, held.journal.stage)
    preset = await decide(held, machine, dataset)
    fresh = replace(plan_training(job, settings, folder, resume=False), precision=preset.precision)
    checkpoints = trainer.find_checkpoints(fresh)
    if job.spec.parameters.get("resume_from") or job.attempts > 1 or checkpoints:
        await held.journal.note(f"Goes on from step {checkpoints[0][0]}." if checkpoints else "Begins anew: there is no whole checkpoint.")
    outcome = await run_trainer(held, trainer, replace(fresh, resume=bool(checkpoints)))
    await held.turn.give_back(held.journal.stage)
    await conclude(held, outcome, folder, preset)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold a run's folder: a second training that goes on from the same one would write between this one's checkpoints."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            hint = "Wait for it, or cancel it first."
            raise Conflict("Another training goes on from the same run now.", code="run_in_use", hint=hint) from error
        yield


async def load_dataset(held: Held) -> Dataset:
    """As it is now: it may have changed since the training was accepted."""
    asked = held.claim.job.spec.parameters
    dataset = await held.datasets.load(str(asked["dataset"]))
    if dataset is None:
        raise NotFound("The data set was deleted before the training began.", code="dataset_not_found")
    report = inspect(
        dataset.files,
        resolution=int(asked["resolution"]),
        batch_size=int(asked["batch_size"]),
        repeats=int(asked["repeats"]),
        trigger_word=str(asked.get("trigger_word") or "") or dataset.trigger_word,
        caption_template=dataset.caption_template,
        video_frames=int(asked.get("video_frames") or DEFAULT_VIDEO_FRAMES),
        asset=dataset.asset,
    )
    if not report.ok:
        first = report.errors[0]
        message = f"The data set was changed after the training was accepted: {first.message}"
        raise Unprocessable(message, code="dataset_not_ready", hint=first.remedy, details={"files": list(first.files[:20])})
    return dataset


def estimate_needs(job: Job, dataset: Dataset) -> int:
    asked = job.spec.parameters
    return estimate_disk(
        str(asked["family"]),
        rank=int(asked["rank"]),
        resolution=int(asked["resolution"]),
        files=len(dataset.files),
        dataset_bytes=sum(file.size_bytes for file in dataset.files if file.key),
    )


async def decide(held: Held, machine: Machine, dataset: Dataset) -> Preset:
    """The precision for what is free now, with the GPU ours; told in the record before it runs."""
    job, settings = held.claim.job, held.settings
    now = machine
    if settings.shared_gpu and settings.trainer != "tiny":
        # The instances have let go of their models since.
        now = await asyncio.to_thread(measure, settings)
    asked = job.spec.parameters.get("precision")
    preset = choose_preset(str(job.spec.parameters["family"]), str(asked) if asked else None, now)
    preset = preset.model_copy(update={"needed_disk_bytes": estimate_needs(job, dataset)})
    await held.journal.plan(preset.model_dump(mode="json"), f"Trains in {preset.precision}: {preset.reason}.")
    return preset


async def run_trainer(held: Held, trainer: Trainer, config: TrainingConfig) -> Outcome:
    """The trainer blocks in a thread of its own; what it says comes back here in order."""
    loop = asyncio.get_running_loop()
    heard: asyncio.Queue[TrainerEvent | None] = asyncio.Queue()

    def tell(event: TrainerEvent) -> None:
        loop.call_soon_threadsafe(heard.put_nowait, event)

    telling = asyncio.create_task(held.journal.tell_all(heard))
    try:
        outcome = await asyncio.to_thread(train, trainer, config, tell, held.stop, limits_of(held.settings))
    finally:
        loop.call_soon(heard.put_nowait, None)
        await telling
    held.require_lease()
    return outcome


def limits_of(settings: Settings) -> Limits:
    return Limits(stall_s=settings.training_stall_s, total_s=settings.training_timeout_s)


async def conclude(held: Held, outcome: Outcome, folder: Path, preset: Preset) -> None:
    if outcome.status == "completed" and outcome.final is not None:
        await held.journal.stage("publish", "The LoRA is checked and stored.")
        lora = await publish(
            outcome.final,
            held.storage,
            held.loras,
            folder / "published",
            held.claim,
            name=str(held.claim.job.spec.parameters["name"]),
            origin=describe_training(held.claim.job, preset.precision),
        )
        if lora is None:
            await held.journal.finish(JobStatus.CANCELED)
            return
        await held.journal.wait_until_ready(lora, held.loras, held.registry)
        await held.journal.finish(JobStatus.SUCCEEDED, lora=lora.name)
    elif outcome.status == "interrupted" and held.stop.is_set():
        await held.journal.finish(JobStatus.CANCELED)
    else:
        failure = outcome.failure
        assert failure is not None, "an outcome that is not completed says why"
        details = {"log_tail": outcome.log_tail[-4000:]}
        await held.journal.fail(JobError(code=failure.code, message=failure.message, hint=failure.hint, details=details))
