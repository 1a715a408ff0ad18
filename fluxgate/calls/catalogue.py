"""What can be asked about what there is to choose from: workflows, base models, LoRAs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fluxgate.asking import Ask, Steps, ask_for, drop, make, page_of, path_of
from fluxgate.wire import (
    BaseModelInfo,
    LoraInfo,
    Page,
    Workflow,
    drop_none,
    read_answer,
    reads,
)


def workflows() -> Steps[list[Workflow]]:
    """What can be asked for."""
    return (yield from page_of("workflows", Page[Workflow])).data


def get_workflow(name: str) -> Steps[Workflow]:
    """A workflow with the JSON Schema of its parameters."""
    return ask_for(Ask("GET", path_of("workflows", name)), reads(Workflow))


def put_workflow(name: str, graph: Mapping[str, Any], bindings: str, example: Mapping[str, Any]) -> Steps[dict[str, Any]]:
    """Put a workflow in place, or a new version of it; for admins. `graph` is an API-format export, `bindings` TOML."""
    body = {"graph": dict(graph), "bindings": bindings, "example": dict(example)}
    return ask_for(Ask("PUT", path_of("workflows", name), json=body), lambda answer: dict(read_answer(answer)))


def delete_workflow(name: str) -> Steps[None]:
    """Offer a workflow that was put in place to nobody any more."""
    return drop(path_of("workflows", name))


def models() -> Steps[list[BaseModelInfo]]:
    """Base models known to the deployment, where their files are, and where one is warm."""
    return (yield from page_of("models", Page[BaseModelInfo])).data


def loras() -> Steps[list[LoraInfo]]:
    """The LoRAs that can be used."""
    return (yield from page_of("loras", Page[LoraInfo])).data


def get_lora(name: str) -> Steps[LoraInfo]:
    """A LoRA by name, with its download and its before and after pictures once they are drawn."""
    return ask_for(Ask("GET", path_of("loras", name)), reads(LoraInfo))


def import_lora(
    name: str, *, upload: str | None = None, url: str | None = None, idempotency_key: str | None = None, **fields: Any
) -> Steps[LoraInfo]:
    """Take a LoRA file from an upload or a public URL. It is judged and converted by the worker: `settle_lora` waits for that.

    `fields`: trigger_word, base_model, sha256.
    """
    body = {**fields, "name": name, "upload": upload, "url": url}
    return make("/v1/loras", drop_none(body), reads(LoraInfo), idempotency_key)


SETTLE_PAUSE_S = 0.5


def settle_lora(name: str, *, give_up_s: float = 600.0) -> Steps[LoraInfo]:
    """The LoRA when its import has ended: `ready`, or `failed` with `error`. As it stands when `give_up_s` have passed."""
    spent_s = 0.0
    ask = Ask("GET", path_of("loras", name))
    while True:
        lora = yield from ask_for(ask, reads(LoraInfo))
        if lora.status != "importing" or spent_s >= give_up_s:
            return lora
        spent_s += SETTLE_PAUSE_S
        ask = replace(ask, after_s=SETTLE_PAUSE_S)


def share_lora(name: str, *, shared: bool) -> Steps[LoraInfo]:
    """Let every caller use one's own LoRA, or none but oneself again."""
    return ask_for(Ask("PATCH", path_of("loras", name), json={"shared": shared}), reads(LoraInfo))


def delete_lora(name: str) -> Steps[None]:
    """Take back a LoRA that was published here."""
    return drop(path_of("loras", name))
