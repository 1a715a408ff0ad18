"""What can be asked about data sets, and about trainings on them."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from fluxgate.asking import Ask, File, Steps, ask_for, drop, make, open_file, page_of, path_of
from fluxgate.wire import (
    Dataset,
    Page,
    Training,
    drop_none,
    reads,
)


def create_dataset(
    files: Sequence[File], *, captions: Mapping[str, str] | None = None, idempotency_key: str | None = None, **fields: str
) -> Steps[Dataset]:
    """Make a data set of pictures and captions (`.txt` beside them, or `captions` by file name), or of one zip.

    `fields`: name, trigger_word, caption_template, asset. Answers with what a training would make of it.
    """
    data = {**fields, **({"captions": json.dumps(dict(captions))} if captions else {})}
    parts = [("files", open_file(file)) for file in files]
    headers = {"Idempotency-Key": idempotency_key or secrets.token_hex(16)}
    return ask_for(Ask("POST", "/v1/datasets", data=data, files=parts, headers=headers), reads(Dataset))


def get_dataset(dataset_id: str) -> Steps[Dataset]:
    """A data set with its files and the report on it."""
    return ask_for(Ask("GET", path_of("datasets", dataset_id)), reads(Dataset))


def datasets(*, limit: int = 20, cursor: str | None = None) -> Steps[Page[Dataset]]:
    """The caller's data sets, newest first, without their files."""
    return page_of("datasets", Page[Dataset], limit, cursor)


def delete_dataset(dataset_id: str) -> Steps[None]:
    """Forget a data set and its pictures."""
    return drop(path_of("datasets", dataset_id))


def train(name: str, dataset: str, *, idempotency_key: str | None = None, **settings: Any) -> Steps[Training]:
    """Train a LoRA of that name on a data set. `settings` are those of `POST /v1/trainings`; those that are None keep their defaults."""
    return make("/v1/trainings", drop_none({**settings, "name": name, "dataset": dataset}), reads(Training), idempotency_key)


def caption(dataset_id: str, *, idempotency_key: str | None = None, **settings: Any) -> Steps[Training]:
    """Have captions written for the pictures that have none: a job like a training."""
    return make(path_of("datasets", dataset_id, "captions"), drop_none(settings), reads(Training), idempotency_key)


def get_training(training_id: str) -> Steps[Training]:
    """The training as it stands."""
    return ask_for(Ask("GET", path_of("trainings", training_id)), reads(Training))


def trainings(*, status: str | None = None, limit: int = 20, cursor: str | None = None) -> Steps[Page[Training]]:
    """The caller's trainings, newest first."""
    return page_of("trainings", Page[Training], limit, cursor, status=status)


def cancel_training(training_id: str) -> Steps[Training]:
    """Stop it within seconds; its last checkpoint stays, to go on from."""
    return ask_for(Ask("POST", path_of("trainings", training_id, "cancel")), reads(Training))


def resume_training(training_id: str, *, idempotency_key: str | None = None) -> Steps[Training]:
    """Go on from the newest checkpoint of a training that has ended, as a new one."""
    return make(path_of("trainings", training_id, "resume"), None, reads(Training), idempotency_key)


def delete_training(training_id: str) -> Steps[None]:
    """Forget a training that has ended. The LoRA it published stays."""
    return drop(path_of("trainings", training_id))
