"""Pure functions on graphs in ComfyUI's API format: find, check, chain LoRAs, prune. No argument is ever changed.

It knows nodes, links and titles; it knows nothing of parameters, files on disk or any particular workflow.
"""

import graphlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from comfy_workflows.errors import BrokenWorkflow, find_nearest, quote
from comfy_workflows.node_types import LITERAL_TYPES, NodeType, ObjectInfo, find_value_fault, is_model_file, read_node_type, types_fit

# {node id: {"class_type": str, "inputs": {name: literal | [node id, slot]}, "_meta": {"title": str}}}
Graph = dict[str, Any]

# Numbers are less than this, of either sign: seeds take 64 bits.
LARGEST_NUMBER = 2**64

# The outputs of the loaders that can be chained, by slot: the input that each one passes on.
LORA_LOADERS = {"LoraLoaderModelOnly": ("model",), "LoraLoader": ("model", "clip")}


@dataclass(frozen=True)
class Problem:
    """What ComfyUI would refuse; `code` is its own error type where it has one."""

    node_id: str | None
    title: str | None
    class_type: str | None
    input: str | None
    code: str
    message: str

    def __str__(self) -> str:
        if self.node_id is None:
            return self.message
        place = " ".join(
            filter(None, (f"node {self.node_id}", self.title and quote(self.title), self.class_type and f"({self.class_type})"))
        )
        return f"{place}, input {self.input!r}: {self.message}" if self.input else f"{place}: {self.message}"


class LoaderFile(NamedTuple):
    class_type: str
    input: str
    value: str


def is_link(value: Any) -> bool:
    """ComfyUI takes every list for a link, so no literal may ever be one."""
    return isinstance(value, list)


def copy_graph(graph: Graph) -> Graph:
    """A deep copy; several times faster than copy.deepcopy because JSON has no shared parts."""
    return {node_id: _copy_json(node) for node_id, node in graph.items()}


def _copy_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copy_json(part) for key, part in value.items()}
    return [_copy_json(part) for part in value] if isinstance(value, list) else value


def title_of(node: Any) -> str | None:
    meta = node.get("_meta") if isinstance(node, dict) else None
    title = meta.get("title") if isinstance(meta, dict) else None
    return title if isinstance(title, str) else None


def find_by_title(graph: Graph, title: str, *, workflow: str = "graph") -> str:
    """The id of the only node with that title. Raises BrokenWorkflow when there is none or more than one."""
    found = [node_id for node_id, node in graph.items() if title_of(node) == title]
    if len(found) == 1:
        return found[0]
    if found:
        nodes = ", ".join(f"{node_id} ({graph[node_id].get('class_type')})" for node_id in found)
        hint = "rename all but one of them in the editor and export again"
        raise BrokenWorkflow(workflow, [f"the title {title!r} is ambiguous: nodes {nodes} have it"], hint=hint)
    titles = sorted({known for known in map(title_of, graph.values()) if known is not None})
    nearest = find_nearest(title, titles)
    ending = f"the nearest is {nearest!r}" if nearest else f"the titles are: {', '.join(map(repr, titles)) or 'none'}"
    raise BrokenWorkflow(
        workflow, [f"no node has the title {title!r}; {ending}"], hint="give the node that title in the editor and export again"
    )


def iterate_links(graph: Graph) -> Iterator[tuple[str, str, list[Any]]]:
    """(node id, input, link) for every input that ComfyUI takes for a link."""
    for node_id, node in graph.items():
        for name, value in node["inputs"].items():
            if is_link(value):
                yield node_id, name, value


def is_sound_link(graph: Graph, link: list[Any]) -> bool:
    return len(link) == 2 and isinstance(link[0], str) and link[0] in graph and type(link[1]) is int and link[1] >= 0


def find_sinks(graph: Graph) -> list[str]:
    """The nodes that feed no other node."""
    consumed = {link[0] for _, _, link in iterate_links(graph) if is_sound_link(graph, link)}
    return [node_id for node_id in graph if node_id not in consumed]


def prune(graph: Graph, *, output_ids: Collection[str] = (), output_classes: Collection[str] = ()) -> Graph:
    """The graph without the nodes that none of the given outputs depends on, in the order they had."""
    waiting = [node_id for node_id, node in graph.items() if node_id in output_ids or node["class_type"] in output_classes]
    needed = set(waiting)
    while waiting:
        for value in graph[waiting.pop()]["inputs"].values():
            if is_link(value) and is_sound_link(graph, value) and value[0] not in needed:
                needed.add(value[0])
                waiting.append(value[0])
    return copy_graph({node_id: node for node_id, node in graph.items() if node_id in needed})


def chain_loras(graph: Graph, node_id: str, loras: Sequence[tuple[str, float]]) -> Graph:
    """The graph with its LoRA node repeated once per (file, weight) in that order, or taken out when there is none.

    The first keeps the node's id, the others take new ids and numbered titles; consumers of the node read from the last.
    Raises BrokenWorkflow when the node is no known LoRA loader or its own model or clip is not connected.
    """
    passed = require_lora_loader(graph, node_id)
    original = graph[node_id]
    sources = [original["inputs"][name] for name in passed]
    chained = copy_graph(graph)
    del chained[node_id]
    consumers = [(chained[user]["inputs"], name, link[1]) for user, name, link in iterate_links(chained) if link[:1] == [node_id]]
    for number, ((file, weight), new_id) in enumerate(zip(loras, _name_copies(graph, node_id, len(loras)), strict=True), start=1):
        lora = chained[new_id] = _copy_json(original)
        _set_lora(lora, passed, sources, file, weight)
        if number > 1:
            lora["_meta"] = {**lora.get("_meta", {}), "title": f"{title_of(original) or original['class_type']} {number}"}
        sources = [[new_id, slot] for slot in range(len(passed))]
    for inputs, name, slot in consumers:
        inputs[name] = list(sources[slot])
    return chained


def require_lora_loader(graph: Graph, node_id: str, *, workflow: str = "graph") -> tuple[str, ...]:
    """What the node passes on, by slot. Raises BrokenWorkflow when the node cannot be repeated or taken out."""
    node = graph[node_id]
    passed = LORA_LOADERS.get(node["class_type"])
    place = f"LoRA node {node_id} ({node['class_type']})"
    if passed is None:
        raise BrokenWorkflow(workflow, [f"{place} loads no LoRA; LoRAs need one of {', '.join(LORA_LOADERS)}"])
    for name in passed:
        source = node["inputs"].get(name)
        if not (is_link(source) and is_sound_link(graph, source)):
            raise BrokenWorkflow(workflow, [f"{place}: connect its {name}"])
    if any(link[0] == node_id and link[1] >= len(passed) for _, _, link in iterate_links(graph)):
        raise BrokenWorkflow(workflow, [f"{place} gives only {' and '.join(passed)}, but another node reads more of it"])
    return passed


def _set_lora(node: dict[str, Any], passed: Sequence[str], sources: Sequence[Any], file: str, weight: float) -> None:
    inputs = node["inputs"]
    inputs["lora_name"] = file
    for name, source in zip(passed, sources, strict=True):
        inputs[name] = list(source)
        inputs[f"strength_{name}"] = weight


def _name_copies(graph: Graph, node_id: str, count: int) -> list[str]:
    highest = max((int(known) for known in graph if known.isdecimal()), default=0)
    return [node_id, *(str(highest + number) for number in range(1, count))][:count]


def loader_files(graph: Graph, object_info: ObjectInfo) -> list[LoaderFile]:
    """The model files a graph names, in graph order, each once: what an instance must have to run it."""
    found: dict[LoaderFile, None] = {}
    for node in graph.values():
        node_type = read_node_type(node["class_type"], object_info)
        for name, value in node["inputs"].items():
            declared = node_type.inputs.get(name) if node_type else None
            if declared is not None and isinstance(value, str) and is_model_file(declared, value):
                found[LoaderFile(node["class_type"], name, value)] = None
    return list(found)


def check(graph: Graph, object_info: ObjectInfo) -> list[Problem]:
    """Everything ComfyUI would refuse, and literals where only a link can go. Unused nodes are judged by class alone, as there."""
    problems = check_structure(graph)
    if problems:
        return problems
    types = {node_id: read_node_type(node["class_type"], object_info) for node_id, node in graph.items()}
    problems = [
        _report(graph, node_id, None, "unknown_class", _describe_class(graph[node_id]["class_type"], object_info))
        for node_id, known in types.items()
        if known is None
    ]
    outputs = [node_id for node_id, known in types.items() if known is not None and known.is_output]
    if not outputs:
        problems.append(Problem(None, None, None, None, "prompt_no_outputs", "no node of the graph is an output node (such as SaveImage)"))
    linked_types = {output for entry in object_info.values() for output in entry.get("output", []) if isinstance(output, str)}
    for node_id in prune(graph, output_ids=outputs):
        known = types[node_id]
        if known is not None:
            problems += _check_inputs(graph, node_id, known, types, linked_types - LITERAL_TYPES)
    return problems


def check_structure(graph: Graph) -> list[Problem]:
    """What is wrong without knowing any class: misshapen nodes, links to nowhere, cycles."""
    problems = [
        Problem(str(node_id), title_of(node), None, None, "invalid_prompt", "needs a class_type (text) and inputs (an object)")
        for node_id, node in graph.items()
        if not (isinstance(node, dict) and isinstance(node.get("class_type"), str) and isinstance(node.get("inputs"), dict))
    ]
    if problems:
        return problems
    for node_id, name, link in iterate_links(graph):
        if len(link) != 2:
            problems.append(_report(graph, node_id, name, "bad_linked_input", f"a link is [node id, slot], not {quote(link)}"))
        elif not is_sound_link(graph, link):
            problems.append(_report(graph, node_id, name, "bad_link", f"{quote(link)} points to no node of the graph"))
    cycle = _find_cycle(graph) if not problems else []
    if cycle:
        problems.append(_report(graph, cycle[0], None, "cycle", f"its inputs lead back to itself: {' <- '.join(cycle)}"))
    return problems


def _find_cycle(graph: Graph) -> list[str]:
    links: dict[str, set[str]] = {node_id: set() for node_id in graph}
    for node_id, _, link in iterate_links(graph):
        links[node_id].add(link[0])
    try:
        graphlib.TopologicalSorter(links).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def _check_inputs(
    graph: Graph, node_id: str, node_type: NodeType, types: dict[str, NodeType | None], link_only: set[str]
) -> Iterator[Problem]:
    inputs = graph[node_id]["inputs"]
    for name, declared in node_type.inputs.items():
        if name not in inputs:
            if declared.required and not declared.is_dynamic:
                yield _report(graph, node_id, name, "required_input_missing", f"required input is missing (a {declared.type})")
            continue
        value = inputs[name]
        if is_link(value):
            source = types[value[0]]
            if source is not None and value[1] >= len(source.outputs):
                yield _report(graph, node_id, name, "bad_link", f"{source.class_type} has no output {value[1]}")
            elif source is not None and not types_fit(source.outputs[value[1]], declared.type):
                message = f"a {source.outputs[value[1]]} of {source.class_type} cannot feed a {declared.type}"
                yield _report(graph, node_id, name, "return_type_mismatch", message)
        elif declared.type in link_only:
            yield _report(graph, node_id, name, "link_missing", f"a {declared.type} comes by a link, not as {quote(value)}")
        elif fault := find_value_fault(declared, value):
            yield _report(graph, node_id, name, *fault)


def _report(graph: Graph, node_id: str, name: str | None, code: str, message: str) -> Problem:
    node = graph[node_id]
    return Problem(node_id, title_of(node), node["class_type"], name, code, message)


def _describe_class(class_type: str, object_info: ObjectInfo) -> str:
    nearest = find_nearest(class_type, object_info)
    return f"this ComfyUI has no node class {class_type!r}" + (f" (nearest: {nearest})" if nearest else "")
