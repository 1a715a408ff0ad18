"""What ComfyUI says on its socket, as typed messages. Source: recordings of ComfyUI 0.3.64 (tests/data/comfyui)."""

from __future__ import annotations

import struct
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, TypeAdapter, ValidationError


class _Wire(BaseModel):
    model_config = ConfigDict(extra="ignore")


class PromptData(_Wire):
    prompt_id: str | None = None


class ExecutingData(PromptData):
    node: str | None = None


class ProgressData(PromptData):
    value: FiniteFloat  # Python's JSON knows NaN, and a node may divide by nothing
    max: FiniteFloat
    node: str | None = None


class NodeState(_Wire):
    state: str
    value: float = 0.0
    max: float = 1.0


class ProgressStateData(PromptData):
    nodes: dict[str, NodeState]


class CachedData(PromptData):
    nodes: list[str] = Field(default_factory=list)


class ExecutedData(PromptData):
    node: str
    output: dict[str, Any] | None = None


class ErrorData(PromptData):
    """`current_inputs`, `current_outputs` and the traceback are left out: they hold tensors, the graph and paths."""

    node_id: str | None = None
    node_type: str | None = None
    exception_type: str | None = None
    exception_message: str = ""


class ExecutionStart(_Wire):
    type: Literal["execution_start"]
    data: PromptData


class ExecutionCached(_Wire):
    type: Literal["execution_cached"]
    data: CachedData


class Executing(_Wire):
    """`node` None is the definitive end of a prompt: history is written by then."""

    type: Literal["executing"]
    data: ExecutingData


class ProgressStep(_Wire):
    type: Literal["progress"]
    data: ProgressData


class ProgressState(_Wire):
    type: Literal["progress_state"]
    data: ProgressStateData


class Executed(_Wire):
    type: Literal["executed"]
    data: ExecutedData


class ExecutionSuccess(_Wire):
    type: Literal["execution_success"]
    data: PromptData


class ExecutionError(_Wire):
    type: Literal["execution_error"]
    data: ErrorData


class ExecutionInterrupted(_Wire):
    type: Literal["execution_interrupted"]
    data: PromptData


class Preview(NamedTuple):
    """A picture of work in progress. `prompt_id` is None in the older frame, which names nothing."""

    prompt_id: str | None
    content_type: str
    image: bytes


Message = (
    ExecutionStart
    | ExecutionCached
    | Executing
    | ProgressStep
    | ProgressState
    | Executed
    | ExecutionSuccess
    | ExecutionError
    | ExecutionInterrupted
)

_ADAPTER: TypeAdapter[Message] = TypeAdapter(Annotated[Message, Field(discriminator="type")])

# Told to every socket, or by extensions; nothing in them belongs to a prompt.
_SKIPPED = (b'"type": "status"', b'"type":"status"')


def parse_text(raw: bytes | str) -> Message | None:
    """A message that concerns a prompt, or None for any other (status, extensions' own, newer kinds)."""
    data = raw.encode() if isinstance(raw, str) else raw
    if data[:24].find(_SKIPPED[0]) >= 0 or data[:24].find(_SKIPPED[1]) >= 0:
        return None
    try:
        return _ADAPTER.validate_json(data)
    except ValidationError:
        return None


class _PreviewMetadata(_Wire):
    prompt_id: str | None = None
    image_type: str = "image/jpeg"


def parse_binary(frame: bytes) -> Preview | None:
    """Frames of type 1 (u32 type, u32 format, image) and 4 (u32 type, u32 length, JSON, image), big-endian; None for others."""
    if len(frame) < 8:
        return None
    kind, second = struct.unpack_from(">II", frame)
    if kind == 1:
        return Preview(None, "image/png" if second == 2 else "image/jpeg", frame[8:])
    if kind == 4 and 8 + second <= len(frame):
        try:
            metadata = _PreviewMetadata.model_validate_json(frame[8 : 8 + second])
        except ValidationError:
            return None
        return Preview(metadata.prompt_id, metadata.image_type, frame[8 + second :])
    return None
