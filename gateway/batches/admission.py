"""Batches: everything about every item is checked and decided before any of it is accepted; then items become jobs a window at a time.

Any process may hand out items and none is special: the script that makes a job of an item knows whose turn it is. A window, and not the
whole batch, stands in line, so that neither the queue nor the caller's other jobs are buried under it.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Sequence
from typing import Any

from comfy_workflows.workflow import Workflow
from gateway.admission import Admission, Wish
from gateway.auth import Caller
from gateway.batches.request import BatchRequest, Entry
from gateway.errors import FluxgateError, NotFound, RedisUnavailable, TooManyRequests, Unprocessable
from gateway.instances import InstanceRegistry
from gateway.jobs.batch_records import PACKET, Batch, BatchSpec
from gateway.jobs.batches import BatchStore
from gateway.jobs.events import EventFeed
from gateway.jobs.model import TERMINAL, Webhook, new_job_id, now_ms
from gateway.jobs.records import IdempotencyKey, Item
from gateway.jobs.store import JobStore
from gateway.loras.registry import Lora
from gateway.redaction import hide_secrets

log = logging.getLogger(__name__)

# Jobs of one batch that are unfinished at once: enough to choose from, and twice what the instances hold.
SMALLEST_WINDOW = 64
IDLE_S = 1.0
# Ends that come close together are answered together.
PAUSE_S = 0.05
FEEDER_LEASE_MS = 2000
MOST_FAULTS = 10


class Batches:
    """Raises Unprocessable, NotFound, NoInstance, TooManyRequests; nothing is accepted when it does."""

    def __init__(self, store: BatchStore, jobs: JobStore, admission: Admission, registry: InstanceRegistry, feed: EventFeed) -> None:
        self._store, self._jobs, self._admission, self._registry = store, jobs, admission, registry
        self._name = uuid.uuid4().hex
        self._wake = asyncio.Event()
        self._packets: dict[str, tuple[int, list[Item]]] = {}  # the one at work of each batch
        self._webhooks: dict[str, str | None] = {}
        feed.observe(self._observe)

    # -- accepting ---------------------------------------------------------------------------------------------

    async def admit(self, request: BatchRequest, webhook: Webhook | None, caller: Caller, key: IdempotencyKey | None) -> Batch:
        """Check every item, then accept all of them. With a `key` seen before, the batch of the first request."""
        entries = list(request.entries())
        batch_id = new_job_id("batch")
        items = await _Preparation(self._admission, request, webhook, caller, batch_id).prepare(entries)
        workflows = {item.spec.workflow for item in items}
        spec = BatchSpec(
            id=batch_id,
            caller=caller.id,
            total=len(items),
            created_ms=now_ms(),
            workflow=workflows.pop() if len(workflows) == 1 else None,
            sweep=request.model_dump(mode="json", by_alias=True)["sweep"],
            metadata=request.metadata,
        )
        accepted = await self._store.create(spec, items, webhook.private_json() if webhook else "", key)
        self._wake.set()
        return await self.load(accepted, caller)

    async def load(self, batch_id: str, caller: Caller) -> Batch:
        """The caller's batch. Somebody else's is as absent as one that never was."""
        batch = await self._store.load(batch_id)
        if batch is None or batch.deleted or batch.spec.caller != caller.id:
            raise NotFound(f"There is no batch {batch_id!r}.", code="batch_not_found", details={"parameter": "id", "value": batch_id})
        return batch

    async def cancel(self, batch_id: str) -> None:
        """What is no job yet never becomes one; jobs that wait are gone at once, those that run are stopped."""
        for job_id in await self._store.cancel(batch_id):
            await self._jobs.cancel(job_id)

    # -- handing out -------------------------------------------------------------------------------------------

    def _observe(self, job_id: str, kind: str, status: str, data: bytes) -> None:
        if kind == "status" and status in TERMINAL:
            self._wake.set()

    async def watch(self) -> None:
        """For ever: keep the window of every batch full, and make sure that canceled ones end."""
        while True:
            try:
                unfinished = await self._store.unfinished()
                self._forget_others(unfinished)
                for batch_id in unfinished:
                    if await self._store.tend(batch_id, self._name, FEEDER_LEASE_MS):
                        await self._fill(batch_id)
            except RedisUnavailable as error:
                log.warning("batches wait for Redis", extra={"error": error.message})
            await asyncio.sleep(PAUSE_S)
            self._wake.clear()
            try:
                async with asyncio.timeout(IDLE_S):
                    await self._wake.wait()
            except TimeoutError:
                continue

    def _forget_others(self, unfinished: Sequence[str]) -> None:
        for batch_id in self._packets.keys() - set(unfinished):
            del self._packets[batch_id]
            self._webhooks.pop(batch_id, None)

    async def _fill(self, batch_id: str) -> None:
        place, total, live, canceled = await self._store.next_place(batch_id)
        if canceled:
            # Whoever was asked to cancel may have died half-way.
            for job_id in await self._store.live(batch_id):
                await self._jobs.cancel(job_id)
            return
        slots = sum(facts.slots for facts in await self._registry.recent() if facts.state == "up")
        for index in range(place, min(total, place + max(SMALLEST_WINDOW, 2 * slots) - live)):
            if not await self._hand_out(batch_id, index):
                return

    async def _hand_out(self, batch_id: str, index: int) -> bool:
        """Make a job of an item; False when it is not to be now, or not by us."""
        item = await self._item(batch_id, index)
        if item is None:
            return False
        try:
            _, admitted = await self._admission.enqueue(item)
        except TooManyRequests as error:
            log.info("batch waits for room in the queue", extra={"batch": batch_id, "error": error.message})
            return False
        return admitted.outcome != "stale"

    async def _item(self, batch_id: str, index: int) -> Item | None:
        number, place = divmod(index, PACKET)
        known = self._packets.get(batch_id)
        if known is None or known[0] != number:
            known = self._packets[batch_id] = (number, await self._store.packet(batch_id, number))
            self._webhooks[batch_id] = await self._store.webhook(batch_id)
        if place >= len(known[1]):
            return None
        item = known[1][place]
        # Its time in the queue begins now.
        changes: dict[str, Any] = {"created_ms": now_ms()}
        private = self._webhooks[batch_id]
        if item.spec.webhook is not None and private:
            changes["webhook"] = item.spec.webhook.with_private(private)
        return item._replace(spec=item.spec.model_copy(update=changes))


class _Preparation:
    """All items of one request, checked. What is the same for many is looked up once."""

    def __init__(self, admission: Admission, request: BatchRequest, webhook: Webhook | None, caller: Caller, batch_id: str) -> None:
        self._admission, self._request, self._caller = admission, request, caller
        self._webhook, self._batch_id = webhook, batch_id
        self._loras: dict[tuple[str, ...], list[Lora]] = {}
        # An admin may put another version in place meanwhile: all items are of one.
        self._workflows: dict[str | None, Workflow] = {}
        self._combos: set[tuple[str, str]] = set()
        self._runnable: set[object] = set()

    async def prepare(self, entries: Sequence[Entry]) -> list[Item]:
        """Raises the first fault with the item's index; `details.items` names up to ten."""
        self._combos = await self._admission.combos()
        items, faults = list[Item](), list[tuple[int, Entry, FluxgateError]]()
        for index, entry in enumerate(entries):
            try:
                items.append(await self._prepare_one(index, entry))
            except RedisUnavailable:
                raise
            except FluxgateError as error:
                faults.append((index, entry, error))
                if len(faults) >= MOST_FAULTS:
                    break
            # Thousands of graphs are drawn: other requests go on meanwhile.
            await asyncio.sleep(0)
        if faults:
            raise _describe(faults)
        return items

    async def _prepare_one(self, index: int, entry: Entry) -> Item:
        request = self._request
        if entry.workflow not in self._workflows:
            self._workflows[entry.workflow] = await self._admission.find_workflow(entry.workflow)
        workflow = self._workflows[entry.workflow]
        self._refuse_fetching(workflow, entry)
        wish = Wish(entry.workflow, entry.parameters, request.priority, entry.metadata, request.cache, request.timeout_s, self._webhook)
        rendered = await self._admission.prepare(wish, self._caller, self._resolve, workflow)
        needs = self._admission.beside_published(rendered)
        kind = needs.classes, tuple(choice for choice in needs.choices if choice[:2] in self._combos)
        if kind not in self._runnable:
            await self._admission.check_fleet(needs)
            self._runnable.add(kind)
        item = self._admission.seal(rendered, wish)
        return item._replace(spec=item.spec.model_copy(update={"batch": self._batch_id, "batch_index": index}))

    @staticmethod
    def _refuse_fetching(workflow: Workflow, entry: Entry) -> None:
        """A thousand items are not a thousand downloads: pictures are uploaded before."""
        for parameter in workflow.images:
            given = entry.parameters.get(parameter.name)
            if isinstance(given, str) and given.startswith(("http://", "https://", "data:")):
                raise Unprocessable(
                    f"{parameter.name}: in a batch pictures are named by upload ids.",
                    code="upload_needed",
                    hint="POST /v1/uploads first, and name the upload's id in the items.",
                    details={"parameter": parameter.name, "value": given[:100], "allowed": "an upload id"},
                )

    async def _resolve(self, names: Sequence[str]) -> list[Lora]:
        key = tuple(names)
        if key not in self._loras:
            self._loras[key] = await self._admission.resolve_loras(names, self._caller)
        return self._loras[key]


def _describe(faults: Sequence[tuple[int, Entry, FluxgateError]]) -> FluxgateError:
    """The first fault, with the place of each."""
    index, entry, error = faults[0]
    varied = ", ".join(hide_secrets(f"{name}={value!r}")[:60] for name, value in entry.varied.items())
    error.message = f"items[{index}]{f' ({varied})' if varied else ''}: {error.message}"
    error.details = {
        "item": index,
        **error.details,
        "items": [{"item": place, "code": fault.code, "message": fault.message} for place, _, fault in faults],
    }
    return error
