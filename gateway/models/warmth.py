"""Which base model is loaded where, as admins wish it: loaded by the smallest picture that needs it, let go by ComfyUI's own means."""

from __future__ import annotations

from typing import Any

from comfy_workflows.catalog import Catalog
from comfy_workflows.errors import UnknownBaseModel
from comfy_workflows.workflow import Workflow
from gateway.admission import Admission, Wish
from gateway.auth import Caller
from gateway.dispatch.fleet import missing
from gateway.errors import Conflict, NoInstance, NotFound, Unprocessable
from gateway.instances import FleetRegistry, InstanceFacts, InstanceRegistry
from gateway.jobs.model import Job
from gateway.settings import Settings
from gateway.workflows.errors import translate_workflow_error

# Parameters that a picture is the smaller for.
_SIZES = ("width", "height", "size", "steps", "num_images")


class Warmth:
    """Raises NotFound, Conflict, NoInstance, Unprocessable."""

    def __init__(
        self, settings: Settings, catalog: Catalog, admission: Admission, registry: InstanceRegistry, fleet: FleetRegistry
    ) -> None:
        self._settings, self._catalog, self._admission = settings, catalog, admission
        self._registry, self._fleet = registry, fleet

    async def load(self, base_model: str, instance: str | None, caller: Caller) -> tuple[str, Job | None]:
        """(where it is loaded or will be, the job that loads it; None when it is there already)"""
        workflow = self._choose_workflow(base_model)
        wish = Wish(workflow.name, _make_smallest(workflow, base_model), "high", {"load": base_model}, "off")
        rendered = await self._admission.prepare(wish, caller)
        chosen = await self._choose_instance(base_model, instance, self._admission.beside_published(rendered))
        # An unload that nobody has done yet would undo it: the last wish counts.
        await self._fleet.keep_models(chosen.id)
        if chosen.base_model == base_model:
            return chosen.id, None
        item = self._admission.seal(rendered, wish)
        job, _ = await self._admission.enqueue(item._replace(spec=item.spec.model_copy(update={"pinned": chosen.id})))
        return chosen.id, job

    async def unload(self, instance: str | None) -> list[str]:
        """The instances that let go of their models within seconds, each when the prompt that it runs has ended."""
        up = [facts for facts in await self._registry.all() if facts.state != "down"]
        if instance is not None:
            up = [await self._find(instance)]
        names = [facts.id for facts in up]
        if names:
            await self._fleet.want_free(names)
        return names

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
