"""Which instances this dispatcher works with: as settings and admins want them, watched, taking turns with trainings, given LoRAs."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Set
from contextlib import suppress

import aiohttp

from gateway.dispatch.instance import Instance
from gateway.dispatch.lora_disk import LoraDisk
from gateway.errors import InstanceError, RedisUnavailable
from gateway.gpu import GpuLease
from gateway.instances import FleetRegistry, InstanceRegistry, Member, instance_id
from gateway.jobs.model import now_ms
from gateway.jobs.store import JobStore
from gateway.loras.registry import LoraRegistry
from gateway.plain_http import PlainHttp
from gateway.settings import Settings

log = logging.getLogger(__name__)

FLEET_S = 1.0


class Roster:
    """`instances` by id; `known` is set once they are. `wake` is set when one of them comes into use."""

    def __init__(
        self,
        settings: Settings,
        session: aiohttp.ClientSession,
        store: JobStore,
        registry: InstanceRegistry,
        fleet: FleetRegistry,
        loras: LoraRegistry,
        gpu: GpuLease | None,
        wake: asyncio.Event,
        plain: PlainHttp | None = None,
    ) -> None:
        self._settings, self._session, self._store = settings, session, store
        self._registry, self._fleet, self._loras, self._gpu, self._wake, self._plain = registry, fleet, loras, gpu, wake, plain
        self.instances: dict[str, Instance] = {}
        self.known = asyncio.Event()
        self._watches: dict[str, list[asyncio.Task[None]]] = {}

    async def follow(self, group: asyncio.TaskGroup) -> None:
        """Instances come from the settings and, at run time, from Redis: watch new ones, let removed ones go once they are empty."""
        known: Set[str] | None = None
        while True:
            wanted: dict[str, Member] | None
            try:
                wanted = await self._fleet.wanted(self._settings.comfyui_urls)
            except RedisUnavailable as error:
                log.warning("fleet unknown", extra={"error": error.message})
                wanted = None if self.instances else {instance_id(url): Member(url=url) for url in self._settings.comfyui_urls}
            if wanted is not None:
                known = await self._forget_others(wanted, known)
            if wanted is not None:
                self._reconcile(group, wanted)
                self.known.set()
            with suppress(RedisUnavailable):
                await self._take_turns()
                await self._let_go()
            await asyncio.sleep(FLEET_S)

    async def _forget_others(self, wanted: dict[str, Member], known: Set[str] | None) -> Set[str] | None:
        """Keep what is known of our instances and of those that other dispatchers watch: their settings may name others."""
        try:
            here = wanted.keys() | await self._registry.watched()
            if here != known:
                await self._loras.keep_only(here)
        except RedisUnavailable:
            return None
        return here

    async def bring_loras(self, disk: LoraDisk | None, list_in_use: Callable[[], set[str]]) -> None:
        """For ever: say which base models and LoRAs are in use here, and keep this dispatcher's folder of LoRAs."""
        while True:
            try:
                await self._loras.touch(list_in_use(), now_ms())
                busy = {instance.load.base_model for instance in self.instances.values() if instance.held and instance.load.base_model}
                await self._registry.note_base_models(busy, now_ms())
                if disk is not None:
                    await disk.bring(await self._loras.published(), await self._loras.used(), now_ms())
            except (RedisUnavailable, OSError) as error:
                log.warning("LoRAs not brought", extra={"error": str(error)})
            await asyncio.sleep(FLEET_S)

    async def _take_turns(self) -> None:
        """While a training holds the GPU the instances on it take nothing new; once empty they let go of their models and say so."""
        if self._gpu is None:
            return
        holder = await self._gpu.holder()
        for instance in (each for each in self.instances.values() if each.shared_gpu):
            was_yielding, instance.yielding = instance.yielding, holder is not None
            if holder is None:
                if was_yielding:
                    self._wake.set()
            elif not instance.held and not await self._store.slots_used(instance.id):
                if instance.freed_for != holder:
                    with suppress(InstanceError):
                        await instance.free(self._store)
                        instance.freed_for = holder
                await self._gpu.say_drained(holder, instance.id)

    async def _let_go(self) -> None:
        """Models go where an admin wants them gone; ComfyUI does it between two prompts, so nothing that runs is disturbed."""
        for name in await self._fleet.take_free(self.instances):
            try:
                await self.instances[name].free(self._store)
            except InstanceError as error:
                log.warning("models not freed yet", extra={"instance": name, "error": error.message})
                await self._fleet.want_free([name])
            await self._fleet.end_freeing(name)

    def _reconcile(self, group: asyncio.TaskGroup, wanted: dict[str, Member]) -> None:
        for name, member in wanted.items():
            if name not in self.instances:
                told = self._settings
                instance = Instance(
                    member.url,
                    self._session,
                    told.slots_per_instance,
                    told.quick_slots_per_instance,
                    lost_s=told.instance_lost_s,
                    plain=self._plain,
                    shared_gpu=told.shared_gpu if member.url in told.shared_gpu_urls or not told.shared_gpu_urls else None,
                )
                self.instances[name] = instance
                watch = instance.watch(self._registry, self._loras, self._store, self._wake)
                self._watches[name] = [group.create_task(instance.socket.run()), group.create_task(watch)]
            self.instances[name].draining = member.draining
        for name in self.instances.keys() - wanted.keys():
            self.instances[name].draining = True
            if not self.instances[name].held:
                del self.instances[name]
                for task in self._watches.pop(name):
                    task.cancel()
