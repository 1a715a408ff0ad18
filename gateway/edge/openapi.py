"""The OpenAPI document: what every operation may answer beside what its route says, and who may call it. One rule for all, so that
a route that is added is described without a word of its own."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from fastapi import FastAPI
from starlette.routing import BaseRoute, Match
from starlette.types import Scope

from gateway.dialects.errors import OPENAI
from gateway.edge.openapi_words import EXAMPLES, GROUPS, INTRODUCTION

Json = dict[str, Any]

# What anybody may ask for, without a key.
PUBLIC = frozenset({"/health", "/health/stream", "/ready", "/api/v2/health"})
_SAYS = {
    400: "It cannot be read: JSON, a query parameter or a header is not what it must be",
    401: "No key, or one that is none of this deployment's",
    403: "The key lacks the scope, or a page of another origin asks",
    404: "It, or something it names, is not there or not the caller's",
    408: "The body came too slowly",
    409: "The state forbids it",
    413: "It is larger than is allowed",
    415: "The body is declared as something else than what is taken",
    422: "It can be read and does not fit; `details` names the parameter, the value and what is allowed",
    429: "More than the caller may have for now; `Retry-After` says when to come back",
    431: "Too many headers, or too large ones",
    500: "The job that was waited for failed",
    503: "A part that the gateway stands on is out of reach, or no instance can serve it",
}
_DONE = {200: "So it is", 201: "It was made", 202: "It is accepted, and done in a while", 204: "It is done", 302: "It is elsewhere"}
_ERROR: Json = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["code", "message", "hint", "details"],
            "properties": {
                "code": {"type": "string", "description": "Stable; for programs."},
                "message": {"type": "string", "description": "For people."},
                "hint": {"type": ["string", "null"], "description": "What to do about it."},
                "details": {"type": "object", "description": "Where there are such: `parameter`, `value`, `allowed`."},
            },
        }
    },
}
_OPENAI_ERROR: Json = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
# One event of a stream: what `data` holds is its kind's. The framework would say that the whole is one text.
_EVENT: Json = {
    "type": "object",
    "required": ["event", "data"],
    "properties": {"event": {"type": "string"}, "data": {"type": "string", "description": "JSON."}, "id": {"type": "string"}},
}
_UNUSED = ("HTTPValidationError", "ValidationError")


def describe(app: FastAPI) -> None:
    """Let the app's document say all of it."""
    written: Callable[[], Json] = app.openapi

    def write() -> Json:
        if app.openapi_schema is None:
            _complete(written())
        return app.openapi_schema or {}

    app.openapi = write  # type: ignore[method-assign]


def _complete(document: Json) -> None:
    document["info"]["description"] = INTRODUCTION
    document["tags"] = [{"name": name, "description": said} for name, said in GROUPS.items()]
    parts = document["components"]
    for name in _UNUSED:
        parts["schemas"].pop(name, None)
    parts["schemas"] |= {"Error": _ERROR, "OpenAIError": _OPENAI_ERROR}
    _lift_definitions(document["paths"], parts["schemas"])
    parts["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer", "description": "An API key, or what AUTH says instead."}}
    known = set[str]()
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            _name(operation, method, known)
            if (example := EXAMPLES.get(f"{method.upper()} {path}")) is not None:
                operation["requestBody"]["content"]["application/json"]["example"] = example
            operation["responses"] = _list_responses(path, method, operation)
            if path not in PUBLIC:
                operation["security"] = [{"key": []}]


def _name(operation: Json, method: str, known: set[str]) -> None:
    """In lists it goes by its text's first sentence, where the framework has the function's name. An id is one operation's alone."""
    if said := operation.get("description"):
        operation["summary"] = " ".join(re.split(r"(?<=[.:;]) ", said, maxsplit=1)[0].split()).rstrip(".:;")
    if operation["operationId"] in known:
        operation["operationId"] += f"_by_{method}"
    known.add(operation["operationId"])


def _lift_definitions(part: Any, schemas: Json) -> None:
    """Schemas that were written by hand carry definitions of their own; in a document, references lead to its components."""
    for value in part.values() if isinstance(part, dict) else part if isinstance(part, list) else ():
        _lift_definitions(value, schemas)
    if not isinstance(part, dict):
        return
    for name, schema in part.pop("$defs", {}).items():
        schemas.setdefault(name, schema)
    if str(part.get("$ref", "")).startswith("#/$defs/"):
        part["$ref"] = part["$ref"].replace("#/$defs/", "#/components/schemas/")


def _list_responses(path: str, method: str, operation: Json) -> Json:
    own = {status: said for status, said in operation["responses"].items() if not _is_frameworks(said)}
    kind = "OpenAIError" if path.startswith(f"{OPENAI}/") else "Error"
    content = {} if method == "head" else {"content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{kind}"}}}}
    for status, said in own.items():
        if said["description"] == "Successful Response":
            said["description"] = _DONE.get(int(status), said["description"])
        if said.get("content", {}).get("application/json", {}).get("schema") == {}:
            said["content"]["application/json"]["schema"] = {"type": "object"}
        if method == "head":
            said.pop("content", None)
        elif "text/event-stream" in said.get("content", {}):
            said["content"]["text/event-stream"] = {"schema": _EVENT}
    errors = {str(status): {"description": _SAYS[status], **content} for status in _list_statuses(path, method, operation)}
    return dict(sorted({**errors, **own}.items()))


def _is_frameworks(said: Json) -> bool:
    return "HTTPValidationError" in str(said.get("content"))


def _list_statuses(path: str, method: str, operation: Json) -> Iterator[int]:
    """The errors that a request for this may be answered with."""
    yield from (400, 403, 413, 431)
    if path in PUBLIC:
        return
    yield from (401, 429, 503)
    if path.startswith(f"{OPENAI}/"):
        yield from (404, 408, 409, 415, 500)
        return
    has_body, has_place = "requestBody" in operation, "{" in path
    if has_body or has_place:
        yield 404
    if method != "get":
        yield from (408, 409)
    if path.endswith("/comparison"):
        # The one read that needs its thing in a certain state.
        yield 409
    if method != "get" or has_place:
        # Without a body: an Idempotency-Key of another request, or something that is not fit to be asked that.
        yield 422
    if has_body:
        yield 415


def list_methods(routes: Iterable[BaseRoute], scope: Scope) -> list[str]:
    """Every method of what the path names; the framework itself tells only of the first route that fits.
    Where a name also fits another's `{id}`, it is the name that counts."""
    fitting = list[tuple[str, set[str]]](_walk_fitting(routes, scope))
    named = min((path.count("{") for path, _ in fitting), default=0)
    return sorted(set[str]().union(*(methods for path, methods in fitting if path.count("{") == named)))


def _walk_fitting(routes: Iterable[BaseRoute], scope: Scope) -> Iterator[tuple[str, set[str]]]:
    for route in routes:
        inner = getattr(route, "original_router", None)
        if inner is not None:
            yield from _walk_fitting(inner.routes, scope)
        elif route.matches(scope)[0] is not Match.NONE:
            yield str(getattr(route, "path", "")), set(getattr(route, "methods", None) or ())
