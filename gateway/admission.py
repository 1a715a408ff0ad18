"""From a request to a stored job: workflow, parameters, LoRAs, the final graph. After this nothing about the job is decided any more."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from comfy_workflows.catalog import Catalog
from comfy_workflows.errors import WorkflowError
from comfy_workflows.graph import Graph
from comfy_workflows.render import LoraFile, render
from comfy_workflows.workflow import Filled, Workflow
from gateway.auth import Caller
from gateway.dispatch.fleet import missing
from gateway.errors import NoInstance
from gateway.inputs.bringing import Brought, Inputs
from gateway.instances import InstanceRegistry
from gateway.jobs.model import Job, JobSpec, LoraUse, Needs, Priority, Webhook, new_job_id, now_ms
from gateway.jobs.records import Admitted, IdempotencyKey, Item, Made
from gateway.jobs.store import JobStore
from gateway.loras.registry import Lora, LoraRegistry
from gateway.moderation.verdicts import Moderation
from gateway.reuse import reuse_result
from gateway.settings import Settings
from gateway.storage import Storage
from gateway.telemetry import Metrics
from gateway.workflows.edits import WorkflowEdits
from gateway.workflows.errors import translate_workflow_error

Resolver = Callable[[Sequence[str]], Awaitable[list[Lora]]]


@dataclass(frozen=True, slots=True)
class Wish:
    """What a caller asks for, apart from the workflow's own parameters."""

    workflow: str | None
    parameters: dict[str, Any]
    priority: Priority = "normal"
    metadata: dict[str, Any] | None = None
    cache: Literal["use", "refresh", "off"] = "use"
    timeout_s: float | None = None
    webhook: Webhook | None = None


@dataclass(frozen=True, slots=True)
class Rendered:
    """An admitted wish that is not stored yet."""

    spec: JobSpec
    graph: Graph
    loras: tuple[Lora, ...] = ()


def needs_of(graph: Graph, brought: Collection[str] = ()) -> Needs:
    """Node classes, and every text input: those that are combos on an instance must be among its choices.

    Files that are `brought` along are not: no instance lists them beforehand.
    """
    classes = sorted({str(node["class_type"]) for node in graph.values()})
    choices = sorted(
        {
            (str(node["class_type"]), str(name), value)
            for node in graph.values()
            for name, value in node["inputs"].items()
            # File names and choices are short and on one line; prompts need not travel with every candidate.
            if isinstance(value, str) and len(value) <= 255 and "\n" not in value and value not in brought
        }
    )
    return Needs(classes=tuple(classes), choices=tuple(choices))


class Admission:
    """Turns wishes into jobs. Raises Unprocessable, NotFound, NoInstance; nothing is stored when it does."""

    def __init__(
        self,
        settings: Settings,
        catalog: Catalog,
        store: JobStore,
        storage: Storage,
        inputs: Inputs,
        loras: LoraRegistry,
        registry: InstanceRegistry,
        metrics: Metrics,
        edits: WorkflowEdits,
        moderation: Moderation,
        expect: Callable[[Made], None] | None = None,
    ) -> None:
        """`expect` is told of each job in the moment in which it is made: by the dispatcher of this process, if there is one."""
        self._settings, self._catalog, self._store, self._storage = settings, catalog, store, storage
        self._inputs, self._loras, self._registry, self._metrics = inputs, loras, registry, metrics
        self._edits, self._moderation = edits, moderation
        self._expect = expect

    def workflow(self, name: str | None) -> Workflow:
        try:
            return self._catalog.get(name or self._settings.default_workflow)
        except WorkflowError as error:
            raise translate_workflow_error(error) from error

    async def find_workflow(self, name: str | None) -> Workflow:
        """The same, be it that another process has put it in place a moment ago."""
        if name is not None:
            await self._edits.learn_of(name)
        return self.workflow(name)

    async def admit(self, wish: Wish, caller: Caller, key: IdempotencyKey | None = None) -> tuple[Job, bool]:
        """Check, render, store. The job is queued, or answered from the cache, when this returns.

        With a `key` seen before, the job is that of the first request, and the second answer says so.
        """
        rendered = await self.prepare(wish, caller)
        await self.check_fleet(self.beside_published(rendered))
        job, admitted = await self.enqueue(self.seal(rendered, wish), key)
        if admitted.job_id == job.id:
            return job, False
        return await self._store.load(admitted.job_id) or job, True

    def seal(self, rendered: Rendered, wish: Wish) -> Item:
        """A job to be, about which nothing is decided any more."""
        graph = json.dumps(rendered.graph, ensure_ascii=False).encode()
        alike = without_names(rendered.spec, graph)
        changes = {"graph_sha256": hashlib.sha256(alike).hexdigest(), "cache_key": self._cache_key(rendered.spec, wish, alike)}
        return Item(rendered.spec.model_copy(update=changes), graph, wish.cache == "use")

    async def enqueue(self, item: Item, key: IdempotencyKey | None = None) -> tuple[Job, Admitted]:
        """Store it: queued, following its twin, or finished with what an identical one made; and what came of that."""
        spec, graph, reuse = item
        job = Job(spec=spec)
        if self._expect is not None:
            self._expect(Made(job, graph))
        admitted = await self._store.create(spec, graph, reuse=reuse, key=key)
        if admitted.outcome == "cached":
            answered = await reuse_result(job, admitted.job_id, self._store, self._storage)
            if answered is None:
                # The cache points at what is gone: whoever is first now makes it anew.
                await self._store.forget_cached(spec.cache_key or "")
                admitted = await self._store.create(spec, graph, reuse=False, key=key)
            else:
                job, admitted = answered, await self._store.create_finished(answered, graph, key=key)
        if admitted.job_id == job.id and admitted.outcome != "stale":
            if job.cached:
                self._metrics.cached.inc()
            await self._inputs.keep(spec)
        return job, admitted

    def _cache_key(self, spec: JobSpec, wish: Wish, alike: bytes) -> str | None:
        """Two jobs of one caller with this key would make the same bytes: alike graphs, same stored form."""
        if wish.cache == "off" or not self._settings.cache_ttl_s:
            return None
        # A picture that this deployment's judge has not seen answers nobody.
        marks = [mark] if (mark := self._moderation.cache_mark) else []
        form = json.dumps([spec.caller, spec.parameters.get("output_format"), spec.parameters.get("quality"), *marks])
        return hashlib.sha256(alike + form.encode()).hexdigest()

    async def prepare(self, wish: Wish, caller: Caller, loras: Resolver | None = None, workflow: Workflow | None = None) -> Rendered:
        """Everything but storing: what `admit` would run. Whoever prepares many remembers `loras` and the `workflow`."""
        workflow = workflow or await self.find_workflow(wish.workflow)
        job_id = new_job_id()
        try:
            filled = workflow.fill(wish.parameters, default_base_model=self._settings.default_base_model, draw_seed=_draw_seed)
            await self._require_decency(workflow, filled, caller)
            resolve = loras or partial(self.resolve_loras, caller=caller)
            found = await resolve([lora.name for lora in filled.loras])
            files = [
                LoraFile(name=lora.name, file=lora.file, weight=asked.weight, family=lora.family)
                for lora, asked in zip(found, filled.loras, strict=True)
            ]
            brought = await self._inputs.bring(caller.id, workflow.images, filled.values)
            graph = render(workflow, replace(filled, values=filled.values | brought.files), job_id=job_id, loras=files)
        except WorkflowError as error:
            raise translate_workflow_error(error) from error
        return Rendered(self._spec(wish, caller, workflow, filled, found, brought, graph, job_id), graph, tuple(found))

    async def _require_decency(self, workflow: Workflow, filled: Filled, caller: Caller) -> None:
        """Every free text, also what is not wanted: at a guidance below 1 that is what is drawn."""
        if not self._moderation.judges_texts:
            return
        for name, parameter in workflow.parameters.items():
            text = filled.values.get(name)
            if parameter.type == "string" and isinstance(text, str):
                await self._moderation.require_texts([text], caller=caller.id, workflow=workflow.name, parameter=name)

    async def require_graph(self, graph: Graph, caller: str, workflow: str) -> None:
        """The same for every text of a graph. Raises Moderated."""
        if self._moderation.judges_texts:
            texts = sorted(_find_texts([node["inputs"] for node in graph.values()]))
            await self._moderation.require_texts(texts, caller=caller, workflow=workflow, parameter="workflow")

    def _spec(
        self,
        wish: Wish,
        caller: Caller,
        workflow: Workflow,
        filled: Filled,
        loras: list[Lora],
        brought: Brought,
        graph: Graph,
        job_id: str,
    ) -> JobSpec:
        uses = tuple(
            LoraUse(name=lora.name, file=lora.file, weight=asked.weight, sha256=lora.sha256)
            for lora, asked in zip(loras, filled.loras, strict=True)
        )
        return JobSpec(
            id=job_id,
            caller=caller.id,
            workflow=workflow.name,
            workflow_version=workflow.version,
            base_model=filled.base_model.name,
            parameters=filled.values | brought.shown,
            seed=int(filled.values.get("seed", 0)),
            loras=uses,
            inputs=brought.inputs,
            needs=needs_of(graph, [given.file for given in brought.inputs]),
            priority=wish.priority,
            metadata=wish.metadata or {},
            webhook=wish.webhook,
            timeout_s=min(wish.timeout_s or self._settings.timeout_s, self._settings.timeout_s),
            queue_timeout_s=self._settings.queue_timeout_s,
            price_per_gpu_hour=self._settings.price_per_gpu_hour,
            created_ms=now_ms(),
        )

    @staticmethod
    def beside_published(rendered: Rendered) -> Needs:
        """What must be there already. Published LoRAs are brought to the instances by the dispatchers: the job waits for them."""
        spec, coming = rendered.spec, {lora.file for lora in rendered.loras if lora.sha256}
        return spec.needs.model_copy(update={"choices": tuple(choice for choice in spec.needs.choices if choice[2] not in coming)})

    async def needs_beside_published(self, needs: Needs) -> Needs:
        """Of a job that was admitted before, what must be there already."""
        coming = {lora.file for lora in await self._loras.published()}
        return needs.model_copy(update={"choices": tuple(choice for choice in needs.choices if choice[2] not in coming)})

    async def resolve_loras(self, names: Sequence[str], caller: Caller) -> list[Lora]:
        return await self._loras.resolve(names, caller.id)

    async def combos(self) -> set[tuple[str, str]]:
        """(class, input) of every input that takes one of a list on some instance that is up."""
        found = set[tuple[str, str]]()
        for facts in await self._registry.recent():
            catalog = await self._registry.catalog(facts) if facts.state == "up" else None
            found |= {(class_type, name) for class_type, inputs in (catalog or {}).items() for name in inputs}
        return found

    async def check_fleet_for(self, needs: Needs, caller: Caller) -> None:
        """The same for a graph of the caller's own: files that are not for it count as absent."""
        await self.check_fleet(needs, await self._loras.hidden_from(caller.id))

    async def check_fleet(self, needs: Needs, hidden: frozenset[str] = frozenset()) -> None:
        """Refuse what no instance that is up could run. While none is up the job may wait: what they have is not known.

        `hidden` files count as absent.
        """
        lacks: dict[str, list[str]] = {}
        for facts in await self._registry.recent():
            catalog = await self._registry.catalog(facts) if facts.state == "up" else None
            if catalog is None:
                continue
            lack = missing(needs, catalog, hidden)
            if not lack:
                return
            lacks[facts.id] = lack
        if lacks:
            fewest = min(lacks.values(), key=len)
            raise NoInstance(
                f"No instance can run this: {', '.join(fewest[:5])} is missing.",
                hint="Install the missing model or node on an instance, or choose another base_model.",
                details={"missing": fewest, "instances": sorted(lacks)},
            )


def without_names(spec: JobSpec, graph: bytes) -> bytes:
    """The graph without what differs between identical jobs: the job's id, and its inputs' random names, for which their content stands."""
    graph = graph.replace(spec.id.encode(), b"")
    for given in spec.inputs:
        graph = graph.replace(given.file.encode(), given.sha256.encode())
    return graph


def _find_texts(value: Any) -> set[str]:
    """All that stand in lists and objects, which admission has not let be deep."""
    if isinstance(value, str):
        return {value}
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return set[str]().union(*(_find_texts(part) for part in parts))


def _draw_seed() -> int:
    return secrets.randbelow(1 << 53)
