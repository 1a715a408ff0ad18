"""What can be asked about batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fluxgate.asking import Ask, Steps, ask_for, make, page_of, path_of
from fluxgate.wire import (
    Batch,
    BatchItem,
    Page,
    drop_none,
    reads,
)


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
    return make("/v1/batches", drop_none(body), reads(Batch), idempotency_key)


def get_batch(batch_id: str) -> Steps[Batch]:
    """How many of its items are how."""
    return ask_for(Ask("GET", path_of("batches", batch_id)), reads(Batch))


def batches(*, limit: int = 20, cursor: str | None = None) -> Steps[Page[Batch]]:
    """The caller's batches, newest first."""
    return page_of("batches", Page[Batch], limit, cursor)


def batch_items(batch_id: str, *, status: str | None = None) -> Steps[list[BatchItem]]:
    """Every item in order, with its status and pictures; asks for page after page."""
    found, cursor = list[BatchItem](), None
    while True:
        query = drop_none({"limit": 100, "status": status, "cursor": cursor})
        page = yield from ask_for(Ask("GET", path_of("batches", batch_id, "items"), query=query), reads(Page[BatchItem]))
        found, cursor = found + page.data, page.next_cursor
        if cursor is None:
            return found


def cancel_batch(batch_id: str) -> Steps[Batch]:
    """Stop all of it; what has ended stays as it is."""
    return ask_for(Ask("POST", path_of("batches", batch_id, "cancel")), reads(Batch))
