"""OpenAI's image requests in our words, and our jobs in OpenAI's. Pure but for signing URLs.

Source: openai-python's types of 2026. What has no meaning here is refused by name, but for what its clients send by themselves.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import ConfigDict, Field, ValidationError

from comfy_workflows.catalog import Catalog
from comfy_workflows.workflow import Workflow
from gateway.edge.bodies import ShallowBody
from gateway.errors import BadRequest, JobFailed, NotFound, Unprocessable
from gateway.jobs.model import Job, JobStatus, Output
from gateway.settings import Settings
from gateway.storage import Storage

MAX_N, MAX_PARTIALS = 10, 3
# Of the steps that the base model asks for.
_STEPS_SHARE = {"low": 0.5, "high": 1.5, "hd": 1.5}
_NUMBERS = ("integer", "number", "seed")
_MODERATED = ("moderated", "moderation_blocked")


class ImageRequest(ShallowBody):
    """`POST /v1/images/generations`. Any other field is a parameter of the workflow."""

    model_config = ConfigDict(extra="allow")

    prompt: str = Field(description="What the picture shows.")
    model: str | None = Field(
        None, max_length=1000, description="`WORKFLOW` or `BASE_MODEL`, then `+LORA` or `+LORA:WEIGHT` for each LoRA."
    )
    n: int | None = Field(None, ge=1, le=MAX_N, description="Pictures.")
    size: str | None = Field(None, description="`WIDTHxHEIGHT` or `auto`.")
    quality: Literal["low", "medium", "high", "auto", "standard", "hd"] | None = Field(
        None, description="Half, all or 1.5 times the steps."
    )
    response_format: Literal["url", "b64_json"] | None = Field(None, description="Absent: both.")
    output_format: Literal["png", "webp", "jpeg"] | None = None
    output_compression: int | None = Field(None, ge=0, le=100, description="Quality of webp and jpeg.")
    background: Literal["auto", "opaque"] | None = Field(None, description="No workflow here makes transparent pictures.")
    moderation: Literal["auto", "low"] | None = Field(None, description="The deployment decides.")
    style: Literal["vivid", "natural"] | None = Field(None, description="Without effect: say it in the prompt.")
    stream: bool | None = None
    partial_images: int | None = Field(None, ge=0, le=MAX_PARTIALS, description="Previews to send while streaming.")
    user: str | None = Field(None, max_length=512, description="Kept with the job.")
    safety_identifier: str | None = Field(None, max_length=512, description="Kept with the job.")


def read_form_request(fields: Mapping[str, str], catalog: Catalog) -> ImageRequest:
    """A request whose fields came as texts. Raises Unprocessable that names the field."""
    numbers = {name for known in catalog.names() for name, one in catalog.get(known).parameters.items() if one.type in _NUMBERS}
    try:
        return ImageRequest.model_validate({name: _read_number(text) if name in numbers else text for name, text in fields.items()})
    except ValidationError as invalid:
        fault = invalid.errors(include_url=False)[0]
        name = ".".join(map(str, fault["loc"])) or "body"
        details = {"parameter": name, "value": fields.get(name, "")[:100], "allowed": fault["msg"]}
        raise Unprocessable(f"{name}: {fault['msg']}", code="invalid_parameter", details=details) from invalid


def _read_number(text: str) -> int | float | str:
    """What is none stays as it is: the workflow says what is wrong with it."""
    if re.fullmatch(r"-?[0-9]{1,20}", text):
        return int(text)
    return float(text) if re.fullmatch(r"-?[0-9]{0,20}\.[0-9]{1,20}", text) else text


@dataclass(frozen=True, slots=True)
class Model:
    """What a `model` names."""

    workflow: Workflow
    base_model: str | None
    loras: list[dict[str, Any]]


def read_model(name: str | None, catalog: Catalog, default: Workflow) -> Model:
    """A workflow or a base model, and LoRAs behind it. Raises NotFound."""
    first, *rest = (name or "").split("+")
    loras = [_read_lora(part) for part in rest if part]
    if not first:
        return Model(default, None, loras)
    if first in catalog.names():
        return Model(catalog.get(first), None, loras)
    if first in catalog.base_models:
        return Model(default, first, loras)
    known = [*catalog.names(), *catalog.base_models]
    details = {"parameter": "model", "value": first[:100], "allowed": known}
    raise NotFound(
        f"The model {first[:100]!r} does not exist.", code="model_not_found", hint=f"There are: {', '.join(known)}.", details=details
    )


def _read_lora(text: str) -> dict[str, Any]:
    """`name` or `name:weight`."""
    name, colon, weight = text.rpartition(":")
    if colon and re.fullmatch(r"-?[0-9]{1,3}(\.[0-9]{1,6})?", weight):
        return {"name": name, "weight": float(weight)}
    return {"name": text}


def read_parameters(request: ImageRequest, model: Model, settings: Settings) -> dict[str, Any]:
    """The workflow's parameters. Raises Unprocessable where only OpenAI's words can be wrong; the workflow judges the rest."""
    declared = model.workflow.parameters
    given: dict[str, Any] = {**(request.model_extra or {}), **_read_size(request.size)}
    if "prompt" in declared:
        # Clients have to send one, also to a workflow that reads none.
        given["prompt"] = request.prompt
    if request.n is not None and (request.n > 1 or "num_images" in declared):
        given["num_images"] = request.n
    if request.output_format is not None:
        given["output_format"] = request.output_format
    if request.output_compression is not None:
        given["quality"] = _read_compression(request)
    if model.base_model is not None:
        given["base_model"] = model.base_model
    if model.loras:
        given["loras"] = model.loras
    share = _STEPS_SHARE.get(request.quality or "")
    if share is not None and "steps" not in given:
        given |= _scale_steps(model.workflow, model.base_model or settings.default_base_model, share)
    return given


def _read_size(size: str | None) -> dict[str, int]:
    if size in (None, "auto"):
        return {}
    match = re.fullmatch(r"([0-9]{1,5})x([0-9]{1,5})", size or "")
    if match is None:
        details = {"parameter": "size", "value": (size or "")[:100], "allowed": "auto, or WIDTHxHEIGHT such as 1024x1024"}
        raise Unprocessable(f"{(size or '')[:100]!r} is no size.", code="invalid_parameter", details=details)
    return {"width": int(match[1]), "height": int(match[2])}


def _read_compression(request: ImageRequest) -> int:
    if request.output_format not in ("webp", "jpeg"):
        details = {"parameter": "output_compression", "value": request.output_compression, "allowed": "with output_format webp or jpeg"}
        raise Unprocessable("PNG pictures have no compression level.", code="invalid_parameter", details=details)
    return max(1, request.output_compression or 0)


def _scale_steps(workflow: Workflow, base_model: str, share: float) -> dict[str, int]:
    """Nothing where the workflow has no steps, or none of its own choosing."""
    default = workflow.defaults.get(base_model, {}).get("steps")
    parameter = workflow.parameters.get("steps")
    if parameter is None or not isinstance(default, int):
        return {}
    most = parameter.maximum if parameter.maximum is not None else 100
    return {"steps": int(min(most, max(1, round(default * share))))}


def read_metadata(request: ImageRequest) -> dict[str, Any]:
    """What is kept with the job."""
    user = request.safety_identifier or request.user
    return {"user": user} if user else {}


def require_success(job: Job) -> Job:
    """The job, if it made pictures. Raises JobFailed, BadRequest."""
    if job.status is JobStatus.SUCCEEDED:
        return job
    if job.error is not None and job.error.code in _MODERATED:
        raise BadRequest(job.error.message, code="moderation_blocked", details={"parameter": "prompt"})
    if job.error is not None:
        raise JobFailed(job.error.message, code=job.error.code, hint=job.error.hint)
    if job.is_terminal:
        raise JobFailed(f"The job {job.id} was {job.status}.")
    raise JobFailed(f"The job has not ended yet; GET /v1/generations/{job.id} shows how it goes on.", code="still_running")


def describe(request: ImageRequest, output: Output) -> dict[str, Any]:
    """What answers and events say of a picture beside its bytes."""
    return {
        "background": "opaque",
        "output_format": output.content_type.removeprefix("image/"),
        "quality": {"low": "low", "high": "high", "hd": "high"}.get(request.quality or "", "medium"),
        "size": f"{output.width}x{output.height}",
    }


def present_usage() -> dict[str, Any]:
    """Nothing is counted in tokens here."""
    nothing = {"image_tokens": 0, "text_tokens": 0}
    return {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0, "input_tokens_details": nothing, "output_tokens_details": nothing}


def present_images(request: ImageRequest, job: Job, bodies: Mapping[int, bytes], storage: Storage) -> dict[str, Any]:
    """The answer: each picture by its bytes, by a signed URL, or both when nothing was asked for."""
    data = []
    for output in job.outputs:
        picture = {"b64_json": base64.b64encode(bodies[output.index]).decode()} if output.index in bodies else {}
        if request.response_format != "b64_json":
            picture["url"] = storage.sign(output.key)
        data.append(picture)
    created = (job.finished_ms or job.spec.created_ms) // 1000
    return {"created": created, "data": data, **describe(request, job.outputs[0]), "usage": present_usage()}


class ImageEvents:
    """Frames of an image stream. `family` is `image_generation` or `image_edit`."""

    def __init__(self, family: str, request: ImageRequest) -> None:
        self._family, self._request = family, request
        self._wanted, self._sent, self._value = request.partial_images or 0, 0, 0.0

    def note_progress(self, value: float) -> None:
        self._value = value

    def partial(self, preview: bytes, created_ms: int, size: str) -> bytes:
        """A preview, when it is time for the next one: they are spread over the job. Empty when it is not."""
        if self._sent >= self._wanted or self._value < (self._sent + 1) / (self._wanted + 1):
            return b""
        data = json.loads(preview)
        self._sent += 1
        said = {"background": "opaque", "output_format": data["mime"].removeprefix("image/"), "quality": "low", "size": size}
        picture = {"b64_json": data["base64"], "partial_image_index": self._sent - 1, "created_at": created_ms // 1000}
        return self._frame("partial_image", {**said, **picture})

    def completed(self, output: Output, body: bytes, created_ms: int) -> bytes:
        picture = {"b64_json": base64.b64encode(body).decode(), "created_at": created_ms // 1000, "usage": present_usage()}
        return self._frame("completed", {**describe(self._request, output), **picture})

    def _frame(self, name: str, data: dict[str, Any]) -> bytes:
        kind = f"{self._family}.{name}"
        return f"event: {kind}\ndata: {json.dumps({'type': kind, **data})}\n\n".encode()


def frame_error(described: dict[str, Any]) -> bytes:
    """An error once the stream has begun: OpenAI's clients raise it."""
    return f"event: error\ndata: {json.dumps({'error': described})}\n\n".encode()
