"""Whether a submitted graph may run, and what to answer when it may not: ComfyUI's error types, messages and shapes.
It converts constants to their declared types in place, as ComfyUI does, and refuses to run anything."""

import inspect
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from local.engine.executor import full_type_name
from local.engine.folders import ModelFolders
from local.engine.nodes import Node, NodeClasses

LONGEST_LISTED_CHOICES = 20
CONVERSIONS = {"INT": int, "FLOAT": float, "STRING": str, "BOOLEAN": bool}

ErrorBody = dict[str, Any]


@dataclass
class Verdict:
    """`error` is None when at least one output may run; `node_errors` can be filled even then."""

    error: ErrorBody | None
    outputs: list[str] = field(default_factory=list)
    node_errors: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class NodeVerdict:
    valid: bool
    errors: list[ErrorBody]


class InputRefused(Exception):
    """One input of one node does not fit."""

    def __init__(self, kind: str, message: str, details: str, **extra_info: Any) -> None:
        super().__init__(details)
        self.body = _error(kind, message, details, **extra_info)


def validate_graph(graph: Any, targets: list[str] | None, classes: NodeClasses, folders: ModelFolders) -> Verdict:
    """Checks every output, or those in `targets`. A graph that is not a dict of dicts raises whatever it raises: ComfyUI answers 500."""
    outputs = []
    for node_id in graph:
        if "class_type" not in graph[node_id]:
            return _refuse_node(node_id, "Cannot execute because a node is missing the class_type property.")
        node_class = classes.get(graph[node_id]["class_type"])
        if node_class is None:
            return _refuse_node(node_id, f"Cannot execute because node {graph[node_id]['class_type']} does not exist.")
        if node_class.OUTPUT_NODE and (targets is None or node_id in targets):
            outputs.append(node_id)
    if not outputs:
        return Verdict(_error("prompt_no_outputs", "Prompt has no outputs", ""))
    return GraphValidation(graph, classes, folders).judge(outputs)


class GraphValidation:
    """One pass over one graph; nodes that several outputs share are judged once."""

    def __init__(self, graph: dict[str, Any], classes: NodeClasses, folders: ModelFolders) -> None:
        self._graph = graph
        self._classes = classes
        self._folders = folders
        self._verdicts: dict[str, NodeVerdict] = {}
        self._in_progress: set[str] = set()

    def judge(self, outputs: list[str]) -> Verdict:
        good = []
        details: list[str] = []
        node_errors: dict[str, Any] = {}
        for output in outputs:
            verdict = self._judge_output(output)
            if verdict.valid:
                good.append(output)
                continue
            details += [f"{error['message']}: {error['details']}" for error in verdict.errors]
            self._collect_errors(output, node_errors)
        if not good:
            error = _error("prompt_outputs_failed_validation", "Prompt outputs failed validation", "\n".join(details))
            return Verdict(error, [], node_errors)
        return Verdict(None, good, node_errors)

    def _judge_output(self, output: str) -> NodeVerdict:
        try:
            return self._judge_node(output)
        except Exception as error:  # noqa: BLE001  boundary: a graph that cannot even be read is the client's error
            body = _error("exception_during_validation", "Exception when validating node", str(error), **_describe(error))
            self._verdicts[output] = NodeVerdict(False, [body])
            return self._verdicts[output]

    def _collect_errors(self, output: str, node_errors: dict[str, Any]) -> None:
        for node_id, verdict in self._verdicts.items():
            if verdict.errors:
                class_type = self._graph[node_id]["class_type"]
                entry = node_errors.setdefault(node_id, {"errors": verdict.errors, "dependent_outputs": [], "class_type": class_type})
                entry["dependent_outputs"].append(output)

    def _judge_node(self, node_id: str) -> NodeVerdict:
        if node_id in self._verdicts:
            return self._verdicts[node_id]
        if node_id in self._in_progress:
            return NodeVerdict(False, [])  # a cycle is refused without a reason, as recorded
        inputs = self._graph[node_id]["inputs"]
        node_class = self._classes[self._graph[node_id]["class_type"]]
        self._in_progress.add(node_id)
        errors: list[ErrorBody] = []
        sources_valid = True
        declared = node_class.INPUT_TYPES(self._folders)
        for name, required, config in _declared(declared):
            try:
                sources_valid &= self._judge_input(name, required, config, inputs, _spared_inputs(node_class))
            except InputRefused as refused:
                errors.append(refused.body)
        errors += self._ask_node(node_class, inputs)
        self._verdicts[node_id] = NodeVerdict(sources_valid and not errors, errors)
        return self._verdicts[node_id]

    def _judge_input(self, name: str, required: bool, config: list[Any], inputs: dict[str, Any], spared: "set[str] | None") -> bool:
        """False when the fault lies in the node that this input is linked to."""
        if name not in inputs:
            if required:
                raise InputRefused("required_input_missing", "Required input is missing", name, input_name=name)
            return True
        value = inputs[name]
        if isinstance(value, list):
            return self._judge_link(name, config, value)
        inputs[name] = value = _convert(name, config, value)
        if spared is not None and name not in spared:
            _check_range(name, config, value)
            _check_choice(name, config, value)
        return True

    def _judge_link(self, name: str, config: list[Any], link: list[Any]) -> bool:
        if len(link) != 2:
            message = "Bad linked input, must be a length-2 list of [node_id, slot_index]"
            raise InputRefused("bad_linked_input", message, name, input_name=name, input_config=config, received_value=link)
        received = self._classes[self._graph[link[0]]["class_type"]].RETURN_TYPES[link[1]]
        if not _fits(received, config[0]):
            raise InputRefused(
                "return_type_mismatch",
                "Return type mismatch between linked nodes",
                f"{name}, received_type({received}) mismatch input_type({config[0]})",
                input_name=name,
                input_config=config,
                received_type=received,
                linked_node=link,
            )
        try:
            return self._judge_node(link[0]).valid
        except Exception as error:  # noqa: BLE001  boundary: the linked node cannot be read; it carries the error
            info = {"input_name": name, "input_config": config, "exception_message": str(error), **_describe(error), "linked_node": link}
            body = _error("exception_during_inner_validation", "Exception when validating inner node", str(error), **info)
            self._verdicts[link[0]] = NodeVerdict(False, [body])
            return False

    def _ask_node(self, node_class: type[Node], inputs: dict[str, Any]) -> list[ErrorBody]:
        """The node's own opinion on its constant inputs."""
        spared = _spared_inputs(node_class)
        constants = {
            name: value
            for name, value in inputs.items()
            if not isinstance(value, list) and (spared is None or name in spared)
        }  # fmt: skip
        if not constants:
            return []
        complaint = node_class.validate(self._folders, **constants)
        if complaint is None:
            return []
        message = "Custom validation failed for node"
        return [_error("custom_validation_failed", message, f"{name} - {complaint}", input_name=name) for name in constants]


def _declared(declared: dict[str, dict[str, Any]]) -> Iterator[tuple[str, bool, list[Any]]]:
    """(name, required, [type, options]) of each input that a graph may give."""
    for category in ("required", "optional"):
        for name, config in declared.get(category, {}).items():
            yield name, category == "required", [config[0], config[1] if len(config) > 1 else {}]


def _spared_inputs(node_class: type[Node]) -> "set[str] | None":
    """The inputs that the node judges itself: those its own `validate` names; None when that takes all of them."""
    if getattr(node_class.validate, "__func__", None) is getattr(Node.validate, "__func__", None):
        return set()
    parameters = inspect.signature(node_class.validate).parameters.values()
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return {parameter.name for parameter in parameters if parameter.name != "folders"}


def _convert(name: str, config: list[Any], value: Any) -> Any:
    if isinstance(value, dict) and "__value__" in value:
        value = value["__value__"]  # how a constant list is told from a link
    if not isinstance(config[0], str) or config[0] not in CONVERSIONS:
        return value
    try:
        return CONVERSIONS[config[0]](value)
    except (TypeError, ValueError, OverflowError) as error:
        raise InputRefused(
            "invalid_input_type",
            f"Failed to convert an input value to a {config[0]} value",
            f"{name}, {value}, {error}",
            input_name=name,
            input_config=config,
            received_value=value,
            exception_message=str(error),
        ) from error


def _check_range(name: str, config: list[Any], value: Any) -> None:
    info = {"input_name": name, "input_config": config, "received_value": value}
    if "min" in config[1] and value < config[1]["min"]:
        raise InputRefused("value_smaller_than_min", f"Value {value} smaller than min of {config[1]['min']}", name, **info)
    if "max" in config[1] and value > config[1]["max"]:
        raise InputRefused("value_bigger_than_max", f"Value {value} bigger than max of {config[1]['max']}", name, **info)


def _check_choice(name: str, config: list[Any], value: Any) -> None:
    choices = config[0]
    if not isinstance(choices, list) or value in choices:
        return
    short = len(choices) <= LONGEST_LISTED_CHOICES
    listed = str(choices) if short else f"(list of length {len(choices)})"
    info = {"input_name": name, "input_config": config if short else None, "received_value": value}
    raise InputRefused("value_not_in_list", "Value not in list", f"{name}: '{value}' not in {listed}", **info)


def _fits(received: Any, wanted: Any) -> bool:
    """Types may be comma separated alternatives; a combo fits only the same combo, and "*" fits all."""
    if received == wanted or "*" in (received, wanted):
        return True
    if not isinstance(received, str) or not isinstance(wanted, str):
        return False
    return not {kind.strip() for kind in received.split(",")}.isdisjoint(kind.strip() for kind in wanted.split(","))


def _describe(error: Exception) -> dict[str, Any]:
    return {"exception_type": full_type_name(type(error)), "traceback": traceback.format_tb(error.__traceback__)}


def _error(kind: str, message: str, details: str, **extra_info: Any) -> ErrorBody:
    return {"type": kind, "message": message, "details": details, "extra_info": extra_info}


def _refuse_node(node_id: str, message: str) -> Verdict:
    return Verdict(_error("invalid_prompt", message, f"Node ID '#{node_id}'"))
