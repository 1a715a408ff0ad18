"""Errors as each family of clients reads them. Ours is the mother tongue; two contracts of others have their own."""

from __future__ import annotations

from typing import Any, NamedTuple

from gateway.errors import FluxgateError

COMFY, OPENAI = "/api/v2", "/v1/images"
_COMFY_CODES = {"job_not_found": "not_found", "asset_not_found": "not_found", "scope_missing": "forbidden"}
_OPENAI_TYPES = {429: "rate_limit_error", 403: "permission_error"}
_OPENAI_CODES = {
    "unauthorized": "invalid_api_key",
    "workflow_not_found": "model_not_found",
    "base_model_not_found": "model_not_found",
    "moderated": "moderation_blocked",
}
# What a request calls otherwise than the workflow does.
_OPENAI_PARAMETERS = {"width": "size", "height": "size", "num_images": "n", "base_model": "model", "workflow": "model", "loras": "model"}


class Said(NamedTuple):
    status: int
    body: dict[str, Any]
    headers: dict[str, str]


def speak(error: FluxgateError, path: str) -> Said:
    """The answer to a request for `path` that failed."""
    headers = {"Retry-After": str(error.retry_after_s)} if error.retry_after_s is not None else {}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if path.startswith(f"{OPENAI}/"):
        return Said(*_speak_openai(error, headers))
    body = error.body()
    if path.startswith(COMFY):
        body["error"]["code"] = _comfy_code(error)
    return Said(error.status, body, headers)


def _comfy_code(error: FluxgateError) -> str:
    is_cursor = error.code == "bad_request" and error.details.get("parameter") == "cursor"
    return "invalid_cursor" if is_cursor else _COMFY_CODES.get(error.code, error.code)


def describe_openai(error: FluxgateError) -> dict[str, Any]:
    """`{message, type, param, code}`"""
    status = error.status
    kind = _OPENAI_TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    parameter = error.details.get("parameter")
    message = f"{error.message} {error.hint}" if error.hint else error.message
    param = _OPENAI_PARAMETERS.get(str(parameter), parameter)
    return {"message": message, "type": kind, "param": param, "code": _OPENAI_CODES.get(error.code, error.code)}


def _speak_openai(error: FluxgateError, headers: dict[str, str]) -> tuple[int, dict[str, Any], dict[str, str]]:
    """There a body that does not fit is a 400. What was run and failed is not to be run again by the client of its own accord."""
    status = 400 if error.status == 422 else error.status
    if status == 500:
        headers = {**headers, "x-should-retry": "false"}
    return status, {"error": describe_openai(error)}, headers
