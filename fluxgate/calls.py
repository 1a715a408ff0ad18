"""Everything that can be asked of a gateway, as steps: each yields the requests it needs and is sent their answers.
Pure: what carries the requests, blocking or not, stands in `client`, and what repeats them in `retries`."""

from __future__ import annotations

import hashlib
import json
import mimetypes
import secrets
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

import httpx

from fluxgate.errors import ApiError
from fluxgate.wire import (
    Answer,
    BaseModelInfo,
    Batch,
    BatchItem,
    Dataset,
    Job,
    Lora,
    LoraInfo,
    Output,
    Page,
    Training,
    Upload,
    Workflow,
    drop_none,
    make_request,
    read_answer,
    read_as,
    reads,
)

T = TypeVar("T")
# A file on disk, or a name and its bytes.
File = str | Path | tuple[str, bytes]
# Larger files go straight to S3.
LARGEST_THROUGH_GATEWAY = 8 << 20
SETTLE_PAUSE_S = 0.5


@dataclass(frozen=True)
class Ask:
    """One request. `path` is the gateway's own, or the URL of a foreign place to which no key goes.

    `is_repeatable`: sent twice it does no more than once. `after_s`: seconds to wait first.
    """

    method: str
    path: str
    query: Mapping[str, Any] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    json: Any = None
    data: Mapping[str, str] | None = None
    files: Sequence[tuple[str, tuple[str, bytes]]] | None = None
    content: bytes | None = None
    is_foreign: bool = False
    is_repeatable: bool = True
    after_s: float = 0.0
    timeout_s: float | None = None

    def options(self) -> dict[str, Any]:
        """As httpx takes it."""
        bodies = {"json": self.json, "data": self.data, "files": self.files, "content": self.content}
        # Even empty `params` would replace the query of a signed URL.
        return {"params": dict(self.query) or None, "headers": dict(self.headers), **drop_none(bodies)}


Steps = Generator[Ask, httpx.Response, T]


def _ask(ask: Ask, read: Callable[[httpx.Response], T]) -> Steps[T]:
    return read((yield ask))


def _make(path: str, body: Any, read: Callable[[httpx.Response], T], key: str | None) -> Steps[T]:
    """A POST that makes a job: its key lets it be sent again without making a second one."""
    return _ask(Ask("POST", path, json=body, headers={"Idempotency-Key": key or secrets.token_hex(16)}), read)


def _drop(path: str) -> Steps[None]:
    return _ask(Ask("DELETE", path), lambda answer: drop_answer(read_answer(answer)))


def drop_answer(_content: Any) -> None:
    """An answer that says no more than that it was done."""


def path_of(kind: str, name: str, *further: str) -> str:
    """`/v1/{kind}/{name}/...`. A name is one segment, whatever it holds: "../x" must stay an unknown one."""
    return "/".join(("/v1", kind, quote(name, safe=""), *further))


def kind_of(job_id: str) -> str:
    """Which resource a job's id belongs to."""
    return "generations" if job_id.startswith("gen_") else "trainings"


def _page(kind: str, page: type[Answer], limit: int | None = None, cursor: str | None = None, **filters: str | None) -> Steps[Answer]:
    return _ask(Ask("GET", f"/v1/{kind}", query=drop_none({**filters, "limit": limit, "cursor": cursor})), reads(page))


# -- generations -------------------------------------------------------------------------------------------------


def generate(
    prompt: str | None = None,
    *,
    workflow: str | None = None,
    loras: Sequence[Lora | str] = (),
    idempotency_key: str | None = None,
    **parameters: Any,
) -> Steps[Job]:
    """Queue a picture and return at once. `parameters` are the workflow's own; those that are None keep its defaults.

    Some workflows take no prompt. `idempotency_key` is drawn when absent; give one to be safe across your own restarts.
    """
    return _make(
        "/v1/generations", make_request(prompt, workflow=workflow, loras=loras, parameters=parameters), reads(Job), idempotency_key
    )


def get(job_id: str) -> Steps[Job]:
    """The job as it stands, its picture URLs signed anew."""
    return _ask(Ask("GET", path_of("generations", job_id)), reads(Job))


def jobs(*, status: str | None = None, limit: int = 20, cursor: str | None = None) -> Steps[Page[Job]]:
    """The caller's jobs, newest first."""
    return _page("generations", Page[Job], limit, cursor, status=status)


def preview(
    prompt: str | None = None, *, workflow: str | None = None, loras: Sequence[Lora | str] = (), **parameters: Any
) -> Steps[dict[str, Any]]:
    """What `generate` would do with the same arguments: the graph, cache hit or not, seconds, cost. Runs nothing."""
    body = make_request(prompt, workflow=workflow, loras=loras, parameters=parameters)
    return _ask(Ask("POST", "/v1/generations/preview", json=body), lambda answer: dict(read_answer(answer)))


def reproduce(job_id: str) -> Steps[Job]:
    """Run the graph of a job that succeeded once more."""
    return _ask(Ask("POST", path_of("generations", job_id, "reproduce"), is_repeatable=False), reads(Job))


def compare(job_id: str) -> Steps[dict[str, Any]]:
    """How the pictures of a reproduction differ from those of the job it reproduces."""
    return _ask(Ask("GET", path_of("generations", job_id, "comparison")), lambda answer: dict(read_answer(answer)))


def cancel(job_id: str) -> Steps[Job]:
    """Stop a job; one that has ended stays as it is. The answer says how it stands."""
    return _ask(Ask("POST", path_of("generations", job_id, "cancel")), reads(Job))


def delete(job_id: str) -> Steps[None]:
    """Forget a job that has ended: its record, its events and its pictures."""
    return _drop(path_of("generations", job_id))


def graph(job_id: str) -> Steps[dict[str, Any]]:
    """The exact graph that was submitted, to open in ComfyUI's editor."""
    return _ask(Ask("GET", path_of("generations", job_id, "workflow")), lambda answer: dict(read_answer(answer)))


def replay_webhook(job_id: str) -> Steps[None]:
    """Have the end of a generation or training told again to its webhook."""
    return _ask(Ask("POST", path_of(kind_of(job_id), job_id, "webhook", "replay")), lambda answer: drop_answer(read_answer(answer)))


def download(picture: Output | str) -> Steps[bytes]:
    """The bytes behind an output, or behind any signed URL."""
    url = picture if isinstance(picture, str) else picture.url
    return _ask(Ask("GET", url, is_foreign=True), _read_bytes)


def _read_bytes(answer: httpx.Response) -> bytes:
    if not answer.is_success:
        raise ApiError(
            answer.status_code,
            "output_unreadable",
            f"{answer.request.url.copy_with(query=None)} cannot be read: S3 answers {answer.status_code}",
            "Signed URLs live about an hour; read the job again for a new one.",
        )
    return answer.content


# -- batches -----------------------------------------------------------------------------------------------------


def create_batch(
    items: Sequence[Mapping[str, Any]] | None = None,
    *,
    sweep: Mapping[str, Any] | None = None,
    workflow: str | None = None,
    parameters: Mapping[str, Any] | None = None,
    idempotency_key: str | None = None,
    **options: Any,
) -> Steps[Batch]:
    """Queue many pictures under one id: a list of requests, or `parameters` with a `sweep` over some of them.

    A sweep's values are a list or `{"from": 1, "to": 100, "step": 1}`. `options` are metadata, priority, cache, webhook, timeout_s.
    """
    body = {**options, "items": items, "sweep": sweep, "workflow": workflow, "parameters": parameters}
    return _make("/v1/batches", drop_none(body), reads(Batch), idempotency_key)


def get_batch(batch_id: str) -> Steps[Batch]:
    """How many of its items are how."""
    return _ask(Ask("GET", path_of("batches", batch_id)), reads(Batch))


def batches(*, limit: int = 20, cursor: str | None = None) -> Steps[Page[Batch]]:
    """The caller's batches, newest first."""
    return _page("batches", Page[Batch], limit, cursor)


def batch_items(batch_id: str, *, status: str | None = None) -> Steps[list[BatchItem]]:
    """Every item in order, with its status and pictures; asks for page after page."""
    found, cursor = list[BatchItem](), None
    while True:
        query = drop_none({"limit": 100, "status": status, "cursor": cursor})
        page = yield from _ask(Ask("GET", path_of("batches", batch_id, "items"), query=query), reads(Page[BatchItem]))
        found, cursor = found + page.data, page.next_cursor
        if cursor is None:
            return found


def cancel_batch(batch_id: str) -> Steps[Batch]:
    """Stop all of it; what has ended stays as it is."""
    return _ask(Ask("POST", path_of("batches", batch_id, "cancel")), reads(Batch))


# -- uploads -----------------------------------------------------------------------------------------------------


def _open(file: File) -> tuple[str, bytes]:
    if isinstance(file, tuple):
        return file
    path = Path(file)
    return path.name, path.read_bytes()


def upload(file: File) -> Steps[Upload]:
    """Send a file and get an id for it. A large one goes straight to S3; what is wrong with that is said when it is first used."""
    name, body = _open(file)
    if len(body) <= LARGEST_THROUGH_GATEWAY:
        # Sent twice it is stored once.
        return (yield from _ask(Ask("POST", "/v1/uploads", files=[("file", (name, body))]), reads(Upload)))
    kind = mimetypes.guess_type(name)[0] or "application/octet-stream"
    promise = {"content_type": kind, "size_bytes": len(body), "sha256": hashlib.sha256(body).hexdigest(), "name": name}
    told = read_answer((yield Ask("POST", "/v1/uploads", json=promise)))
    _read_bytes((yield Ask(told["method"], told["url"], headers=told["headers"], content=body, is_foreign=True)))
    return read_as(Upload, told)


def uploads(*, limit: int = 20, cursor: str | None = None) -> Steps[Page[Upload]]:
    """The caller's uploads, newest first."""
    return _page("uploads", Page[Upload], limit, cursor)


def delete_upload(upload_id: str) -> Steps[None]:
    """Forget an upload; jobs that were made with it keep their own copy."""
    return _drop(path_of("uploads", upload_id))


# -- datasets and trainings --------------------------------------------------------------------------------------


def create_dataset(files: Sequence[File], *, captions: Mapping[str, str] | None = None, **fields: str) -> Steps[Dataset]:
    """Make a data set of pictures and captions (`.txt` beside them, or `captions` by file name), or of one zip.

    `fields`: name, trigger_word, caption_template, asset. Answers with what a training would make of it. It is not sent
    again where nobody knows whether it arrived: that might make two.
    """
    data = {**fields, **({"captions": json.dumps(dict(captions))} if captions else {})}
    parts = [("files", _open(file)) for file in files]
    return _ask(Ask("POST", "/v1/datasets", data=data, files=parts, is_repeatable=False), reads(Dataset))


def get_dataset(dataset_id: str) -> Steps[Dataset]:
    """A data set with its files and the report on it."""
    return _ask(Ask("GET", path_of("datasets", dataset_id)), reads(Dataset))


def datasets(*, limit: int = 20, cursor: str | None = None) -> Steps[Page[Dataset]]:
    """The caller's data sets, newest first, without their files."""
    return _page("datasets", Page[Dataset], limit, cursor)


def delete_dataset(dataset_id: str) -> Steps[None]:
    """Forget a data set and its pictures."""
    return _drop(path_of("datasets", dataset_id))


def train(name: str, dataset: str, *, idempotency_key: str | None = None, **settings: Any) -> Steps[Training]:
    """Train a LoRA of that name on a data set. `settings` are those of `POST /v1/trainings`; those that are None keep their defaults."""
    return _make("/v1/trainings", drop_none({**settings, "name": name, "dataset": dataset}), reads(Training), idempotency_key)


def caption(dataset_id: str, *, idempotency_key: str | None = None, **settings: Any) -> Steps[Training]:
    """Have captions written for the pictures that have none: a job like a training."""
    return _make(path_of("datasets", dataset_id, "captions"), drop_none(settings), reads(Training), idempotency_key)


def get_training(training_id: str) -> Steps[Training]:
    """The training as it stands."""
    return _ask(Ask("GET", path_of("trainings", training_id)), reads(Training))


def trainings(*, status: str | None = None, limit: int = 20, cursor: str | None = None) -> Steps[Page[Training]]:
    """The caller's trainings, newest first."""
    return _page("trainings", Page[Training], limit, cursor, status=status)


def cancel_training(training_id: str) -> Steps[Training]:
    """Stop it within seconds; its last checkpoint stays, to go on from."""
    return _ask(Ask("POST", path_of("trainings", training_id, "cancel")), reads(Training))


def resume_training(training_id: str, *, idempotency_key: str | None = None) -> Steps[Training]:
    """Go on from the newest checkpoint of a training that has ended, as a new one."""
    return _make(path_of("trainings", training_id, "resume"), None, reads(Training), idempotency_key)


def delete_training(training_id: str) -> Steps[None]:
    """Forget a training that has ended. The LoRA it published stays."""
    return _drop(path_of("trainings", training_id))


# -- catalogue ---------------------------------------------------------------------------------------------------


def workflows() -> Steps[list[Workflow]]:
    """What can be asked for."""
    return (yield from _page("workflows", Page[Workflow])).data


def get_workflow(name: str) -> Steps[Workflow]:
    """A workflow with the JSON Schema of its parameters."""
    return _ask(Ask("GET", path_of("workflows", name)), reads(Workflow))


def models() -> Steps[list[BaseModelInfo]]:
    """Base models known to the deployment, where their files are, and where one is warm."""
    return (yield from _page("models", Page[BaseModelInfo])).data


def loras() -> Steps[list[LoraInfo]]:
    """The LoRAs that can be used."""
    return (yield from _page("loras", Page[LoraInfo])).data


def get_lora(name: str) -> Steps[LoraInfo]:
    """A LoRA by name, with its download and its before and after pictures once they are drawn."""
    return _ask(Ask("GET", path_of("loras", name)), reads(LoraInfo))


def import_lora(
    name: str, *, upload: str | None = None, url: str | None = None, idempotency_key: str | None = None, **fields: Any
) -> Steps[LoraInfo]:
    """Take a LoRA file from an upload or a public URL. It is judged and converted by the worker: `settle_lora` waits for that.

    `fields`: trigger_word, base_model, sha256.
    """
    body = {**fields, "name": name, "upload": upload, "url": url}
    return _make("/v1/loras", drop_none(body), reads(LoraInfo), idempotency_key)


def settle_lora(name: str, *, give_up_s: float = 600.0) -> Steps[LoraInfo]:
    """The LoRA when its import has ended: `ready`, or `failed` with `error`. As it stands when `give_up_s` have passed."""
    spent_s = 0.0
    ask = Ask("GET", path_of("loras", name))
    while True:
        lora = yield from _ask(ask, reads(LoraInfo))
        if lora.status != "importing" or spent_s >= give_up_s:
            return lora
        spent_s += SETTLE_PAUSE_S
        ask = replace(ask, after_s=SETTLE_PAUSE_S)


def share_lora(name: str, *, shared: bool) -> Steps[LoraInfo]:
    """Let every caller use one's own LoRA, or none but oneself again."""
    return _ask(Ask("PATCH", path_of("loras", name), json={"shared": shared}), reads(LoraInfo))


def delete_lora(name: str) -> Steps[None]:
    """Take back a LoRA that was published here."""
    return _drop(path_of("loras", name))
