"""A before and an after picture for every LoRA that is published: the same prompt and seed without it and with it."""

from __future__ import annotations

import asyncio
import logging

from gateway.admission import Admission, Wish
from gateway.auth import Caller
from gateway.errors import FluxgateError, Moderated, RedisUnavailable
from gateway.jobs.store import JobStore
from gateway.loras.registry import Lora, LoraRegistry

log = logging.getLogger(__name__)

WATCH_S = 2.0
SEED = 42


class BeforeAfter:
    """Queues the two generations once an instance has the file; they belong to the LoRA's owner."""

    def __init__(self, admission: Admission, store: JobStore, loras: LoraRegistry) -> None:
        self._admission, self._store, self._loras = admission, store, loras

    async def watch(self) -> None:
        """For ever. What cannot be drawn now is tried again later."""
        while True:
            try:
                for lora in await self._loras.all():
                    if lora.owner and lora.base_model and lora.instances and not lora.after and await self._loras.claim_pictures(lora.file):
                        await self._try_draw(lora)
            except RedisUnavailable as error:
                log.warning("new LoRAs not looked for", extra={"error": error.message})
            await asyncio.sleep(WATCH_S)

    async def _try_draw(self, lora: Lora) -> None:
        try:
            await self._draw(lora)
        except Moderated:
            # The same is asked again in ten minutes, not at once.
            log.warning("before and after are refused by moderation", extra={"lora": lora.name})
        except FluxgateError as error:
            log.warning("before and after not drawn yet", extra={"lora": lora.name, "error": error.message})
            await self._loras.release_pictures(lora.file)

    async def _draw(self, lora: Lora) -> None:
        training = await self._store.load(lora.training) if lora.training else None
        asked = training.spec.parameters.get("sample_prompts") if training else None
        prompts = asked or [lora.trigger_word or lora.name]
        caller = Caller(lora.owner or "", frozenset({"generate"}))
        ids = []
        for weight in (0.0, 1.0):
            parameters = {"prompt": prompts[0], "seed": SEED, "base_model": lora.base_model, "width": 512, "height": 512}
            lora_use = {"name": lora.file, "weight": weight}
            wish = Wish(None, {**parameters, "loras": [lora_use]}, metadata={"lora": lora.name, "weight": weight})
            job, _ = await self._admission.admit(wish, caller)
            ids.append(job.id)
        before, after = ids
        await self._loras.change(lora.file, before=before, after=after)
