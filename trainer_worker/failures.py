"""Why a training failed, in a class that a person can act on. The texts are those that SimpleTuner, torch and Hugging Face print."""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass

from trainer_worker.process import STALLED, STOPPED, TIMED_OUT
from trainer_worker.progress import Failed, Interrupted, TrainerEvent

INTERRUPTED_EXIT = 130
LONGEST_MESSAGE = 500  # characters


@dataclass(frozen=True)
class Failure:
    code: str
    message: str
    hint: str


@dataclass(frozen=True)
class Cause:
    """A class of failures, the words that show it, and what helps. The first that fits wins."""

    code: str
    words: re.Pattern[str]
    hint: str


def cause(code: str, words: str, hint: str) -> Cause:
    return Cause(code, re.compile(words, re.IGNORECASE), hint)


CAUSES = (
    cause(
        "caption_provider",
        r"The caption provider .{1,300} cannot be imported|shorter than argument|longer than argument",
        "CAPTION_PROVIDERS names a module:function that the trainer's interpreter can import and that yields a caption for each picture.",
    ),
    cause(
        "disk_full",
        r"No space left on device|Errno 28\b|Disk quota exceeded|Errno 122\b|PytorchStreamWriter failed writing",
        "Free disk space on the trainer's machine; checkpoints and caches of a Flux LoRA take some gigabytes.",
    ),
    cause(
        "out_of_memory",
        r"CUDA out of memory|OutOfMemoryError|CUBLAS_STATUS_ALLOC_FAILED|CUDNN_STATUS_ALLOC_FAILED|CUDA error: out of memory"
        r"|can't allocate memory|Cannot allocate memory|^\s*MemoryError|DefaultCPUAllocator",
        "Lower precision (int8, int4, nf4), batch_size or resolution, or turn gradient_checkpointing on.",
    ),
    cause(
        "model_access_denied",
        r"GatedRepoError|gated repo|Access to model .{1,200} is restricted|awaiting a review|401 Client Error|403 Client Error"
        r"|Invalid user token|Invalid username or password",
        "Accept the model's licence on its Hugging Face page, and give the trainer a token of that account (HF_TOKEN).",
    ),
    cause(
        "dataset",
        r"zero usable batches|Caption file .{0,400}not found|No images were discovered by the bucket manager"
        r"|must produce at least one usable|UnidentifiedImageError|cannot identify image file|image file is truncated"
        r"|DecompressionBomb|No (?:training )?(?:pictures|images|files) (?:were )?found",
        "Each picture needs a caption file of its name, and there must be at least batch_size pictures of every shape; "
        "add pictures, raise repeats or lower batch_size.",
    ),
    cause(
        "model_not_found",
        r"RepositoryNotFoundError|EntryNotFoundError|RevisionNotFoundError|LocalEntryNotFoundError|404 Client Error|Repository Not Found"
        r"|is not a local folder and is not a valid model identifier|does not appear to have a file named"
        r"|Error no file named|Repo id must|Cannot find the requested files|outgoing traffic has been disabled|Incorrect path_or_model_id"
        r"|couldn't connect to 'https?://huggingface\.co|We couldn't connect to|no such model folder",
        "Check the base model's folder or repository name; a model that is not on the machine needs network access to Hugging Face.",
    ),
)
HINTS = {
    "interrupted": "The last checkpoint is kept; resume continues from it.",
    "timeout": "Ask for fewer steps, or allow more time; the last checkpoint is kept and resume continues from it.",
    "stalled": "It neither wrote to its log nor reported for too long. The last checkpoint is kept and resume continues from it.",
    "crashed": "The end of its log may say more.",
}
EXCEPTION_LINE = re.compile(r"^(?:[A-Za-z_][\w.]*\.)?[A-Z]\w*(?:Error|Exception|Interrupt|NotFound): .+")


def classify(exit_code: int, events: Sequence[TrainerEvent], log_tail: str, reason: str = "") -> Failure:
    """`reason` is that of the process's end: what we did to it outweighs what it said while it died."""
    failed = next((event for event in reversed(events) if isinstance(event, Failed)), None)
    if reason == TIMED_OUT:
        return Failure("timeout", "the training took longer than it is allowed to", HINTS["timeout"])
    if reason == STALLED:
        return Failure("stalled", "the trainer fell silent", HINTS["stalled"])
    if reason == STOPPED or exit_code == INTERRUPTED_EXIT or any(isinstance(event, Interrupted) for event in events):
        return Failure("interrupted", "the training was stopped", HINTS["interrupted"])
    told = f"{failed.message}\n{failed.traceback}" if failed else ""
    message = shorten(failed.message if failed else find_last_error(log_tail) or describe_exit(exit_code))
    # What the trainer reported comes first: its log may hold warnings with words of another class.
    for text in (told, log_tail):
        for known in CAUSES:
            if known.words.search(text):
                return Failure(known.code, message, known.hint)
    if exit_code == -signal.SIGKILL:
        hint = "The system kills a process like this when its memory (RAM, not the GPU's) is used up: quantising Flux takes about 50 GB."
        return Failure("out_of_memory", message, hint)
    return Failure("crashed", message, HINTS["crashed"])


def find_last_error(log_tail: str) -> str | None:
    return next((line.strip() for line in reversed(log_tail.splitlines()) if EXCEPTION_LINE.match(line.strip())), None)


def describe_exit(exit_code: int) -> str:
    if exit_code < 0:
        return f"the trainer was ended by {signal.Signals(-exit_code).name}"
    return (
        f"the trainer ended with status {exit_code} and wrote no weights"
        if exit_code == 0
        else f"the trainer ended with status {exit_code}"
    )


def shorten(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= LONGEST_MESSAGE else line[: LONGEST_MESSAGE - 3] + "..."
