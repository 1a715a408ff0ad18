"""Graphs that callers bring themselves: what they may hold, and the form in which they are run. Pure; it knows no instance.

ComfyUI opens any path it is given, so nothing here trusts it to refuse one: classes are those of an allow-list, files are choices or
assets, and pictures are saved under the job's own name.
"""

import math
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from itertools import islice
from typing import Any

from comfy_workflows.catalog import Catalog
from comfy_workflows.errors import MOST_FAULTS_SHOWN, EditorGraph, InvalidGraph, MissingAsset, find_nearest, quote, shorten
from comfy_workflows.graph import LARGEST_NUMBER, Graph, Problem, check_structure, is_link, title_of
from comfy_workflows.workflow import Workflow

MAX_NODES = 1000
MAX_TITLE = 200
ASSET = "core/ASSET"
_NODE_ID = re.compile(r"[A-Za-z0-9_:.\-]{1,64}")
_INPUT_NAME = re.compile(r"[A-Za-z0-9_ :.\-]{1,128}")
# ComfyUI reads `name [output]` as a file of that folder.
_ANNOTATED = re.compile(r"\[\w*\]\s*$")
_ABSOLUTE = re.compile(r"\s*([/\\~]|[A-Za-z]:|[A-Za-z][A-Za-z0-9+.\-]*:/)")
PREFIX_INPUTS = ("filename_prefix", "prefix")


@dataclass(frozen=True)
class AssetUse:
    """An input that stands for an uploaded file: by the id of a `core/ASSET`, or by the name it was uploaded under."""

    node_id: str
    input: str
    asset_id: str | None = None
    name: str | None = None


@dataclass(frozen=True)
class RawRules:
    """What a raw graph may hold. `files` and `texts` are (class, input) pairs."""

    classes: frozenset[str]
    files: frozenset[tuple[str, str]]
    texts: frozenset[tuple[str, str]]

    def with_classes(self, *more: str) -> "RawRules":
        return RawRules(self.classes | set(more), self.files, self.texts)


@cache
def read_rules() -> RawRules:
    """The rules that ship, from raw_nodes.toml."""
    data = tomllib.loads((files("comfy_workflows") / "raw_nodes.toml").read_text(encoding="utf-8"))

    def pairs(table: Mapping[str, list[str]]) -> frozenset[tuple[str, str]]:
        return frozenset((class_type, name) for class_type, names in table.items() for name in names)

    return RawRules(frozenset(data["classes"]), pairs(data["files"]), pairs(data["texts"]))


def prepare_raw(workflow: Any, rules: RawRules, *, job_id: str) -> tuple[Graph, list[AssetUse]]:
    """The graph to run and the assets it stands in for, whose inputs still hold what the caller wrote.

    Everything ComfyUI does not need is gone, and files are saved below `job_id`. Raises InvalidGraph with every problem,
    EditorGraph for an export in the editor's own format, MissingAsset for a reference that names no asset.
    """
    graph = _read_shape(workflow)
    problems = _judge_names(graph) or check_structure(_without_references(graph)) or list(_judge_nodes(graph, rules))
    if problems:
        raise _refuse(problems)
    assets = list(_find_assets(graph, rules))
    return {node_id: _clean_node(node, job_id) for node_id, node in graph.items()}, assets


def judge_graph(graph: Graph, rules: RawRules) -> list[Problem]:
    """What is wrong with a graph that names no assets, as a workflow's. Raises InvalidGraph, EditorGraph for what is no graph at all."""
    graph = _read_shape(graph)
    return _judge_names(graph) or check_structure(graph) or list(islice(_judge_nodes(graph, rules), MOST_FAULTS_SHOWN))


def judge_bindings(workflow: Workflow, rules: RawRules) -> list[str]:
    """Bindings by which a request could name a file of its own: what it says there is judged by nobody."""
    pictures = {image.name for image in workflow.images}
    texts = {name for name, parameter in workflow.parameters.items() if parameter.type == "string"}
    problems: list[str] = []
    for binding in workflow.bindings:
        read = binding.expression.names if binding.expression else frozenset()
        names_file = (workflow.graph[binding.node_id]["class_type"], binding.input) in rules.files
        if names_file and read and not (len(read) == 1 and read <= pictures):
            problems.append(f"bindings.toml: {binding.target!r}: this input names a file; bind one parameter of type image")
        elif binding.input in PREFIX_INPUTS and read & texts:
            problems.append(f"bindings.toml: {binding.target!r}: a text of a request cannot become part of a path")
    return problems


def _read_shape(workflow: Any) -> Graph:
    if not isinstance(workflow, dict) or not workflow:
        raise _refuse([_whole("it must be an object of nodes")])
    if "nodes" in workflow and "links" in workflow:
        raise EditorGraph()
    if isinstance(workflow.get("prompt"), dict) and "class_type" not in workflow["prompt"]:
        raise _refuse([_whole('it is the body of a POST to /prompt; send only what stands under "prompt"')])
    if len(workflow) > MAX_NODES:
        raise _refuse([_whole(f"it has {len(workflow)} nodes; at most {MAX_NODES} are taken")])
    return workflow


def _refuse(problems: Sequence[Problem]) -> InvalidGraph:
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    by_node: dict[str, list[dict[str, Any]]] = {}
    for problem in problems[:MOST_FAULTS_SHOWN]:
        if problem.node_id is not None:
            by_node.setdefault(problem.node_id, []).append({"field": problem.input, "reason": problem.code, "message": problem.message})
    return InvalidGraph(f"the workflow cannot be run: {problems[0]}{more}", details={"node_errors": by_node})


def _whole(message: str) -> Problem:
    return Problem(None, None, None, None, "invalid_prompt", message)


def _judge_names(graph: Graph) -> list[Problem]:
    """Before anything is quoted or looked up: ids and input names are short and plain."""
    problems = [_whole(f"{quote(node_id)} is no node id") for node_id in graph if not _NODE_ID.fullmatch(node_id)]
    for node_id, node in graph.items():
        inputs = node.get("inputs") if isinstance(node, dict) else None
        for name in inputs if isinstance(inputs, dict) else ():
            if not _INPUT_NAME.fullmatch(name):
                problems.append(Problem(shorten(node_id), None, None, None, "invalid_prompt", f"{quote(name)} is no input's name"))
    return problems


def _without_references(graph: Graph) -> Graph:
    """For the structure check alone, which knows links and literals."""
    return {
        node_id: {**node, "inputs": {name: None if _is_reference(value) else value for name, value in node["inputs"].items()}}
        if isinstance(node, dict) and isinstance(node.get("inputs"), dict)
        else node
        for node_id, node in graph.items()
    }


def _is_reference(value: Any) -> bool:
    return isinstance(value, dict) and value.get("__type") == ASSET


def _judge_nodes(graph: Graph, rules: RawRules) -> Iterator[Problem]:
    for node_id, node in graph.items():
        class_type = node["class_type"]
        title = _clean_title(node)
        if class_type not in rules.classes:
            nearest = find_nearest(class_type, rules.classes)
            said = f"the node class {quote(class_type)} is not allowed in callers' graphs here" + (
                f" (nearest: {nearest})" if nearest else ""
            )
            yield Problem(node_id, title, shorten(class_type), None, "class_not_allowed", said)
            continue
        for name, value in node["inputs"].items():
            if fault := _judge_value(class_type, name, value, rules):
                yield Problem(node_id, title, class_type, name, *fault)


def _judge_value(class_type: str, name: str, value: Any, rules: RawRules) -> tuple[str, str] | None:
    """(code, message) when the value may not stand there."""
    names_file = (class_type, name) in rules.files
    if is_link(value):
        # A text that another node makes cannot be judged here.
        return ("link_not_allowed", "this input takes no link") if names_file or name in PREFIX_INPUTS else None
    if _is_reference(value):
        return None if names_file else ("asset_not_allowed", "this input takes no asset")
    if isinstance(value, str):
        return _judge_text(class_type, name, value, rules)
    if isinstance(value, dict):
        # ComfyUI unwraps {"__value__": ...}, and nothing else of this kind has a meaning.
        return "invalid_input_type", "an object is no value; only links, texts, numbers, true, false, null and assets are"
    if (isinstance(value, float) and not math.isfinite(value)) or (isinstance(value, int) and abs(value) >= LARGEST_NUMBER):
        return "invalid_input_type", f"{quote(value)} is no number ComfyUI takes"
    return ("invalid_input_type", f"{quote(value)} is no text") if names_file or name in PREFIX_INPUTS else None


def _judge_text(class_type: str, name: str, value: str, rules: RawRules) -> tuple[str, str] | None:
    if not _is_storable(value):
        return "invalid_input_type", "a text must be plain Unicode, without lone surrogates and NUL"
    if (class_type, name) in rules.texts:
        return None
    if (class_type, name) in rules.files and (not value or set(value) & set("/\\\n\r") or value in (".", "..")):
        return "path_not_allowed", f"{quote(value)} is no plain file name; upload the file as an asset and name that"
    if _looks_like_path(value) or (name in PREFIX_INPUTS and not value.isprintable()):
        return "path_not_allowed", f"{quote(value)} leads out of ComfyUI's folders"
    return None


def _is_storable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in text


def _looks_like_path(text: str) -> bool:
    """Absolute, upward, or annotated with another folder. Plain subfolders of a choice, as in `flux/dev.safetensors`, are none."""
    parts = re.split(r"[/\\]", text)
    return bool(_ABSOLUTE.match(text) or _ANNOTATED.search(text) or any(part.strip() == ".." for part in parts))


def _find_assets(graph: Graph, rules: RawRules) -> Iterator[AssetUse]:
    for node_id, node in graph.items():
        for name, value in node["inputs"].items():
            if _is_reference(value):
                info = value.get("info")
                asset_id = info.get("id") if isinstance(info, dict) else None
                if not isinstance(asset_id, str) or not _is_storable(asset_id):
                    raise MissingAsset(node_id, name, asset_id)
                yield AssetUse(node_id, name, asset_id=asset_id)
            elif (node["class_type"], name) in rules.files:
                yield AssetUse(node_id, name, name=value)


def _clean_node(node: Mapping[str, Any], job_id: str) -> dict[str, Any]:
    """What ComfyUI reads, and the title for errors. Keys of its own bookkeeping (`is_changed`) would be believed."""
    inputs = {name: f"{job_id}/{value}" if name in PREFIX_INPUTS else value for name, value in node["inputs"].items()}
    title = _clean_title(node)
    return {"class_type": node["class_type"], "inputs": inputs, **({"_meta": {"title": title}} if title else {})}


def _clean_title(node: Mapping[str, Any]) -> str | None:
    title = title_of(node)
    return title if title and len(title) <= MAX_TITLE and title.isprintable() else None


def allow_nodes(catalog: Catalog, more: Iterable[str] = ()) -> RawRules:
    """The rules that ship, with the classes of a catalogue's own workflows and further ones."""
    graphs = (catalog.get(name).graph for name in catalog.names())
    return read_rules().with_classes(*(str(node["class_type"]) for graph in graphs for node in graph.values()), *more)
