"""One ComfyUI as a dispatcher sees it: its socket, its health, and what it can run. Publishes all of it for the other processes."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import math
import time
from collections.abc import Iterable
from typing import NamedTuple

import aiohttp

from gateway.comfy.client import ComfyClient, OutputFile
from gateway.comfy.companion import SAVE_NODE
from gateway.comfy.socket import InstanceSocket
from gateway.dispatch.breaker import Breaker
from gateway.dispatch.changeover import Changeover
from gateway.dispatch.fleet import Candidate, InstanceView
from gateway.dispatch.pace import Pace
from gateway.errors import InstanceError, RedisUnavailable
from gateway.instances import Catalog, InstanceFacts, InstanceRegistry, count_kept_jobs, instance_id, reduce_catalog
from gateway.jobs.model import Machine, now_ms
from gateway.jobs.records import Claim, Load
from gateway.jobs.store import JobStore
from gateway.loras.registry import Lora, LoraRegistry, describe_lora
from gateway.plain_http import PlainHttp

log = logging.getLogger(__name__)

REFRESH_S = 3.0
CATALOG_S = 60.0


class Held(NamedTuple):
    """A job of this process that holds a slot: what kind of work it is, and since when it is on its way (time.monotonic)."""

    work: str = ""
    placed_s: float = 0.0


class Instance:
    """Facts are refreshed every few seconds; the socket's state is current."""

    def __init__(
        self,
        url: str,
        session: aiohttp.ClientSession,
        slots: int,
        quick_slots: int = 0,
        lost_s: float = 30.0,
        shared_gpu: str | None = None,
        plain: PlainHttp | None = None,
    ) -> None:
        """`slots` prompts are kept there; up to `quick_slots` while they are so short that it would run dry before the next one came.

        `lost_s`: after this long without an answer it counts as lost, so one request waits for a third of that.
        """
        self.id = instance_id(url)
        self.url = url
        self.slots = slots
        self._quick_slots = quick_slots
        self._pace = Pace()
        self.client = ComfyClient(url, session, timeout_s=lost_s / 3, plain=plain)
        self.socket = InstanceSocket(url, session)
        self.catalog: Catalog | None = None
        self.breaker = Breaker()
        self.changeover = Changeover()
        self.draining = False
        self.yielding = False  # a training has the GPU
        self.freed_for: str | None = None
        self.shared_gpu = shared_gpu
        self.held: dict[str, Held] = {}  # jobs of this process that hold a slot
        self._let_go_s = 0.0  # when the last of them was done, time.monotonic()
        self.held_by_others = 0  # slots that other processes' jobs hold, as of the last look
        self.load = Load(0, None, frozenset())  # over all processes, as of the last look
        self._leaving: list[Claim] = []
        self._keeps = 1  # jobs whose results its cache holds
        self._to_forget: list[str] = []
        self._to_remove: list[OutputFile] = []
        self._facts = InstanceFacts(id=self.id, url=url, state="down", slots=slots, shared_gpu=shared_gpu)
        self._loras: dict[str, Lora] = {}
        self._hashes: dict[str, str] = {}  # of files of base models

    @property
    def is_usable(self) -> bool:
        return self.socket.is_connected and self.catalog is not None

    def made_on(self, files: Iterable[str]) -> Machine:
        """What the record of a job that used these files of models says of where it ran."""
        facts = self._facts
        models = {file: self._hashes[file] for file in files if file in self._hashes}
        versions = {"comfyui_version": facts.version, "torch_version": facts.torch_version}
        return Machine(instance=self.id, kind=facts.kind, device=facts.device, models=models, **versions)

    @property
    def has_companion(self) -> bool:
        """Whether our extension is installed there."""
        return self.catalog is not None and SAVE_NODE in self.catalog

    @property
    def may_take_more(self) -> bool:
        """A cheap look before Redis is asked: no job of another process is counted."""
        return (
            self.is_usable
            and not self.draining
            and not self.yielding
            and len(self.held) < self._allowed
            and self.breaker.allows(len(self.held))
        )

    @property
    def _allowed(self) -> int:
        """Prompts that may be there now: one more than there are while those run dry, as far as that is proven."""
        used = len(self.held)
        # How long the jobs of others take is not known.
        if self.held_by_others or not self.slots <= used < self._quick_slots:
            return self.slots
        oldest_s = time.monotonic() - min(held.placed_s for held in self.held.values())
        spare = self._pace.spare_prompts([held.work for held in self.held.values()], oldest_s)
        return max(self.slots, min(used + 1, self.slots + spare))

    def look(self, load: Load) -> None:
        """What Redis says it holds now. Our own jobs are known better here than there."""
        self.load = load
        self._leaving = [claim for claim in self._leaving if claim.holds_slot]
        self.held_by_others = max(0, load.slots_used - len(self.held) - len(self._leaving))

    def leave(self, claim: Claim) -> None:
        """A job's prompt has ended; Redis still counts it, and is told soon."""
        self._leaving.append(claim)

    def begin_to_tell(self) -> list[Claim]:
        """Of the jobs that have left, those of which Redis is not being told yet."""
        self._leaving = [claim for claim in self._leaving if claim.holds_slot]
        untold = [claim for claim in self._leaving if not claim.is_leaving]
        for claim in untold:
            claim.is_leaving = True
        return untold

    async def free(self, store: JobStore) -> None:
        """Have it let go of its models, and forget that they were there. ComfyUI does it between two prompts. Raises InstanceError."""
        await self.client.free()
        await store.forget_warm(self.id)
        self.load = Load(self.load.slots_used, None, frozenset())

    def place(self, candidate: Candidate) -> int:
        """A job is on its way there. The number of slots that may be used with it."""
        self.held[candidate.job_id] = Held(candidate.work, time.monotonic())
        recent = (*self.load.recent, candidate.lora_files)[-self._keeps :] if self._keeps > 1 else ()
        self.load = Load(self.load.slots_used, candidate.base_model, candidate.lora_files, recent)
        return max(self.slots, self.held_by_others + len(self.held))

    def learn(self, job_id: str, run_s: float, submitted_s: float | None) -> None:
        """A job that is still held ran for so long. `submitted_s` (time.monotonic) is when its prompt was there."""
        held = self.held.get(job_id)
        if held is not None and submitted_s is not None:
            self._pace.record_refill(submitted_s - held.placed_s)
            self._pace.record_run(held.work, run_s)

    def view(self) -> InstanceView:
        used = self.held_by_others + len(self.held)
        return InstanceView(
            id=self.id,
            free_slots=self._allowed - used if self.may_take_more else 0,
            slots_used=used,
            base_model=self.load.base_model,
            lora_files=self.load.lora_files,
            catalog=self.catalog,
            takes_more=self._state() == "up",
            recent=self.load.recent,
            keeps=self._keeps,
            share=self.slots,
            rest_s=self._expect_rest_s(),
        )

    def _expect_rest_s(self) -> float:
        """Until what it holds is done. Of other processes' jobs nothing is known."""
        if not self.held or self.held_by_others:
            return math.inf
        begun_s = max(self._let_go_s, next(iter(self.held.values())).placed_s)
        return self._pace.expect_rest_s([held.work for held in self.held.values()], time.monotonic() - begun_s)

    def let_go(self, job_id: str) -> None:
        """Its prompt is done: the next one runs. More than once does no harm."""
        if self.held.pop(job_id, None) is not None:
            self._let_go_s = time.monotonic()

    def forget_soon(self, prompt_id: str, files: list[OutputFile]) -> None:
        """The prompt's outputs are stored: its history entry and files there are of no more use. Sent in batches.

        The newest entry stays there: without any the process has run nothing (`_has_past`).
        """
        self._to_forget.append(prompt_id)
        if self.has_companion:
            self._to_remove += files

    async def watch(self, registry: InstanceRegistry, loras: LoraRegistry, store: JobStore, on_usable: asyncio.Event) -> None:
        """Refresh and publish for ever. `on_usable` is set when the instance comes (back) into use."""
        loop = asyncio.get_running_loop()
        connections, catalog_due, is_known = 0, 0.0, False
        while True:
            was_usable = self.is_usable
            try:
                await self.socket.wait_connected(REFRESH_S)
                if self.socket.connections != connections:
                    connections, catalog_due, is_known = self.socket.connections, 0.0, False
                changed = await self._refresh_loras(loras)
                if changed or loop.time() >= catalog_due:
                    await self._refresh_catalog(registry)
                    catalog_due = loop.time() + CATALOG_S
                await self._refresh_stats()
                self._hashes = await registry.hashes_by_name()
                await self._tidy_up()
                # Last: nothing of the above waits for it.
                is_known = is_known or await self._has_past(store)
            except (InstanceError, RedisUnavailable) as error:
                self._facts.last_error = error.message
            await self._publish(registry)
            if self.is_usable and not was_usable:
                on_usable.set()
            await asyncio.sleep(REFRESH_S if self.is_usable else 0.25)

    async def _has_past(self, store: JobStore) -> bool:
        """After a connection: it may be another process. One that has run nothing has nothing loaded. False: ask again."""
        if await self.client.has_run():
            return True
        if self.held or await store.slots_used(self.id) or self.held:
            # What is on its way there, or was placed while Redis was asked, is known better than what was.
            return False
        await store.forget_warm(self.id)
        if not self.held:
            self.load = Load(self.load.slots_used, None, frozenset())
        return True

    async def look_again(self) -> None:
        """Read its catalogue now; other processes learn of it with the next refresh. Raises InstanceError."""
        self.catalog = reduce_catalog(await self.client.object_info())

    async def _refresh_loras(self, registry: LoraRegistry) -> bool:
        names = set(await self.client.model_names("loras"))
        if names == self._loras.keys() and self.catalog is not None:
            return False
        for name in names - self._loras.keys():
            self._loras[name] = describe_lora(name, await self.client.model_metadata("loras", name))
        for name in self._loras.keys() - names:
            del self._loras[name]
        await registry.publish(self.id, list(self._loras.values()))
        return True

    async def _refresh_catalog(self, registry: InstanceRegistry) -> None:
        object_info = await self.client.object_info()
        catalog = reduce_catalog(object_info)
        version = hashlib.sha256(json.dumps(catalog, sort_keys=True).encode()).hexdigest()[:12]
        is_known = version == self._facts.catalog_version and self.catalog is not None
        if not is_known or not await registry.keep_catalog(self.id, version):
            await registry.publish_catalog(self.id, version, catalog, object_info)
            self._facts.catalog_version = version
        self.catalog = catalog

    async def _refresh_stats(self) -> None:
        stats = await self.client.system_stats()
        system, devices = stats.get("system") or {}, stats.get("devices") or [{}]
        facts = self._facts
        facts.version = system.get("comfyui_version")
        self._keeps = count_kept_jobs(system.get("argv"))
        facts.kind = str(system.get("fluxgate_engine") or "comfyui")
        facts.device = devices[0].get("name")
        facts.torch_version = system.get("pytorch_version")
        facts.vram_total_bytes = devices[0].get("vram_total")
        facts.vram_free_bytes = devices[0].get("vram_free")
        facts.seen_ms = now_ms()
        facts.last_error = None

    async def _tidy_up(self) -> None:
        if len(self._to_forget) > 1:
            batch = self._to_forget[:-1][:500]
            self._to_forget = self._to_forget[len(batch) :]
            await self.client.delete_history(batch)
        if self._to_remove:
            files, self._to_remove = self._to_remove[:500], self._to_remove[500:]
            await self.client.remove_outputs(files)

    def _state(self) -> str:
        if not self.is_usable:
            return "down"
        if self.draining:
            return "draining"
        if self.yielding:
            return "training"
        return "up" if self.breaker.state == "closed" else "resting"

    async def _publish(self, registry: InstanceRegistry) -> None:
        facts = self._facts
        facts.state = self._state()
        if self.breaker.state != "closed":
            facts.last_error = self.breaker.last_fault
        try:
            await registry.publish(facts)
        except RedisUnavailable as error:
            log.warning("facts not published", extra={"instance": self.id, "error": error.message})
