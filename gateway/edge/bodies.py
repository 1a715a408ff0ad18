"""What is asked of a body before anything else is done with it: how deep it is, and whether it came before."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, TypeVar

from fastapi.exceptions import RequestValidationError
from pydantic import AfterValidator, BaseModel, Field, TypeAdapter, ValidationError, model_validator
from starlette.requests import ClientDisconnect, Request

from gateway.auth import Caller
from gateway.errors import BadRequest
from gateway.jobs.records import IdempotencyKey

T = TypeVar("T")
Shape = TypeVar("Shape", bound=BaseModel)

MAX_KEY_LENGTH = 255
# pydantic writes about 250 levels and reads about 200: what is stored must be read again, two levels further down.
MAX_DEPTH = 64
MAX_METADATA_BYTES = 16_384


def is_deeper(value: Any, levels: int) -> bool:
    """Whether lists and objects stand inside one another more than `levels` deep. Without recursion: the value is a stranger's."""
    layer = [value]
    for _ in range(levels):
        layer = [
            part for whole in layer if isinstance(whole, dict | list) for part in (whole.values() if isinstance(whole, dict) else whole)
        ]
        if not layer:
            return False
    return any(isinstance(part, dict | list) for part in layer)


def read_json(body: bytes) -> dict[str, Any]:
    """A body that the framework did not read. Raises what it raises itself, for the same handler."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError) as fault:
        error = {"type": "json_invalid", "loc": ("body",), "msg": "JSON decode error", "input": {}, "ctx": {"error": str(fault)}}
        raise RequestValidationError([error]) from None
    if not isinstance(found, dict) or is_deeper(found, MAX_DEPTH):
        message = f"must be an object, nested at most {MAX_DEPTH} levels deep"
        raise RequestValidationError([{"type": "dict_type", "loc": ("body",), "msg": message, "input": type(found).__name__}])
    return found


def check(shape: TypeAdapter[T], value: Any, *place: str) -> T:
    """What a part of a body says, by its shape; `place` is where in the body it stands. Raises as the framework would."""
    try:
        return shape.validate_python(value)
    except ValidationError as invalid:
        faults = [{**fault, "loc": ("body", *place, *fault["loc"])} for fault in invalid.errors(include_url=False, include_context=False)]
        raise RequestValidationError(faults) from None


async def read_unless_wrong(shape: type[Shape], request: Request) -> Shape | None:
    """A body that is JSON, as the framework would check it; None where it would have anything to say."""
    if request.headers.get("content-type") != "application/json":
        return None
    try:
        return shape.model_validate(json.loads(await request.body()))
    except (ValueError, RecursionError, ClientDisconnect):
        return None


class ShallowBody(BaseModel):
    """A body that can be stored: no field of it is nested too deep."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_depth(cls, body: Any) -> Any:
        for name, value in body.items() if isinstance(body, dict) else ():
            if is_deeper(value, MAX_DEPTH):
                raise ValueError(f"{name[:64]!r} is nested more than {MAX_DEPTH} levels deep")
        return body


def _measure_json(value: dict[str, Any]) -> int:
    """Bytes. Raises ValueError for what cannot be written again."""
    try:
        return len(json.dumps(value, ensure_ascii=False, allow_nan=False).encode())
    except (UnicodeEncodeError, ValueError, RecursionError):
        raise ValueError("must be plain JSON: no lone surrogates, NaN or infinity") from None


def _require_json(value: dict[str, Any]) -> dict[str, Any]:
    _measure_json(value)
    return value


def _fit_metadata(value: dict[str, Any]) -> dict[str, Any]:
    size = _measure_json(value)
    if size > MAX_METADATA_BYTES:
        raise ValueError(f"metadata is {size} bytes; at most {MAX_METADATA_BYTES} are allowed")
    return value


PlainJson = Annotated[dict[str, Any], AfterValidator(_require_json)]
Metadata = Annotated[dict[str, Any], AfterValidator(_fit_metadata), Field(description="Yours; returned as it is.")]


def require_idempotency_key(given: str) -> None:
    if not (1 <= len(given) <= MAX_KEY_LENGTH and given.isprintable()):
        allowed = f"1 to {MAX_KEY_LENGTH} printable characters"
        raise BadRequest("That is no Idempotency-Key.", details={"parameter": "Idempotency-Key", "value": given[:100], "allowed": allowed})


def read_idempotency_key(caller: Caller, given: str | None, scope: str, body: Any) -> IdempotencyKey | None:
    """The caller's Idempotency-Key with the hash of what it was sent with: JSON, or models that count by their fields.

    `scope` tells routes apart that take the same body.
    """
    if given is None:
        return None
    require_idempotency_key(given)
    digest = hashlib.sha256(json.dumps([scope, body], sort_keys=True, default=lambda model: model.model_dump()).encode()).hexdigest()
    return IdempotencyKey(caller.id, given, digest)
