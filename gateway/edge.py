"""Around every request: its id, its log line, its limits, and the one handler that speaks all errors."""

from __future__ import annotations

import logging
import re
import secrets
import time
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError, WebSocketRequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket, WebSocketState

from gateway.dialects import speak
from gateway.errors import (
    BadRequest,
    Conflict,
    FluxgateError,
    Forbidden,
    NotFound,
    PayloadTooLarge,
    Unauthorized,
    Unprocessable,
    UnsupportedMediaType,
)
from gateway.openapi import list_methods
from gateway.settings import Settings
from gateway.streams import BOX, EventStream
from gateway.telemetry import request_id

log = logging.getLogger("gateway.access")

_REQUEST_ID = re.compile(r"[A-Za-z0-9_.\-]{1,64}")
_BY_STATUS: dict[int, type[FluxgateError]] = {
    error.status: error for error in (BadRequest, Unauthorized, Forbidden, NotFound, Conflict, PayloadTooLarge, UnsupportedMediaType)
}


def _answer(error: FluxgateError, path: str) -> JSONResponse:
    said = speak(error, path)
    return JSONResponse(said.body, said.status, headers=said.headers)


def install_error_handlers(app: FastAPI) -> None:
    """Every error, ours or the framework's, leaves as `{"error": {code, message, hint, details}}`."""

    async def on_own(connection: HTTPConnection, error: Exception) -> JSONResponse:
        assert isinstance(error, FluxgateError)
        return await _refuse(connection, _answer(error, connection.url.path))

    async def on_http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        if error.status_code == 405:
            refused = FluxgateError("This route has no such method.", code="method_not_allowed")
            allow = ", ".join(list_methods(app.routes, request.scope))
            return JSONResponse(refused.body(), 405, headers={"Allow": allow})
        kind = _BY_STATUS.get(error.status_code, FluxgateError)
        return _answer(kind(str(error.detail)), request.url.path)

    async def on_invalid(connection: HTTPConnection, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError | WebSocketRequestValidationError)
        return await _refuse(connection, _answer(_describe_invalid(error), connection.url.path))

    app.add_exception_handler(FluxgateError, on_own)
    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(RequestValidationError, on_invalid)
    app.add_exception_handler(WebSocketRequestValidationError, on_invalid)


async def _refuse(connection: HTTPConnection, answer: JSONResponse) -> JSONResponse:
    """A WebSocket that is not open yet is refused by the same answer as a request."""
    if isinstance(connection, WebSocket) and connection.application_state is WebSocketState.CONNECTING:
        await connection.send_denial_response(answer)
    return answer


def _describe_invalid(error: RequestValidationError | WebSocketRequestValidationError) -> FluxgateError:
    """The first thing wrong, in full; the rest in `details.parameters`."""
    faults = error.errors()
    if isinstance(faults[0].get("input"), bytes):
        # The framework hands a body on unread when its type is not JSON.
        return UnsupportedMediaType("The body is not declared as JSON.")
    if any(fault["type"] == "json_invalid" for fault in faults):
        return BadRequest("The body is not JSON.", code="invalid_json", details={"reason": str(faults[0].get("ctx", {}).get("error", ""))})
    described = [
        {
            "parameter": ".".join(str(part) for part in fault["loc"][1:]) or str(fault["loc"][0]),
            "value": _shorten(_without_secrets(fault["loc"], fault.get("input"))),
            "allowed": fault["msg"],
        }
        for fault in faults
    ]
    first = described[0]
    kind = Unprocessable if faults[0]["loc"][0] == "body" else BadRequest
    message = f"{first['parameter']}: {first['allowed']}"
    return kind(message, code="invalid_parameter", details={**first, "parameters": described})


def _without_secrets(place: tuple[int | str, ...], value: Any) -> Any:
    """What may be repeated in an answer: no field called `secret`, wherever the fault is seen from."""
    if place[-1] == "secret":
        return "…"
    if isinstance(value, dict):
        return {name: "…" if name == "secret" or (isinstance(part, dict) and "secret" in part) else part for name, part in value.items()}
    return value


def _shorten(value: Any) -> str:
    text = repr(value).encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= 200 else f"{text[:200]}… ({len(text)} characters)"


# Requests whose JSON may carry pictures as data URLs.
_TAKES_PICTURES = re.compile(r"/v1/generations(/preview)?|/v1/workflows/[^/]+/generations|/v1/batches")


def _is_upload(scope: Scope, headers: dict[bytes, bytes]) -> bool:
    """Whether the body is files, which go to disk; every other body is held in memory."""
    return bool(scope["path"].startswith(("/v1/datasets", "/v1/uploads", "/api/v2/assets", "/v1/images/edits"))) and headers.get(
        b"content-type", b""
    ).startswith(b"multipart/form-data")


class EdgeMiddleware:
    """Plain ASGI, so that streams pass untouched. Gives each request an id, refuses large bodies unread, logs and measures."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app, self._max_body_bytes, self._max_upload_bytes = app, settings.max_body_bytes, settings.max_upload_bytes
        self._max_batch_bytes = settings.max_batch_bytes
        self._max_picture_body_bytes = max(settings.max_body_bytes, settings.max_picture_body_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        identity = given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(8)
        token = request_id.set(identity)
        started, status, begun = time.perf_counter(), 500, False

        async def send_with_id(message: Message) -> None:
            nonlocal status, begun
            if message["type"] == "http.response.start":
                begun = True
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", identity.encode())]
            await send(message)

        try:
            declared = headers.get(b"content-length", b"0")
            allowed = self._most(scope, headers)
            if declared.isdigit() and int(declared) > allowed:
                await _answer(self._too_large(allowed), scope["path"])(scope, receive, send_with_id)
            else:
                scope[BOX] = streams = list[EventStream]()
                limited = self._limit(receive, allowed)
                await self._app(scope, limited, send_with_id)
                for stream in streams:
                    await stream.run(limited, send_with_id)
        except Exception as error:  # boundary: a surprise gets its answer and its log line here, where the request still has an id
            log.error("unexpected error", exc_info=error)
            if begun:
                raise
            surprise = FluxgateError("The gateway met something it did not expect; its log says what.")
            await _answer(surprise, scope["path"])(scope, receive, send_with_id)
        finally:
            self._record(scope, status, time.perf_counter() - started)
            request_id.reset(token)

    def _most(self, scope: Scope, headers: dict[bytes, bytes]) -> int:
        """Bytes the body may have."""
        if _is_upload(scope, headers):
            return self._max_upload_bytes
        if scope["path"] == "/v1/batches":
            return self._max_batch_bytes
        return self._max_picture_body_bytes if _TAKES_PICTURES.fullmatch(scope["path"]) else self._max_body_bytes

    def _too_large(self, allowed: int) -> PayloadTooLarge:
        return PayloadTooLarge(f"The body is larger than {allowed} bytes.", details={"allowed": allowed})

    def _limit(self, receive: Receive, allowed: int) -> Receive:
        """A chunked body has no length to refuse by: count what comes."""
        seen = 0

        async def limited() -> Message:
            nonlocal seen
            message = await receive()
            if message["type"] == "http.request":
                seen += len(message.get("body", b""))
                if seen > allowed:
                    raise HTTPException(413, f"The body is larger than {allowed} bytes.")
            return message

        return limited

    def _record(self, scope: Scope, status: int, elapsed_s: float) -> None:
        route = getattr(scope.get("route"), "path", "unmatched")
        runtime = getattr(scope["app"].state, "runtime", None)
        if runtime is not None:
            runtime.metrics.requests.labels(scope["method"], route, status).inc()
            runtime.metrics.request_s.labels(route).observe(elapsed_s)
        said = {"method": scope["method"], "path": scope["path"], "status": status, "ms": round(elapsed_s * 1000, 1)}
        log.info("request", extra={**said, "caller": scope.get("state", {}).get("caller")})
