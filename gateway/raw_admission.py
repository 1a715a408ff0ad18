"""From a graph of the caller's own to a stored job: who may bring one, what it may hold, which instances have its nodes."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

from comfy_workflows.catalog import Catalog
from comfy_workflows.errors import MissingAsset, WorkflowError
from comfy_workflows.graph import Graph
from comfy_workflows.raw import AssetUse, RawRules, prepare_raw
from gateway.admission import Admission, needs_of, without_names
from gateway.auth import Caller
from gateway.dialects.comfy_v2 import parse_output_id
from gateway.errors import Forbidden, NoInstance, NotFound, Unprocessable
from gateway.inputs.assets import AssetStore
from gateway.inputs.bringing import Inputs, Source
from gateway.jobs.model import Job, JobInput, JobSpec, Needs, new_job_id, now_ms
from gateway.jobs.records import IdempotencyKey
from gateway.jobs.store import JobStore
from gateway.settings import Settings
from gateway.storage import Storage
from gateway.workflows.errors import translate_workflow_error

# What such a job says where others name their workflow.
RAW = "raw"
# A base model like any other to placement, so that such jobs wait behind one another on an instance.
NO_MODEL = "none"
# Where a file is looked for that a graph names as it was uploaded.
LATEST_UPLOADS = 100
_MODEL_INPUTS = ("unet_name", "ckpt_name")


@dataclass(frozen=True, slots=True)
class RawWish:
    """What a caller asks for."""

    workflow: Any
    metadata: dict[str, Any] = field(default_factory=dict)


class RawAdmission:
    """Turns graphs into jobs. Raises Forbidden, Unprocessable; nothing is stored when it does."""

    def __init__(
        self,
        settings: Settings,
        catalog: Catalog,
        store: JobStore,
        storage: Storage,
        assets: AssetStore,
        inputs: Inputs,
        admission: Admission,
        rules: RawRules,
    ) -> None:
        self._settings, self._catalog, self._store, self._storage = settings, catalog, store, storage
        self._assets, self._inputs, self._admission = assets, inputs, admission
        self._rules = rules

    async def admit(self, wish: RawWish, caller: Caller, key: IdempotencyKey | None = None) -> tuple[Job, bool]:
        """Check and store. With a `key` seen before, the job is that of the first request, and the second answer says so."""
        self.require_right(caller)
        job_id = new_job_id()
        graph, uses = self._prepare(wish.workflow, job_id)
        await self._admission.require_graph(graph, caller.id, RAW)
        inputs = await self._bring(caller, graph, uses)
        spec = self._spec(wish, caller, graph, inputs, job_id)
        await self._require_nodes(spec.needs, caller)
        stored = json.dumps(graph, ensure_ascii=False).encode()
        spec = spec.model_copy(update={"graph_sha256": hashlib.sha256(without_names(spec, stored)).hexdigest()})
        job = Job(spec=spec)
        admitted = await self._store.create(spec, stored, key=key)
        if admitted.job_id == job.id:
            await self._inputs.keep(spec)
            return job, False
        return await self._store.load(admitted.job_id) or job, True

    def require_right(self, caller: Caller) -> None:
        allowed = self._settings.raw_graphs
        if allowed == "off":
            raise Forbidden("This deployment takes no graphs of its callers' own.", hint="POST /v1/generations runs its workflows.")
        if allowed == "admin" and not caller.may("admin"):
            message = "Graphs of one's own need a key with the scope `admin`."
            raise Forbidden(message, details={"allowed": "admin", "value": sorted(caller.scopes)})

    def _prepare(self, workflow: Any, job_id: str) -> tuple[Graph, list[AssetUse]]:
        try:
            return prepare_raw(workflow, self._rules, job_id=job_id)
        except WorkflowError as error:
            raise translate_workflow_error(error) from error

    async def _bring(self, caller: Caller, graph: Graph, uses: list[AssetUse]) -> tuple[JobInput, ...]:
        """Put the names of files of ours where the graph names assets. A name that is no asset's must be a choice of the instance."""
        sources: dict[tuple[str, str], Source] = {}
        for use in uses:
            asset_id = use.asset_id or await self._find_by_name(caller, use.name or "")
            if asset_id is not None:
                sources[use.node_id, use.input] = await self._find(caller, use, asset_id)
        brought = await self._inputs.bring_whole(caller.id, {f"{node_id}.{name}": source for (node_id, name), source in sources.items()})
        for (node_id, name), given in zip(sources, brought, strict=True):
            graph[node_id]["inputs"][name] = given.file
        return brought

    async def _find_by_name(self, caller: Caller, name: str) -> str | None:
        """The newest of the caller's latest uploads of that name."""
        found, _ = await self._assets.page(caller.id, None, LATEST_UPLOADS)
        return next((asset.id for asset in found if asset.name == name), None)

    async def _find(self, caller: Caller, use: AssetUse, asset_id: str) -> Source:
        """An upload, or an output of another job."""
        place = parse_output_id(asset_id)
        job = await self._store.load(place[0]) if place else None
        if place and job is not None and job.spec.caller == caller.id and place[1] < len(job.outputs):
            output = job.outputs[place[1]]
            return Source(output.sha256, lambda: self._storage.get(output.key))
        try:
            return await self._inputs.find_upload(caller.id, f"{use.node_id}.{use.input}", asset_id)
        except NotFound as error:
            raise translate_workflow_error(MissingAsset(use.node_id, use.input, asset_id)) from error

    async def _require_nodes(self, needs: Needs, caller: Caller) -> None:
        try:
            await self._admission.check_fleet_for(needs, caller)
        except NoInstance as error:
            # To the caller the graph is what is wrong: nothing the gateway can do makes the class appear.
            raise Unprocessable(error.message, code="invalid_workflow", hint=error.hint, details=error.details) from error

    def _spec(self, wish: RawWish, caller: Caller, graph: Graph, inputs: tuple[JobInput, ...], job_id: str) -> JobSpec:
        digest = hashlib.sha256(json.dumps(graph, sort_keys=True).replace(job_id, "").encode()).hexdigest()
        return JobSpec(
            id=job_id,
            caller=caller.id,
            workflow=RAW,
            workflow_version=digest[:12],
            raw=True,
            base_model=self._base_model_of(graph),
            parameters={},
            seed=0,
            inputs=inputs,
            price_per_gpu_hour=self._settings.price_per_gpu_hour,
            needs=needs_of(graph, [given.file for given in inputs]),
            metadata=wish.metadata,
            timeout_s=self._settings.timeout_s,
            queue_timeout_s=self._settings.queue_timeout_s,
            created_ms=now_ms(),
        )

    def _base_model_of(self, graph: Graph) -> str:
        """What will be warm on an instance that runs it: a known base model, else the file."""
        for node in graph.values():
            for name in _MODEL_INPUTS:
                file = node["inputs"].get(name)
                if isinstance(file, str):
                    known = (model.name for model in self._catalog.base_models.values() if file in model.files.values())
                    return next(known, file)
        return NO_MODEL
