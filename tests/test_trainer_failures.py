"""Recorded and published error texts, each in its class."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from trainer_worker.failures import LONGEST_MESSAGE, classify
from trainer_worker.process import ENDED, STALLED, STOPPED, TIMED_OUT
from trainer_worker.progress import Failed, Interrupted, Step, TrainerEvent

HUB_DOWN = (
    "OSError: We couldn't connect to 'https://huggingface.co' to load this model, couldn't find it in the cached files and it looks like "
    "/models/nowhere is not the path to a directory containing a scheduler_config.json file."
)
TEXTS = {
    "ValueError: Dataset configuration will produce zero usable batches.": "dataset",
    "FileNotFoundError: Caption file /jobs/data/01.txt not found.": "dataset",
    "Exception: No images were discovered by the bucket manager in the dataset: train-images.": "dataset",
    "PIL.UnidentifiedImageError: cannot identify image file '/jobs/data/3.png'": "dataset",
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.5 GiB": "out_of_memory",
    "RuntimeError: [enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory": "out_of_memory",
    "OSError: [Errno 12] Cannot allocate memory": "out_of_memory",
    "OSError: [Errno 28] No space left on device: '/jobs/output/checkpoint-5'": "disk_full",
    "OSError: [Errno 122] Disk quota exceeded": "disk_full",
    "RuntimeError: [enforce fail at inline_container.cc:664] . unexpected pos PytorchStreamWriter failed writing file data/3": "disk_full",
    "huggingface_hub.errors.GatedRepoError: 401 Client Error. Cannot access gated repo for url https://x": "model_access_denied",
    "OSError: You are trying to access a gated repo.\nMake sure to have access to it": "model_access_denied",
    "requests.exceptions.HTTPError: 403 Client Error: Forbidden for url: https://huggingface.co/x": "model_access_denied",
    "huggingface_hub.errors.RepositoryNotFoundError: 404 Client Error. (Request ID: Root=1)": "model_not_found",
    HUB_DOWN: "model_not_found",
    "FileNotFoundError: there is no such model folder: /models/nowhere": "model_not_found",
    "RuntimeError: CUDA error: device-side assert triggered": "crashed",
    "ModuleNotFoundError: SimpleTuner is not installed for /usr/bin/python": "crashed",
}


@pytest.mark.parametrize(("text", "code"), TEXTS.items())
def test_a_text_has_its_class_whether_reported_or_logged(text: str, code: str) -> None:
    reported = classify(1, [Failed(text)], "")
    logged = classify(1, [], f"some line\n{text}\nGoodbye")
    assert (reported.code, logged.code) == (code, code)
    assert reported.hint
    assert reported.message.startswith(text.split("\n")[0][:100])


@pytest.mark.parametrize(
    ("exit_code", "events", "reason", "code"),
    [
        (130, [], ENDED, "interrupted"),
        (0, [Interrupted()], ENDED, "interrupted"),
        (-9, [], STOPPED, "interrupted"),
        (-9, [], ENDED, "out_of_memory"),
        (-9, [Failed("CUDA out of memory")], STALLED, "stalled"),
        (130, [], TIMED_OUT, "timeout"),
        (-11, [], ENDED, "crashed"),
        (0, [Step(1, 2, 1.0, 1e-4, 1)], ENDED, "crashed"),
    ],
)
def test_what_was_done_to_it_outweighs_what_it_said(exit_code: int, events: Sequence[TrainerEvent], reason: str, code: str) -> None:
    assert classify(exit_code, events, "No space left on device" if code == "timeout" else "", reason).code == code


def test_a_report_outweighs_warnings_in_the_log() -> None:
    assert classify(1, [Failed("Caption file a.txt not found")], "warning: No space left on device").code == "dataset"


def test_the_traceback_tells_what_the_message_does_not() -> None:
    failure = classify(1, [Failed("repo", "huggingface_hub.errors.GatedRepoError: repo")], "")
    assert (failure.code, failure.message) == ("model_access_denied", "repo")


def test_a_message_is_found_and_kept_short() -> None:
    assert classify(1, [], "Traceback\nKeyError: 'x'\n[INFO] bye").message == "KeyError: 'x'"
    assert classify(-11, [], "").message == "the trainer was ended by SIGSEGV"
    assert classify(3, [], "").message == "the trainer ended with status 3"
    assert "wrote no weights" in classify(0, [], "").message
    assert len(classify(1, [Failed("word " * 1000)], "").message) == LONGEST_MESSAGE
