"""A training's turn on the GPU: taken once the instances are out of the way, given back once its memory is free again."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from threading import Event

from gateway.errors import Conflict, RedisUnavailable
from gateway.gpu import GpuLease
from gateway.instances import InstanceRegistry
from gateway.trainings.presets import GB

log = logging.getLogger(__name__)

WAIT_S = 900.0
LOOK_S = 0.5
# The driver frees what a process held within a second or two of its end.
RETURN_WAIT_S = 60.0
RETURN_SLACK_BYTES = 512 << 20  # what others may have taken meanwhile

Tell = Callable[[str, str], Awaitable[None]]
MeasureFree = Callable[[], Awaitable[int | None]]


class GpuTurn:
    """`gpu` None: nothing is shared, every turn is free. `measure_free` answers None where memory cannot be measured."""

    def __init__(self, gpu: GpuLease | None, holder: str, lease_s: float, registry: InstanceRegistry, measure_free: MeasureFree) -> None:
        self._gpu, self._holder, self._lease_s, self._registry = gpu, holder, lease_s, registry
        self._measure_free = measure_free
        self._has_it = False
        self._free_before: int | None = None
        self._one_at_a_time = asyncio.Lock()

    async def take(self, stop: Event, tell: Tell) -> None:
        """Wait for the GPU, then until every instance on it is empty, or until a stop. Raises Conflict `gpu_busy` after a while."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + WAIT_S
        while self._gpu is not None and not stop.is_set():
            if loop.time() > deadline:
                raise Conflict(f"The GPU was not free within {WAIT_S:g} s.", code="gpu_busy", hint="GET /v1/instances shows what runs.")
            if await self._gpu.take(self._holder, self._lease_s):
                self._has_it = True
                on_it = [facts for facts in await self._registry.all() if facts.shared_gpu == self._gpu.name]
                if {facts.id for facts in on_it if facts.state != "down"} <= await self._gpu.drained(self._holder):
                    break
            await tell("gpu", "Waits until the instances on this GPU have finished what they run.")
            await asyncio.sleep(LOOK_S)
        self._free_before = await self._measure_free()

    async def keep(self) -> None:
        """Renew it, now and then, while it is ours."""
        async with self._one_at_a_time:
            if self._gpu is not None and self._has_it:
                await self._gpu.take(self._holder, self._lease_s)

    async def give_back(self, tell: Tell) -> None:
        """After the trainer's last process: see its memory return, then let the instances have the GPU."""
        if self._free_before is not None:
            await self._see_memory_return(self._free_before, tell)
            self._free_before = None
        await self.let_go()

    async def let_go(self) -> None:
        """At once, whatever the memory. A lease that cannot be given back runs out."""
        async with self._one_at_a_time:
            self._has_it = False
            if self._gpu is not None:
                with suppress(RedisUnavailable):
                    await self._gpu.let_go(self._holder)

    async def _see_memory_return(self, before: int, tell: Tell) -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + RETURN_WAIT_S
        while (free := await self._measure_free()) is not None and free + RETURN_SLACK_BYTES < before:
            if loop.time() > deadline:
                missing = (before - free) / GB
                log.warning("GPU memory did not return", extra={"missing_gb": round(missing, 1)})
                await tell("gpu", f"{missing:.1f} GB of GPU memory did not return; somebody else may hold it.")
                return
            await tell("gpu", "Waits until the trainer's GPU memory is free again.")
            await asyncio.sleep(LOOK_S)
