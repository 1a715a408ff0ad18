"""Workflows put in place by admins: checked as `python -m comfy_workflows check` would, against what the instances have, and as graphs
of callers are, then in every process's catalogue within a second."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

from comfy_workflows.catalog import Catalog
from comfy_workflows.errors import BrokenWorkflow, WorkflowError
from comfy_workflows.folder_check import Report, check_folder
from comfy_workflows.node_types import ObjectInfo
from comfy_workflows.raw import RawRules, judge_bindings, judge_graph
from comfy_workflows.workflow import FILES, Workflow, load_workflow
from gateway.errors import Conflict, NoInstance, NotFound, RedisUnavailable, Unprocessable
from gateway.instances import InstanceRegistry
from gateway.jobs.trainings import CAPTIONING, TRAINING
from gateway.workflows.records import WorkflowRecords, WorkflowSource

log = logging.getLogger(__name__)

REFRESH_S = 1.0
# Every process holds all of them.
MOST_WORKFLOWS = 500
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
# What jobs say that no workflow made.
_TAKEN = frozenset({"raw", TRAINING, CAPTIONING})
NODES_HINT = "RAW_NODES names further node classes that callers' graphs may hold; folders of WORKFLOWS_DIR may hold any."


class WorkflowEdits:
    """Raises Unprocessable, Conflict, NotFound, NoInstance, RedisUnavailable. `catalog` holds the folders' workflows at first."""

    def __init__(self, catalog: Catalog, records: WorkflowRecords, registry: InstanceRegistry, rules: RawRules) -> None:
        self._catalog, self._records, self._registry, self._rules = catalog, records, registry, rules
        self._shipped = frozenset(catalog.names())
        self._seen = -1
        self._placed = dict[str, str]()  # versions, by name
        self._turn = asyncio.Lock()

    async def put(self, name: str, source: WorkflowSource) -> tuple[Workflow, Sequence[str]]:
        """(the workflow, in place; what else there is to say about it). Nothing changes when it raises."""
        self._require_name(name)
        current = await self._records.current()
        if name not in current and len(current) >= MOST_WORKFLOWS:
            raise Conflict(f"There are {MOST_WORKFLOWS} workflows already.", code="workflows_full", hint="DELETE one that nobody needs.")
        infos = await self._object_infos()
        async with self._turn:
            best = await asyncio.to_thread(_check, name, source, self._catalog, self._rules, infos)
        if best.workflow is None or best.problems:
            raise Unprocessable(
                f"{name}: {best.problems[0]}",
                code="broken_workflow",
                hint=best.hint or "python -m comfy_workflows check says the same on your machine.",
                details={"value": name, "problems": list(best.problems)},
            )
        await self._records.put(name, best.workflow.version, source)
        await self.refresh()
        return best.workflow, best.notes

    async def remove(self, name: str) -> None:
        """Nobody is offered it any more; jobs keep their graphs."""
        self._require_name(name)
        if name not in await self._records.current():
            raise NotFound(f"There is no workflow {name!r}.", code="workflow_not_found", details={"parameter": "name", "value": name})
        await self._records.remove(name)
        await self.refresh()

    async def watch(self) -> None:
        """For ever: what any process has put in place is in place here."""
        while True:
            await asyncio.sleep(REFRESH_S)
            try:
                await self.refresh()
            except RedisUnavailable as error:
                log.warning("workflows not read", extra={"error": error.message})

    async def learn_of(self, name: str) -> None:
        """A name nobody knows here may have been put in place by another process a moment ago."""
        if name not in self._catalog and _NAME.fullmatch(name):
            await self.refresh()

    async def refresh(self) -> None:
        async with self._turn:
            changes = await self._records.changes()
            if changes == self._seen:
                return
            current = await self._records.current()
            for name in self._placed.keys() - current.keys():
                self._catalog.drop(name)
                del self._placed[name]
            for name, version in current.items():
                if self._placed.get(name) != version and name not in self._shipped:
                    await self._place(name, version)
            self._seen = changes

    async def _place(self, name: str, version: str) -> None:
        source = await self._records.source(name, version)
        if source is None:
            return
        try:
            self._catalog.put(await asyncio.to_thread(_load, name, source, self._catalog))
        except BrokenWorkflow as error:
            # It was sound when it was put: this process knows other base models, or is of another version.
            log.error("workflow not taken", extra={"workflow": name, "error": error.message})
            self._catalog.drop(name)
        self._placed[name] = version

    def _require_name(self, name: str) -> None:
        if not _NAME.fullmatch(name):
            details = {"parameter": "name", "value": name[:100], "allowed": "lower case letters, digits and dashes, at most 63"}
            raise Unprocessable("That is no name for a workflow.", code="invalid_parameter", details=details)
        if name in self._shipped:
            hint = "Choose another name; folders of WORKFLOWS_DIR replace what ships."
            raise Conflict(f"{name!r} comes from a folder of this deployment.", code="workflow_shipped", hint=hint)
        if name in _TAKEN or name in self._catalog.base_models:
            details = {"parameter": "name", "value": name, "allowed": "no base model's name, and none of " + ", ".join(sorted(_TAKEN))}
            raise Unprocessable(f"The name {name!r} means something else already.", code="invalid_parameter", details=details)

    async def _object_infos(self) -> list[ObjectInfo]:
        """What the instances that are up can do, told apart."""
        versions = {facts.catalog_version for facts in await self._registry.all() if facts.state == "up"}
        found = [await self._registry.object_info(version) for version in sorted(versions)]
        infos: list[ObjectInfo] = [info for info in found if info is not None]
        if not infos:
            raise NoInstance("No instance is up to check the workflow against.", hint="GET /v1/instances says why.")
        return infos


def _write(folder: str, name: str, source: WorkflowSource) -> Path:
    path = Path(folder) / name
    path.mkdir()
    texts = (json.dumps(source.graph, ensure_ascii=False, indent=1), source.bindings, json.dumps(source.example, ensure_ascii=False))
    for file, text in zip(FILES, texts, strict=True):
        (path / file).write_bytes(text.encode())
    return path


def _check(name: str, source: WorkflowSource, catalog: Catalog, rules: RawRules, infos: Sequence[ObjectInfo]) -> Report:
    """The report of the instance that it suits best."""
    with tempfile.TemporaryDirectory() as folder:
        path = _write(folder, name, source)
        try:
            faults = tuple(map(str, judge_graph(source.graph, rules)))
        except WorkflowError as error:
            return Report(path, None, (error.message,), hint=error.hint)
        if faults:
            return Report(path, None, tuple(f"graph.json: {fault}" for fault in faults), hint=NODES_HINT)
        reports = [check_folder(path, catalog.base_models, info) for info in infos]
    best = min(reports, key=lambda report: (len(report.problems), len(report.notes)))
    return best if best.workflow is None or best.problems else _judge(best, best.workflow, rules)


def _judge(report: Report, workflow: Workflow, rules: RawRules) -> Report:
    """What requests make of it is held to the rules of callers' graphs as well."""
    made = (f"{name}: {fault}" for name, graph in report.graphs for fault in judge_graph(graph, rules))
    return Report(report.folder, workflow, tuple(dict.fromkeys([*judge_bindings(workflow, rules), *made])), report.notes, NODES_HINT)


def _load(name: str, source: WorkflowSource, catalog: Catalog) -> Workflow:
    with tempfile.TemporaryDirectory() as folder:
        return load_workflow(_write(folder, name, source), catalog.base_models)
