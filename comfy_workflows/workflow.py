"""One workflow folder, loaded: a graph with its bindings compiled, and the model of its requests.

It knows how a folder becomes a Workflow and a request becomes a Filled one; it draws no graph (see render) and no random number.
"""

import hashlib
import json
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from comfy_workflows.base_models import BaseModelInfo
from comfy_workflows.binding import Binding, bind
from comfy_workflows.errors import BrokenWorkflow, FamilyMismatch, UnknownBaseModel
from comfy_workflows.expressions import Expression, ExpressionError, is_expression
from comfy_workflows.graph import Graph, check_structure, find_by_title, find_sinks, require_lora_loader
from comfy_workflows.parameters import Parameter
from comfy_workflows.request_model import MAX_LORAS, LoraRequest, build_request_model, explain

FILES = ("graph.json", "bindings.toml", "example.json")
MOST_DOTS = 100
EXPORT_HINT = (
    "export it in API format: in the editor choose the menu Workflow -> Export (API); "
    "in older versions enable the Dev mode options in the settings, then press Save (API Format)"
)


@dataclass(frozen=True)
class Filled:
    """A request with nothing left open: every parameter has its value, the seed is drawn. `values` is JSON-able.

    Pictures are as the request names them, None for a mask it left out: `render` wants the names of their files instead.
    """

    workflow: str
    base_model: BaseModelInfo
    values: dict[str, Any]
    loras: tuple[LoraRequest, ...]


@dataclass(frozen=True, eq=False)
class Workflow:
    """A loaded folder. Two of them are never equal: `version` compares what they say."""

    name: str
    title: str
    description: str
    version: str
    families: tuple[str, ...]
    parameters: dict[str, Parameter]
    graph: Graph
    bindings: tuple[Binding, ...]
    request_model: type[BaseModel]
    example: dict[str, Any]
    lora_node: str | None
    lora_node_id: str | None
    output_ids: frozenset[str]
    base_models: Mapping[str, BaseModelInfo]
    # By base model: the value of each parameter that a request leaves out (seeds are not among them).
    defaults: Mapping[str, Mapping[str, Any]]
    max_loras: int = MAX_LORAS

    @cached_property
    def images(self) -> tuple[Parameter, ...]:
        """The parameters that are pictures, masks behind the pictures they are of."""
        found = [parameter for parameter in self.parameters.values() if parameter.type == "image"]
        return tuple(sorted(found, key=lambda parameter: parameter.mask_of is not None))

    @cached_property
    def _schema(self) -> dict[str, Any]:
        return self.request_model.model_json_schema()

    def json_schema(self) -> dict[str, Any]:
        """The JSON schema of a request body."""
        return json.loads(json.dumps(self._schema))  # type: ignore[no-any-return]

    def fitting_base_models(self) -> list[str]:
        """The base models whose family the workflow is made for, sorted; empty when it loads none."""
        return sorted(name for name, known in self.base_models.items() if known.family in self.families)

    def fill(self, params: Mapping[str, Any], *, default_base_model: str, draw_seed: Callable[[], int]) -> Filled:
        """Validates a request and completes it. `draw_seed` gives 0 to 2**63 - 1.

        Raises InvalidParameter or UnknownParameter (all faults at once), UnknownBaseModel, FamilyMismatch.
        """
        try:
            request = self.request_model.model_validate(dict(params))
        except ValidationError as error:
            raise explain(error, self.name, self.parameters, self.request_model) from error
        given = {name: getattr(request, name) for name in request.model_fields_set}
        base_model = self._choose_base_model(given.pop("base_model", default_base_model))
        loras = tuple(given.pop("loras", ()))
        values = {**self.defaults[base_model.name], **given}
        for name, parameter in self.parameters.items():
            if parameter.type == "seed" and values.get(name, -1) == -1:
                values[name] = draw_seed()
        return Filled(self.name, base_model, {name: values.get(name) for name in self.parameters}, loras)

    def _choose_base_model(self, name: str) -> BaseModelInfo:
        # A workflow that loads no base model runs under the deployment's default, whatever its family.
        fitting = self.fitting_base_models()
        if name not in self.base_models:
            raise UnknownBaseModel(name, fitting or self.base_models)
        chosen = self.base_models[name]
        if self.families and chosen.family not in self.families:
            hint = f"base models that fit: {', '.join(fitting) or 'none'}"
            raise FamilyMismatch("base model", name, chosen.family, wanted_by=f"workflow {self.name!r}", wanted=self.families, hint=hint)
        return chosen


class _Loras(BaseModel):
    model_config = ConfigDict(extra="forbid")

    node: str = Field(min_length=1)


class _BindingFile(BaseModel):
    """`bindings.toml` as written; parameters are read one by one so that each fault names its own."""

    model_config = ConfigDict(extra="forbid")

    title: str = Field(max_length=200)
    description: str = Field("", max_length=5000)
    families: tuple[str, ...] = Field((), max_length=100)
    outputs: tuple[str, ...] = Field((), max_length=100)
    parameters: dict[str, dict[str, Any]] = Field({}, max_length=100)
    bindings: dict[str, str | bool | int | float] = Field(max_length=500)
    loras: _Loras | None = None


def load_workflow(folder: Path, base_models: Mapping[str, BaseModelInfo]) -> Workflow:
    """Reads and compiles one folder. Raises BrokenWorkflow with all problems of the first stage that has any."""
    name = folder.name
    graph_bytes, bindings_bytes, example_bytes = (_read_bytes(folder, file) for file in FILES)
    graph = _read_graph(name, graph_bytes)
    file = _read_bindings(name, bindings_bytes)
    parameters = _read_parameters(name, file)
    example = _read_example(name, example_bytes)
    lora_node_id = _find_lora_node(name, graph, file)
    fitting = {key: known for key, known in base_models.items() if not file.families or known.family in file.families}
    choices = list(fitting) if file.families else []
    return Workflow(
        name=name,
        title=file.title,
        description=file.description,
        version=hashlib.sha256(b"\0".join((graph_bytes, bindings_bytes, example_bytes))).hexdigest()[:12],
        families=file.families,
        parameters=parameters,
        graph=graph,
        bindings=bind(name, graph, file.bindings, parameters, lora_node_id),
        request_model=build_request_model(name, parameters, base_models=choices, takes_loras=lora_node_id is not None, example=example),
        example=example,
        lora_node=file.loras.node if file.loras else None,
        lora_node_id=lora_node_id,
        output_ids=frozenset([find_by_title(graph, title, workflow=name) for title in file.outputs] or find_sinks(graph)),
        base_models=base_models,
        defaults=_compute_defaults(name, parameters, fitting),
    )


def _read_bytes(folder: Path, name: str) -> bytes:
    try:
        return (folder / name).read_bytes()
    except OSError as error:
        raise BrokenWorkflow(
            folder.name, [f"{name}: {error.strerror or error}"], hint="a workflow is graph.json, bindings.toml and example.json"
        ) from error


def _read_json(workflow: str, name: str, content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise BrokenWorkflow(workflow, [f"{name}: not JSON: {error}"]) from error


def _read_graph(workflow: str, content: bytes) -> Graph:
    graph = _read_json(workflow, "graph.json", content)
    if not isinstance(graph, dict) or not graph:
        raise BrokenWorkflow(workflow, ["graph.json: must be an object of nodes"], hint=EXPORT_HINT)
    if "nodes" in graph and "links" in graph:
        raise BrokenWorkflow(workflow, ["graph.json: is in the editor's own format, which ComfyUI does not run"], hint=EXPORT_HINT)
    if isinstance(graph.get("prompt"), dict) and "class_type" not in graph["prompt"]:
        raise BrokenWorkflow(workflow, ["graph.json: is the body of a POST to /prompt"], hint='keep only what stands under "prompt"')
    if problems := check_structure(graph):
        raise BrokenWorkflow(workflow, [f"graph.json: {problem}" for problem in problems], hint=EXPORT_HINT)
    return graph


def _read_example(workflow: str, content: bytes) -> dict[str, Any]:
    example = _read_json(workflow, "example.json", content)
    if not isinstance(example, dict):
        raise BrokenWorkflow(workflow, ["example.json: must be an object, the body of a request"])
    return example


def _read_bindings(workflow: str, content: bytes) -> _BindingFile:
    # tomllib's memory grows with the square of a dotted key's length: 180 KB of `a.a.a` take 32 GB.
    if any(line.count(b".") > MOST_DOTS for line in content.splitlines()):
        raise BrokenWorkflow(workflow, [f"bindings.toml: a line holds more than {MOST_DOTS} dots"])
    try:
        return _BindingFile.model_validate(tomllib.loads(content.decode("utf-8")))
    except ValidationError as error:
        raise BrokenWorkflow(workflow, _describe_faults("", error)) from error
    except (ValueError, RecursionError) as error:
        raise BrokenWorkflow(workflow, [f"bindings.toml: {error}"]) from error


def _read_parameters(workflow: str, file: _BindingFile) -> dict[str, Parameter]:
    parameters: dict[str, Parameter] = {}
    problems: list[str] = []
    for name, table in file.parameters.items():
        try:
            parameters[name] = Parameter.model_validate({**table, "name": name})
        except ValidationError as error:
            problems += _describe_faults(f"parameters.{name}.", error)
    for name, parameter in parameters.items():
        of = parameters.get(parameter.mask_of or "")
        if parameter.mask_of is not None and (of is None or of.type != "image" or of.mask_of is not None):
            problems.append(f"bindings.toml: parameters.{name}.mask_of: {parameter.mask_of!r} is no picture among the parameters")
    if problems:
        raise BrokenWorkflow(workflow, problems)
    return parameters


def _describe_faults(prefix: str, error: ValidationError) -> list[str]:
    places = [prefix + ".".join(map(str, fault["loc"])) for fault in error.errors()]
    return [f"bindings.toml: {place.rstrip('.')}: {fault['msg']}" for place, fault in zip(places, error.errors(), strict=True)]


def _find_lora_node(workflow: str, graph: Graph, file: _BindingFile) -> str | None:
    if file.loras is None:
        return None
    node_id = find_by_title(graph, file.loras.node, workflow=workflow)
    require_lora_loader(graph, node_id, workflow=workflow)
    return node_id


def _compute_defaults(
    workflow: str, parameters: Mapping[str, Parameter], base_models: Mapping[str, BaseModelInfo]
) -> dict[str, dict[str, Any]]:
    """Every default for every base model, so that a default that cannot be sent is found at load and not by a caller."""
    expressions: dict[str, Expression] = {}
    defaults: dict[str, dict[str, Any]] = {}
    try:
        for name, parameter in parameters.items():
            if is_expression(parameter.default):
                expressions[name] = Expression(str(parameter.default))
        for key, base_model in base_models.items():
            found = {name: parameter.default for name, parameter in parameters.items() if parameter.default is not None}
            for name, expression in expressions.items():
                found[name] = expression.evaluate({"base_model": base_model})
                parameters[name].validate_value(found[name])
            defaults[key] = found
    except ExpressionError as error:
        raise BrokenWorkflow(workflow, [f"bindings.toml: parameters.{name}.default: {error}"]) from error
    except ValueError as error:
        raise BrokenWorkflow(workflow, [f"bindings.toml: parameters.{name}: for base model {key!r} {error}"]) from error
    return defaults
