"""A captioning job: pictures without words get a caption each from a provider, which runs as a child in the trainer's interpreter."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gateway.datasets.intake import MAX_CAPTION_BYTES, clean_caption
from gateway.datasets.records import Dataset, DatasetFile
from gateway.errors import NotFound
from gateway.jobs.model import JobError, JobStatus, Progress
from gateway.settings import Settings
from trainer_worker.failures import Failure, classify
from trainer_worker.held import Held
from trainer_worker.launch import find_secrets, pass_environment
from trainer_worker.process import Limits, run_child
from trainer_worker.sink import WebhookSink

LAUNCHER = Path(__file__).parent / "captioners" / "launcher.py"
PROJECT_DIR = Path(__file__).parents[1]
DONE = 0


@dataclass(frozen=True)
class Said:
    """A caption for the picture with this file name in the job's folder."""

    picture: str
    caption: str


async def caption_dataset(held: Held) -> None:
    """Fill what has no words. Each caption is in the data set as soon as it is said: a cancel or a failure keeps the others."""
    asked = held.claim.job.spec.parameters
    await held.journal.start("prepare", "The pictures are fetched.")
    dataset = await held.datasets.load(str(asked["dataset"]))
    if dataset is None:
        raise NotFound("The data set was deleted before the captioning began.", code="dataset_not_found")
    folder = held.settings.training_dir.absolute() / held.claim.id
    try:
        await _caption(held, dataset, folder)
    finally:
        await asyncio.to_thread(shutil.rmtree, folder, True)


async def _caption(held: Held, dataset: Dataset, folder: Path) -> None:
    asked = held.claim.job.spec.parameters
    wanted = choose_files(dataset, overwrite=bool(asked["overwrite"]))
    names = await fetch(held, wanted, folder)
    if names:
        await held.turn.take(held.stop, held.journal.stage)
        failure = await _run(held, dataset, folder, names)
        await held.turn.give_back(held.journal.stage)
        if failure is not None:
            await _end_badly(held, failure)
            return
    await held.journal.finish(JobStatus.SUCCEEDED)


def choose_files(dataset: Dataset, *, overwrite: bool) -> list[DatasetFile]:
    return [file for file in dataset.files if file.key and (overwrite or not file.caption)]


async def fetch(held: Held, wanted: Sequence[DatasetFile], folder: Path) -> dict[str, str]:
    """The pictures in the job's folder, by names of ours -> the data set's."""
    await asyncio.to_thread(shutil.rmtree, folder, True)
    await asyncio.to_thread(folder.mkdir, parents=True)
    names: dict[str, str] = {}
    for number, file in enumerate(wanted):
        assert file.key is not None, "only files with an object are chosen"
        place = folder / f"{number:04d}.{file.key.rpartition('.')[2]}"
        await held.storage.get_file(file.key, place)
        names[place.name] = file.name
    return names


async def _run(held: Held, dataset: Dataset, folder: Path, names: Mapping[str, str]) -> Failure | None:
    """The child in a thread of its own, its captions written here in order. None when each picture has one."""
    loop = asyncio.get_running_loop()
    heard: asyncio.Queue[Said | None] = asyncio.Queue()
    writing = asyncio.create_task(_write_all(held, dataset, names, heard))
    try:
        failure = await asyncio.to_thread(
            run_provider, held, folder, sorted(names), lambda said: loop.call_soon_threadsafe(heard.put_nowait, said)
        )
    finally:
        loop.call_soon(heard.put_nowait, None)
        await writing
    held.require_lease()
    return failure


async def _write_all(held: Held, dataset: Dataset, names: Mapping[str, str], heard: asyncio.Queue[Said | None]) -> None:
    overwrite, done = bool(held.claim.job.spec.parameters["overwrite"]), 0
    while (said := await heard.get()) is not None:
        if said.picture in names:
            text = said.caption.encode()[:MAX_CAPTION_BYTES].decode(errors="ignore")
            caption = clean_caption(call_by_trigger(text, dataset.trigger_word), names[said.picture])
            await held.datasets.set_caption(dataset.id, names[said.picture], caption, overwrite=overwrite)
            done += 1
            await held.journal.show(
                Progress(
                    value=round(done / len(names), 4), current_node="captioning", step=done, steps=len(names), message=caption.text[:200]
                )
            )


def call_by_trigger(text: str, trigger_word: str | None) -> str:
    """The trigger word first, where the caption does not hold it: what the pictures share is to be called by it."""
    return text if not trigger_word or trigger_word in text.split() else f"{trigger_word}, {text}"


def run_provider(held: Held, folder: Path, pictures: Sequence[str], tell: Any) -> Failure | None:
    """Blocks until nothing of the provider runs any more."""
    settings, asked = held.settings, held.claim.job.spec.parameters
    with WebhookSink() as sink:
        config = folder / "captioning.json"
        content = {
            "entry_point": settings.caption_providers[str(asked["provider"])],
            "pictures": [str(folder / name) for name in pictures],
            "options": {"model": str(asked.get("model") or "")},
            "webhook_url": sink.url,
        }
        with open(os.open(config, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
            json.dump(content, file)
        said = set[str]()

        def hear(_lines: list[str]) -> bool:
            payloads = [payload for payload in sink.drain() if payload.get("type") == "caption"]
            for payload in payloads:
                said.add(str(payload.get("picture")))
                tell(Said(str(payload.get("picture")), str(payload.get("caption"))))
            return bool(payloads)

        env = pass_environment(os.environ, {"PYTHONPATH": os.pathsep.join((str(PROJECT_DIR), *settings.caption_path))})
        command = [str(settings.simpletuner_python or sys.executable), str(LAUNCHER), str(config)]
        secrets = (sink.secret, *find_secrets(env))
        end = run_child(
            command,
            env,
            folder / "captioning.log",
            cwd=folder,
            limits=limits_of(settings),
            should_stop=held.stop,
            hear=hear,
            secrets=secrets,
        )
    is_whole = end.exit_code == DONE and said >= set(pictures)
    return None if is_whole else classify(end.exit_code, [], end.log_tail, end.reason)


def limits_of(settings: Settings) -> Limits:
    return Limits(stall_s=settings.training_stall_s, total_s=settings.training_timeout_s)


async def _end_badly(held: Held, failure: Failure) -> None:
    if failure.code == "interrupted" and held.stop.is_set():
        await held.journal.finish(JobStatus.CANCELED)
    else:
        await held.journal.fail(JobError(code=failure.code, message=failure.message, hint=failure.hint))
