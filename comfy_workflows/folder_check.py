"""Checks a workflow folder for its author: loads it, renders it as every request would, compares it with a node catalogue.

A model file that an instance lacks is a note and not a fault: the folder is right, only that instance cannot run it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from comfy_workflows.base_models import BaseModelInfo
from comfy_workflows.errors import BrokenWorkflow, WorkflowError
from comfy_workflows.graph import Graph, LoaderFile, Problem, check, loader_files
from comfy_workflows.node_types import ObjectInfo
from comfy_workflows.render import LoraFile, render
from comfy_workflows.workflow import Workflow, load_workflow


@dataclass(frozen=True)
class Report:
    """What was found in one folder. `hint` says what to press or rename; `workflow` is None when it could not be loaded."""

    folder: Path
    workflow: Workflow | None
    problems: tuple[str, ...]
    notes: tuple[str, ...] = ()
    hint: str | None = None
    graphs: tuple[tuple[str, Graph], ...] = ()  # as exported, and as requests make them


def check_folder(folder: Path, base_models: Mapping[str, BaseModelInfo], object_info: ObjectInfo | None = None) -> Report:
    """Never raises for what the folder holds; every finding is in the report, each one once."""
    try:
        workflow = load_workflow(folder, base_models)
    except BrokenWorkflow as error:
        return Report(folder, None, tuple(error.details["problems"]), hint=error.hint)
    # Keyed by what is wrong: the same fault under every base model is said once, where it showed first.
    problems: dict[str, str] = {}
    notes: dict[str, None] = {}
    graphs = [("graph.json", workflow.graph)]
    for name, params, lora_count in _list_requests(workflow):
        try:
            graphs.append((name, _render_request(workflow, params, lora_count)))
        except WorkflowError as error:
            for text in _list_faults(error):
                problems.setdefault(text, name)
    if object_info is not None and not problems:
        for name, graph in graphs:
            found, missing = _compare(graph, object_info)
            for problem in found:
                problems.setdefault(str(problem), name)
            notes |= dict.fromkeys(f"not on this ComfyUI: {file.value} ({file.class_type}.{file.input})" for file in missing)
    return Report(folder, workflow, tuple(f"{name}: {text}" for text, name in problems.items()), tuple(notes), graphs=tuple(graphs))


def _list_faults(error: WorkflowError) -> list[str]:
    if "parameters" in error.details:
        return [fault["message"] for fault in error.details["parameters"]]
    return list(error.details.get("problems", [error.message]))


def _list_requests(workflow: Workflow) -> Iterator[tuple[str, dict[str, Any], int]]:
    """(name, request, number of LoRAs): the example as it is, and under every base model, with no LoRA, one, and as many as are allowed."""
    if "base_model" in workflow.example or not workflow.fitting_base_models():
        yield "example.json", workflow.example, 0
    lora_counts = (0, 1, workflow.max_loras) if workflow.lora_node else (0,)
    for base_model in workflow.fitting_base_models():
        for count in lora_counts:
            params = {name: value for name, value in workflow.example.items() if name != "loras"}
            yield f"example.json with {base_model} and {count} LoRAs", {**params, "base_model": base_model}, count


def _render_request(workflow: Workflow, params: Mapping[str, Any], lora_count: int) -> Graph:
    default = next(iter(workflow.fitting_base_models() or workflow.base_models), "")
    filled = workflow.fill(params, default_base_model=default, draw_seed=lambda: 0)
    filled = replace(filled, values={**filled.values, **{image.name: f"{image.name}.png" for image in workflow.images}})
    file = workflow.graph[workflow.lora_node_id]["inputs"].get("lora_name", "") if workflow.lora_node_id else ""
    return render(workflow, filled, job_id="check", loras=[LoraFile(f"lora-{number}", file, 1.0) for number in range(lora_count)])


def _compare(graph: Graph, object_info: ObjectInfo) -> tuple[list[Problem], list[LoaderFile]]:
    """(faults of the graph, files that this instance lacks)."""
    files = set(loader_files(graph, object_info))
    found: list[Problem] = []
    missing: list[LoaderFile] = []
    for problem in check(graph, object_info):
        file = _find_file(graph, problem)
        if file in files and file is not None:
            missing.append(file)
        else:
            found.append(problem)
    return found, missing


def _find_file(graph: Graph, problem: Problem) -> LoaderFile | None:
    if problem.code != "value_not_in_list" or problem.node_id is None or problem.class_type is None or problem.input is None:
        return None
    return LoaderFile(problem.class_type, problem.input, graph[problem.node_id]["inputs"][problem.input])
