"""One public parameter as `bindings.toml` declares it: its type, its limits, their words. Knows no graph and no node."""

import keyword
import re
from functools import partial
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    TypeAdapter,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

from comfy_workflows.errors import find_nearest, quote, shorten
from comfy_workflows.expressions import is_expression

# ComfyUI takes seeds up to 2**64 - 1; half of it also fits the signed 64 bits of databases and of numpy's seeds.
MAX_SEED = 2**63 - 1
ParameterType = Literal["string", "integer", "number", "boolean", "choice", "seed", "image"]
# The limits that each type may declare.
LIMITS: dict[str, frozenset[str]] = {
    "string": frozenset({"min_length", "max_length"}),
    "integer": frozenset({"minimum", "maximum", "multiple_of"}),
    "number": frozenset({"minimum", "maximum"}),
    "choice": frozenset({"choices"}),
    "boolean": frozenset(),
    "seed": frozenset(),
    "image": frozenset({"max_pixels", "multiple_of", "mask_of"}),
}
# How a request names a picture. What is behind it is looked at by whoever fetches it.
PICTURE_PATTERN = r"^([A-Za-z0-9_.\-]{1,100}|https?://[^\s]+|data:image/(png|jpeg|webp);base64,[A-Za-z0-9+/=]+)$"
_PICTURE_START = re.compile(r"[A-Za-z0-9_.\-]{1,100}\Z|https?://|data:image/(?:png|jpeg|webp);base64,")
MAX_URL_LENGTH = 4096
# What a request or a binding already means by these names.
RESERVED_NAMES = frozenset(
    {
        "base_model",
        "loras",
        "lora_count",
        "job_id",
        "workflow",
        "webhook",
        "metadata",
        "cache",
        "priority",
        "timeout_s",
        "true",
        "false",
        "none",
    }
)


class Parameter(BaseModel):
    """One public parameter. Without a default it is required, but for a seed, which is then drawn.

    A string default with `{{ }}` is an expression over `base_model`. `consumer` says who uses the value: a node of the
    graph through a binding, or the gateway after the graph has run.

    An `image` is scaled down to `max_pixels` and cut to sides that are a `multiple_of`; its value in an expression is the name of
    the file that ComfyUI gets. `mask_of` names the picture it is a mask of: white is where that shall change. It has that picture's
    size and limits, is made from its own transparency where it has any, and, when absent, from that picture's.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$", max_length=64)
    type: ParameterType
    help: str = Field(default="", max_length=2000)
    default: StrictStr | StrictBool | StrictInt | StrictFloat | None = None
    minimum: StrictInt | StrictFloat | None = None
    maximum: StrictInt | StrictFloat | None = None
    multiple_of: int | None = Field(default=None, gt=0)
    choices: tuple[Annotated[str, Field(max_length=500)], ...] = Field(default=(), max_length=1000)
    min_length: int | None = Field(default=None, ge=0)
    max_length: int | None = Field(default=None, ge=0)
    max_pixels: int | None = Field(default=None, ge=64 * 64)
    mask_of: str | None = None
    consumer: Literal["graph", "gateway"] = "graph"

    @model_validator(mode="after")
    def _check_declaration(self) -> Self:
        if self.name in RESERVED_NAMES or keyword.iskeyword(self.name) or hasattr(BaseModel, self.name):
            raise ValueError(f"the name {self.name!r} is reserved")
        limits = frozenset().union(*LIMITS.values()) & self.model_fields_set
        if extra := sorted(limits - LIMITS[self.type]):
            raise ValueError(f"a {self.type} has no {', '.join(extra)}; it may have {', '.join(sorted(LIMITS[self.type])) or 'no limits'}")
        if self.type == "choice" and not self.choices:
            raise ValueError("a choice needs choices = [...]")
        if self.type == "seed" and self.default is not None:
            raise ValueError("a seed has no default: it is drawn when absent or -1")
        if self.type == "image" and (self.default is not None or self.consumer == "gateway"):
            raise ValueError("an image has no default, and is the graph's")
        if self.mask_of is not None and {"max_pixels", "multiple_of"} & self.model_fields_set:
            raise ValueError("a mask has the limits of its picture, and none of its own")
        if self.default is not None and not is_expression(self.default):
            self.validate_value(self.default)
        return self

    def validate_value(self, value: Any) -> None:
        """Raises ValueError when `value` could not be sent for this parameter."""
        try:
            TypeAdapter(annotate(self)).validate_python(value)
        except ValidationError as error:
            raise ValueError(f"the default {quote(value)} is not allowed; allowed is {self.describe()}") from error

    @property
    def is_required(self) -> bool:
        return self.default is None and self.type != "seed" and self.mask_of is None

    def describe(self) -> str | list[str]:
        """What is allowed, in words; for a choice the list itself."""
        match self.type:
            case "choice":
                return list(self.choices)
            case "boolean":
                return "true or false"
            case "seed":
                return f"an integer from 0 to {MAX_SEED}, or -1 to draw one"
            case "image":
                return "an upload's id, an https URL, or a data URL (data:image/png;base64,...; png, jpeg or webp)"
            case "string":
                length = _describe_range(self.min_length, self.max_length)
                return f"text{f' of {length} characters' if length else ''} without NUL or unpaired surrogates"
        range_ = _describe_range(self.minimum, self.maximum)
        step = f" in steps of {self.multiple_of}" if self.multiple_of else ""
        return f"{'an integer' if self.type == 'integer' else 'a number'}{f' from {range_}' if range_ else ''}{step}"

    def find_nearest(self, value: Any) -> Any:
        """The allowed value closest to a refused one, where that means something."""
        if self.type == "choice":
            return find_nearest(value, self.choices) if isinstance(value, str) else None
        if self.type not in ("integer", "number") or isinstance(value, bool) or not isinstance(value, int | float) or value != value:
            return None
        if self.minimum is not None:
            value = max(value, self.minimum)
        if self.maximum is not None:
            value = min(value, self.maximum)
        if self.type == "number" or value in (float("inf"), float("-inf")):
            return shorten(value)
        return shorten(_round_to_multiple(value, self))


def refuse_unsafe_text(text: str) -> str:
    """Refuses what cannot travel: NUL (Postgres, C strings) and unpaired surrogates (no UTF-8). Everything else stays as it is."""
    position = text.find("\0")
    if position >= 0:
        raise PydanticCustomError("unsafe_text", "holds a NUL at index {position}", {"position": position})
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise PydanticCustomError("unsafe_text", "holds an unpaired surrogate at index {position}", {"position": error.start}) from error
    return text


def _refuse_other_choices(value: str, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise PydanticCustomError("choice", "is not one of the choices")
    return value


def _refuse_other_pictures(value: str) -> str:
    if not _PICTURE_START.match(value) or (len(value) > MAX_URL_LENGTH and not value.startswith("data:")):
        raise PydanticCustomError("picture", "names no picture")
    return refuse_unsafe_text(value)


def annotate(parameter: Parameter) -> Any:
    match parameter.type:
        case "string":
            length = Field(min_length=parameter.min_length, max_length=parameter.max_length)
            return Annotated[StrictStr, length, AfterValidator(refuse_unsafe_text)]
        case "integer":
            return Annotated[StrictInt, Field(ge=parameter.minimum, le=parameter.maximum, multiple_of=parameter.multiple_of)]
        case "number":
            return Annotated[float, Field(strict=True, ge=parameter.minimum, le=parameter.maximum, allow_inf_nan=False)]
        case "boolean":
            return StrictBool
        case "seed":
            return Annotated[StrictInt, Field(ge=-1, le=MAX_SEED)]
        case "image":
            return Annotated[
                StrictStr, AfterValidator(_refuse_other_pictures), WithJsonSchema({"type": "string", "pattern": PICTURE_PATTERN})
            ]
    schema = WithJsonSchema({"type": "string", "enum": list(parameter.choices)})
    return Annotated[StrictStr, AfterValidator(partial(_refuse_other_choices, choices=parameter.choices)), schema]


def _round_to_multiple(value: float, parameter: Parameter) -> int:
    step = parameter.multiple_of or 1
    rounded = round(value / step) * step if isinstance(value, float) else (value + step // 2) // step * step
    if parameter.minimum is not None and rounded < parameter.minimum:
        rounded += step
    if parameter.maximum is not None and rounded > parameter.maximum:
        rounded -= step
    return rounded


def _describe_range(lowest: float | None, highest: float | None) -> str:
    if lowest is not None and highest is not None:
        return f"{lowest} to {highest}"
    if lowest is not None:
        return f"{lowest} upwards"
    return f"the lowest to {highest}" if highest is not None else ""
