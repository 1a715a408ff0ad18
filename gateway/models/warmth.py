"""Which base model is loaded where, as admins wish it: loaded by the smallest picture that needs it, let go by ComfyUI's own means."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from comfy_workflows.catalog import Catalog
from comfy_workflows.errors import UnknownBaseModel
from comfy_workflows.workflow import Workflow
from gateway.admission import Admission, Rendered, Wish
from gateway.auth import Caller
from gateway.dispatch.fleet import missing
from gateway.errors import Conflict, FluxgateError, NoInstance, NotFound, RedisUnavailable, Unprocessable
from gateway.instances import FleetRegistry, InstanceFacts, InstanceRegistry, instance_id
from gateway.jobs.model import Job
from gateway.jobs.store import JobStore
from gateway.settings import Settings
from gateway.workflows.errors import translate_workflow_error

log = logging.getLogger(__name__)

# A model of 24 GB from a slow volume takes minutes.
WARM_UP_S = 900.0
LOOK_S = 0.5
# Parameters that a picture is the smaller for.
_SIZES = ("width", "height", "size", "steps", "num_images")
# Who asks at a start: nobody with a key.
WARMER = Caller("warm-up", frozenset({"admin"}))


class Warmth:
    """Raises NotFound, Conflict, NoInstance, Unprocessable."""

    def __init__(
        self, settings: Settings, catalog: Catalog, admission: Admission, registry: InstanceRegistry, fleet: FleetRegistry
    ) -> None:
        self._settings, self._catalog, self._admission = settings, catalog, admission
        self._registry, self._fleet = registry, fleet

    async def load(self, base_model: str, instance: str | None, caller: Caller) -> tuple[str, Job | None]:
        """(where it is loaded or will be, the job that loads it; None when it is there already)"""
        wish = self._wish_for(base_model)
        rendered, chosen = await self._choose(wish, base_model, instance, caller)
        if await self._registry.base_model_on(chosen.id) == base_model:
            return chosen.id, None
        return chosen.id, await self._order(wish, rendered, pinned=chosen.id)

    async def warm_up(self, store: JobStore, warmed: asyncio.Event) -> None:
        """For ever: load the default base model once on each instance of the settings, then set `warmed`. What cannot be is logged."""
        base_model, names = self._settings.default_base_model, [instance_id(url) for url in self._settings.comfyui_urls]
        try:
            async with asyncio.timeout(WARM_UP_S):
                await asyncio.gather(*(self._warm(base_model, name, store) for name in names))
        except TimeoutError:
            log.warning("not warm in time", extra={"base_model": base_model, "wait_s": WARM_UP_S})
        warmed.set()
        await asyncio.Event().wait()

    async def _warm(self, base_model: str, name: str, store: JobStore) -> None:
        """It may have been started anew since it was last heard of, so that it is loaded there already is not believed."""
        job: Job | None = None
        while job is None or not job.is_terminal:
            try:
                if job is None:
                    wish = self._wish_for(base_model)
                    rendered, chosen = await self._choose(wish, base_model, name, WARMER)
                    job = await self._order(wish, rendered, pinned=chosen.id, queue_timeout_s=WARM_UP_S)
                else:
                    job = await store.load(job.id) or job
            except (NotFound, Conflict, RedisUnavailable):
                # It has not been seen yet, or nobody is seen at the moment.
                pass
            except FluxgateError as error:
                log.warning("not warmed up", extra={"instance": name, "error": error.message})
                return
            await asyncio.sleep(LOOK_S)
        told = {"instance": name, "base_model": base_model, "job_id": job.id}
        if job.status == "succeeded":
            log.info("warmed up", extra=told)
        else:
            log.warning("not warmed up", extra=told | {"error": job.error.message if job.error else job.status})

    async def unload(self, instance: str | None) -> list[str]:
        """The instances that let go of their models within seconds, each when the prompt that it runs has ended."""
        up = [facts for facts in await self._registry.all() if facts.state != "down"]
        if instance is not None:
            up = [await self._find(instance)]
        names = [facts.id for facts in up]
        if names:
            await self._fleet.want_free(names)
        return names

    def _wish_for(self, base_model: str) -> Wish:
        workflow = self._choose_workflow(base_model)
        return Wish(workflow.name, _make_smallest(workflow, base_model), "high", {"load": base_model}, "off")

    async def _choose(self, wish: Wish, base_model: str, instance: str | None, caller: Caller) -> tuple[Rendered, InstanceFacts]:
        rendered = await self._admission.prepare(wish, caller)
        chosen = await self._choose_instance(base_model, instance, self._admission.beside_published(rendered))
        # An unload that nobody has done yet would undo it: the last wish counts.
        await self._fleet.keep_models(chosen.id)
        return rendered, chosen

    async def _order(self, wish: Wish, rendered: Rendered, **where: Any) -> Job:
        item = self._admission.seal(rendered, wish)
        job, _ = await self._admission.enqueue(item._replace(spec=item.spec.model_copy(update=where)))
        return job

    def _choose_workflow(self, base_model: str) -> Workflow:
        """One that needs nothing but this base model: the default one where it fits."""
        if base_model not in self._catalog.base_models:
            raise translate_workflow_error(UnknownBaseModel(base_model, self._catalog.base_models))
        names = [self._settings.default_workflow, *self._catalog.names()]
        for workflow in map(self._admission.workflow, names):
            if base_model in workflow.fitting_base_models() and not workflow.images:
                return workflow
        raise Unprocessable(
            f"No workflow makes a picture with {base_model!r} alone.",
            code="no_workflow_loads_it",
            details={"parameter": "base_model", "value": base_model},
        )

    async def _choose_instance(self, base_model: str, instance: str | None, needs: Any) -> InstanceFacts:
        """The one named, or of those that can run it the one where it is loaded, or else the least busy."""
        candidates = [await self._find(instance)] if instance else await self._registry.all()
        lacks = dict[str, list[str]]()
        able = list[InstanceFacts]()
        for facts in candidates:
            catalog = await self._registry.catalog(facts) if facts.state == "up" else None
            if catalog is None:
                continue
            lacks[facts.id] = missing(needs, catalog)
            able += [] if lacks[facts.id] else [facts]
        if able:
            return min(able, key=lambda facts: (facts.base_model != base_model, facts.slots_used, facts.base_model is not None, facts.id))
        if not lacks:
            states = {facts.id: facts.state for facts in candidates}
            raise Conflict("No instance is up that could load it.", code="instance_not_up", details={"instances": states})
        fewest = min(lacks.values(), key=len)
        raise NoInstance(f"{base_model} cannot be loaded: {', '.join(fewest[:5])} is missing.", details={"missing": fewest})

    async def _find(self, instance: str) -> InstanceFacts:
        for facts in await self._registry.all():
            if facts.id == instance:
                return facts
        details = {"parameter": "instance", "value": instance}
        raise NotFound(f"There is no instance {instance!r}.", code="instance_not_found", details=details)


def _make_smallest(workflow: Workflow, base_model: str) -> dict[str, Any]:
    """The request of the smallest picture that a workflow makes."""
    asked = {name: value for name, value in workflow.example.items() if name != "loras"}
    least = {name: parameter.minimum for name, parameter in workflow.parameters.items() if name in _SIZES and parameter.minimum is not None}
    return {**asked, **least, "base_model": base_model}
