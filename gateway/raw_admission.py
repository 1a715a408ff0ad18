"""From a graph of the caller's own to a stored job: who may bring one, what it may hold, which instances have its nodes."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

from comfy_workflows.catalog import Catalog
from comfy_workflows.errors import WorkflowError
from comfy_workflows.graph import Graph
from comfy_workflows.raw import list_classes, prepare_raw, read_rules
from gateway.admission import Admission, needs_of, translate_workflow_error
from gateway.auth import Caller
from gateway.errors import Forbidden, NoInstance, Unprocessable
from gateway.jobs.model import Job, JobSpec, Needs, new_job_id, now_ms
from gateway.jobs.records import IdempotencyKey
from gateway.jobs.store import JobStore
from gateway.settings import Settings

# What such a job says where others name their workflow.
RAW = "raw"
# A base model like any other to placement, so that such jobs wait behind one another on an instance.
NO_MODEL = "none"
_MODEL_INPUTS = ("unet_name", "ckpt_name")


@dataclass(frozen=True, slots=True)
class RawWish:
    """What a caller asks for."""

    workflow: Any
    metadata: dict[str, Any] = field(default_factory=dict)


class RawAdmission:
    """Turns graphs into jobs. Raises Forbidden, Unprocessable; nothing is stored when it does."""

    def __init__(self, settings: Settings, catalog: Catalog, store: JobStore, admission: Admission) -> None:
        self._settings, self._catalog, self._store, self._admission = settings, catalog, store, admission
        own = list_classes(catalog.get(name).graph for name in catalog.names())
        self._rules = read_rules().with_classes(*own, *settings.raw_nodes)

    async def admit(self, wish: RawWish, caller: Caller, key: IdempotencyKey | None = None) -> tuple[Job, bool]:
        """Check and store. With a `key` seen before, the job is that of the first request, and the second answer says so."""
        self._require_right(caller)
        job_id = new_job_id()
        graph = self._prepare(wish.workflow, job_id)
        spec = self._spec(wish, caller, graph, job_id)
        await self._require_nodes(spec.needs)
        job = Job(spec=spec)
        admitted = await self._store.create(spec, json.dumps(graph, ensure_ascii=False).encode(), key=key)
        if admitted.job_id == job.id:
            return job, False
        return await self._store.load(admitted.job_id) or job, True

    def _require_right(self, caller: Caller) -> None:
        allowed = self._settings.raw_graphs
        if allowed == "off":
            raise Forbidden("This deployment takes no graphs of its callers' own.", hint="POST /v1/generations runs its workflows.")
        if allowed == "admin" and not caller.may("admin"):
            message = "Graphs of one's own need a key with the scope `admin`."
            raise Forbidden(message, details={"allowed": "admin", "value": sorted(caller.scopes)})

    def _prepare(self, workflow: Any, job_id: str) -> Graph:
        try:
            return prepare_raw(workflow, self._rules, job_id=job_id)[0]
        except WorkflowError as error:
            raise translate_workflow_error(error) from error

    async def _require_nodes(self, needs: Needs) -> None:
        try:
            await self._admission.check_fleet(needs)
        except NoInstance as error:
            # To the caller the graph is what is wrong: nothing the gateway can do makes the class appear.
            raise Unprocessable(error.message, code="invalid_workflow", hint=error.hint, details=error.details) from error

    def _spec(self, wish: RawWish, caller: Caller, graph: Graph, job_id: str) -> JobSpec:
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
            needs=needs_of(graph),
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
