"""The body of a generation request as one pydantic model, built from a workflow's declared parameters.

The model validates, it is the JSON schema, and its errors are put into this library's words here. Knows no graph and no node.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictStr, ValidationError, WithJsonSchema, create_model
from pydantic_core import ErrorDetails, PydanticCustomError

from comfy_workflows.errors import InvalidParameter, ParameterFault, UnknownParameter, find_nearest, quote, shorten
from comfy_workflows.expressions import is_expression
from comfy_workflows.parameters import Parameter, annotate, refuse_unsafe_text

MAX_LORAS = 8
LOWEST_LORA_WEIGHT, HIGHEST_LORA_WEIGHT = -4.0, 4.0


class LoraRequest(BaseModel):
    """One LoRA of a request: its public name and how strongly it applies."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[StrictStr, Field(min_length=1, max_length=200), AfterValidator(refuse_unsafe_text)]
    weight: Annotated[float, Field(strict=True, ge=LOWEST_LORA_WEIGHT, le=HIGHEST_LORA_WEIGHT, allow_inf_nan=False)] = 1.0


_LORA_LIMITS = {
    "loras": f"a list of 0 to {MAX_LORAS} LoRAs, none twice, each {{name, weight}}",
    "name": "text of 1 to 200 characters without NUL or unpaired surrogates",
    "weight": f"a number, {LOWEST_LORA_WEIGHT:g} to {HIGHEST_LORA_WEIGHT:g}",
}


def build_request_model(
    workflow: str, parameters: Mapping[str, Parameter], *, base_models: Sequence[str], takes_loras: bool, example: Mapping[str, Any]
) -> type[BaseModel]:
    """The model of a request body: every declared parameter, `base_model` when there is a choice, `loras` when there is a LoRA node."""
    fields: dict[str, Any] = {name: (annotate(parameter), _make_field(parameter, example)) for name, parameter in parameters.items()}
    if base_models:
        named = WithJsonSchema({"type": "string", "enum": sorted(base_models)})
        about = Field(default_factory=str, description="The base model; absent: the deployment's default.")
        fields["base_model"] = (Annotated[StrictStr, AfterValidator(refuse_unsafe_text), named], about)
    if takes_loras:
        listed = Annotated[list[LoraRequest], Field(max_length=MAX_LORAS), AfterValidator(_refuse_duplicates)]
        fields["loras"] = (listed, Field(default_factory=list, description="LoRAs, applied in this order."))
    title = "".join(part.capitalize() for part in workflow.replace("-", "_").split("_"))
    config = ConfigDict(extra="forbid", frozen=True, json_schema_extra={"examples": [dict(example)]} if example else None)
    model: type[BaseModel] = create_model(f"{title}Request", __config__=config, __module__=__name__, **fields)
    return model


def explain(
    error: ValidationError, workflow: str, parameters: Mapping[str, Parameter], model: type[BaseModel]
) -> InvalidParameter | UnknownParameter:
    """A pydantic error in this library's words: every fault names the parameter, its value, what is allowed and the nearest."""
    faults = [_explain_fault(fault, workflow, parameters, model) for fault in error.errors(include_url=False)]
    return UnknownParameter(faults) if faults[0].code == UnknownParameter.code else InvalidParameter(faults)


def _explain_fault(fault: ErrorDetails, workflow: str, parameters: Mapping[str, Parameter], model: type[BaseModel]) -> ParameterFault:
    location = fault["loc"]
    name = str(shorten("".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).lstrip(".")))
    # A field name that is no UTF-8 is refused before it has a place of its own: its owner's location, the name as input.
    unreadable = fault["type"] == "string_unicode" and (not location or isinstance(location[-1], int))
    if unreadable:
        location = (*location, str(shorten(fault["input"])))
        name = ".".join(filter(None, (name, str(location[-1]))))
    if unreadable or fault["type"] == "extra_forbidden":
        known = sorted(model.model_fields) if len(location) == 1 else sorted(LoraRequest.model_fields)
        owner = f"workflow {workflow!r}" if len(location) == 1 else "a LoRA"
        nearest = find_nearest(str(location[-1]), known)
        return ParameterFault(
            UnknownParameter.code, name, f"{quote(name)} is no parameter of {owner}", shorten(fault["input"]), known, nearest
        )
    allowed, nearest_value = _describe_limits(location, fault["input"], parameters, model)
    if fault["type"] == "missing":
        return ParameterFault(InvalidParameter.code, name, f"{name!r} is missing; allowed is {_join(allowed)}", None, allowed, None)
    message = f"{name!r} {_describe_fault(fault)}; allowed is {_join(allowed)}"
    return ParameterFault(InvalidParameter.code, name, message, shorten(fault["input"]), allowed, nearest_value)


def _describe_fault(fault: ErrorDetails) -> str:
    value = fault["input"]
    match fault["type"]:
        case "string_too_long" | "string_too_short":
            return f"has {len(value)} characters"
        case "too_long":
            return f"has {len(value)} entries"
        case "unsafe_text" | "duplicate_lora":
            return fault["msg"]
        case "string_unicode":
            return "holds an unpaired surrogate"
    return f"is {quote(value)}"


def _describe_limits(
    location: tuple[int | str, ...], value: Any, parameters: Mapping[str, Parameter], model: type[BaseModel]
) -> tuple[Any, Any]:
    top = str(location[0])
    if top in parameters:
        return parameters[top].describe(), parameters[top].find_nearest(value)
    if top == "loras":
        last = location[-1]
        return _LORA_LIMITS.get(last if isinstance(last, str) else "loras"), _clamp_weight(value) if last == "weight" else None
    return model.model_json_schema()["properties"][top].get("enum"), None


def _clamp_weight(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
        return None
    return float(min(max(value, LOWEST_LORA_WEIGHT), HIGHEST_LORA_WEIGHT))


def _refuse_duplicates(loras: list[LoraRequest]) -> list[LoraRequest]:
    seen: set[str] = set()
    for lora in loras:
        if lora.name in seen:
            raise PydanticCustomError("duplicate_lora", "names {name} twice", {"name": quote(lora.name)})
        seen.add(lora.name)
    return loras


def _make_field(parameter: Parameter, example: Mapping[str, Any]) -> Any:
    examples = [example[parameter.name]] if parameter.name in example else None
    if parameter.is_required:
        return Field(description=parameter.help, examples=examples)
    if parameter.default is None or is_expression(parameter.default):
        # A factory keeps the field optional without writing a default into the schema: the true one is not known yet.
        return Field(default_factory=lambda: None, description=parameter.help, examples=examples)
    return Field(default=parameter.default, description=parameter.help, examples=examples)


def _join(allowed: Any) -> str:
    return ", ".join(allowed) if isinstance(allowed, list) else str(allowed)
