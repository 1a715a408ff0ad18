"""Bindings: `"Node title.input" = "{{ expression }}"`, resolved against a graph and compiled. Knows titles and inputs, no classes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from comfy_workflows.errors import MOST_FAULTS_SHOWN, BrokenWorkflow, find_nearest, quote
from comfy_workflows.expressions import Expression, ExpressionError, is_expression
from comfy_workflows.graph import LARGEST_NUMBER, LORA_LOADERS, Graph, find_by_title, is_link, title_of
from comfy_workflows.parameters import Parameter

# What every expression may read besides the workflow's own parameters.
CONTEXT_NAMES = ("job_id", "base_model", "lora_count")


@dataclass(frozen=True)
class Binding:
    """One leaf of the graph and what is set on it: a compiled expression, or a literal."""

    target: str
    node_id: str
    input: str
    expression: Expression | None
    literal: Any = None

    def evaluate(self, context: Mapping[str, Any]) -> Any:
        """The value to set: text, a number or a boolean. Raises ExpressionError for anything else."""
        value = self.literal if self.expression is None else self.expression.evaluate(context)
        # A list would be taken for a link and an object for a wrapped one: neither may come out of a request.
        if not isinstance(value, str | int | float):
            raise ExpressionError(f"gives {quote(value)}; an input takes text, a number or a boolean")
        if isinstance(value, int) and abs(value) >= LARGEST_NUMBER:
            raise ExpressionError(f"gives {quote(value)}, which is no number ComfyUI takes")
        if isinstance(value, float) and value - value != 0:
            raise ExpressionError(f"gives {value}, which JSON cannot hold")
        return value


def bind(
    workflow: str, graph: Graph, targets: Mapping[str, Any], parameters: Mapping[str, Parameter], lora_node_id: str | None
) -> tuple[Binding, ...]:
    """Resolves and compiles every binding. Raises BrokenWorkflow with all that is wrong, unbound parameters included."""
    known = (*parameters, *CONTEXT_NAMES)
    bindings: list[Binding] = []
    problems: list[str] = []
    hint: str | None = None
    for target, source in targets.items():
        try:
            bindings.append(_bind_one(workflow, graph, target, source, known, lora_node_id))
        except (ExpressionError, LookupError) as error:
            problems.append(f"bindings.toml: {target!r}: {error.args[0]}")
        except BrokenWorkflow as error:
            problems += [f"bindings.toml: {target!r}: {problem}" for problem in error.details["problems"]]
            hint = hint or error.hint
        if len(problems) >= MOST_FAULTS_SHOWN:
            break
    if not problems:
        problems += _find_unused_parameters(bindings, parameters)
    if problems:
        raise BrokenWorkflow(workflow, problems, hint=hint)
    return tuple(bindings)


def _bind_one(workflow: str, graph: Graph, target: str, source: Any, known: tuple[str, ...], lora_node_id: str | None) -> Binding:
    title, name = _split_target(graph, target)
    node_id = find_by_title(graph, title, workflow=workflow)
    inputs = graph[node_id]["inputs"]
    if name not in inputs:
        nearest = find_nearest(name, inputs)
        raise LookupError(
            f"node {title!r} has no input {name!r}; "
            + (f"the nearest is {nearest!r}" if nearest else f"it has {', '.join(inputs) or 'none'}")
        )
    if is_link(inputs[name]):
        raise LookupError(f"input {name!r} of node {title!r} is a link to node {inputs[name][0]}; only a value can be bound")
    if node_id == lora_node_id and name in _set_by_loras(graph[node_id]["class_type"]):
        raise LookupError(f"input {name!r} of node {title!r} is set from the request's loras")
    if not is_expression(source):
        return Binding(target, node_id, name, None, source)
    expression = Expression(source)
    for read in sorted(expression.names - set(known)):
        nearest = find_nearest(read, known)
        raise LookupError(
            f"{source!r} reads {read!r}, which is no parameter; "
            + (f"the nearest is {nearest!r}" if nearest else f"known: {', '.join(known)}")
        )
    return Binding(target, node_id, name, expression)


def _split_target(graph: Graph, target: str) -> tuple[str, str]:
    """Titles and inputs may hold dots themselves: the longest part that is a title wins, else the last dot divides."""
    titles = {title_of(node) for node in graph.values()}
    parts = target.split(".")
    for count in range(len(parts) - 1, 0, -1):
        if ".".join(parts[:count]) in titles:
            return ".".join(parts[:count]), ".".join(parts[count:])
    title, dot, name = target.rpartition(".")
    if not dot:
        raise LookupError('a binding is written "Node title.input"')
    return title, name


def _set_by_loras(class_type: str) -> set[str]:
    return {"lora_name", *(f"strength_{name}" for name in LORA_LOADERS[class_type])}


def _find_unused_parameters(bindings: list[Binding], parameters: Mapping[str, Parameter]) -> list[str]:
    read = {name for binding in bindings if binding.expression for name in binding.expression.names}
    return [
        f'bindings.toml: parameters.{name}: no binding reads it; bind it, or declare consumer = "gateway"'
        for name, parameter in parameters.items()
        if parameter.consumer == "graph" and name not in read
    ]
