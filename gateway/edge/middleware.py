"""Around every request: its id, its log line, its limits, and the one handler that speaks all errors."""

from __future__ import annotations

import asyncio
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

from gateway.dialects.errors import speak
from gateway.edge.bodies import MAX_DEPTH
from gateway.edge.guard import Guard
from gateway.edge.openapi import list_methods
from gateway.edge.streams import BOX, EventStream
from gateway.errors import (
    BadRequest,
    Conflict,
    FluxgateError,
    Forbidden,
    NotFound,
    PayloadTooLarge,
    RequestTimeout,
    Unauthorized,
    Unprocessable,
    UnsupportedMediaType,
)
from gateway.redaction import names_secret
from gateway.settings import Settings
from gateway.telemetry import request_id

log = logging.getLogger("gateway.access")

_REQUEST_ID = re.compile(r"[A-Za-z0-9_.\-]{1,64}")
# The framework's words for what is no UTF-8, nested too deep, or a number of thousands of digits.
_UNREADABLE = "There was an error parsing the body"
_BY_STATUS: dict[int, type[FluxgateError]] = {
    error.status: error
    for error in (BadRequest, Unauthorized, Forbidden, NotFound, RequestTimeout, Conflict, PayloadTooLarge, UnsupportedMediaType)
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
        if error.detail == _UNREADABLE:
            return _answer(BadRequest("The body is not JSON that can be read.", code="invalid_json"), request.url.path)
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


def _without_secrets(place: tuple[int | str, ...], value: Any, levels: int = MAX_DEPTH) -> Any:
    """What may be repeated in an answer: no field that is a secret by its name, wherever the fault is seen from, and nothing too deep."""
    if any(names_secret(part) for part in place) or not levels:
        return "…"
    if isinstance(value, dict):
        return {name: _without_secrets((name,), part, levels - 1) for name, part in value.items()}
    return [_without_secrets((), part, levels - 1) for part in value] if isinstance(value, list) else value


def _shorten(value: Any) -> str:
    text = repr(value).encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= 200 else f"{text[:200]}… ({len(text)} characters)"


_SMALL_BYTES = 64 << 10
# Requests whose JSON may carry pictures as data URLs.
_TAKES_PICTURES = re.compile(r"/v1/generations(/preview)?|/v1/workflows/[^/]+/generations|/v1/batches")


# Routes that take files. What stands beside them, under the same beginning, reads its body into memory.
_TAKES_FILES = re.compile(r"/v1/datasets(/[^/]+/files)?|/v1/uploads|/api/v2/assets|/v1/images/edits")


def _is_upload(scope: Scope, headers: dict[bytes, bytes]) -> bool:
    """Whether the body is files, which go to disk; every other body is held in memory."""
    is_form = headers.get(b"content-type", b"").startswith(b"multipart/form-data")
    return is_form and _TAKES_FILES.fullmatch(scope["path"]) is not None


def _read_headers(scope: Scope) -> dict[bytes, bytes]:
    """By name. Of one that came twice it is the first, as for the routes: what is judged is what is read."""
    return dict(reversed(scope["headers"]))


class _Body:
    """A request's body as it comes: counted, because a chunked one has no length to refuse by, and in time."""

    def __init__(self, receive: Receive, allowed: int, timeout_s: float) -> None:
        self._receive, self._allowed, self._timeout_s = receive, allowed, timeout_s
        self._seen, self._deadline = 0, 0.0
        # What comes behind the body tells only that the client has gone: that may take for ever.
        self.is_over = False

    async def receive(self) -> Message:
        if self.is_over:
            return await self._receive()
        now = asyncio.get_running_loop().time()
        self._deadline = self._deadline or now + self._timeout_s
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._receive()
        except TimeoutError:
            raise HTTPException(408, f"The body did not come within {self._timeout_s:g} s.") from None
        if message["type"] == "http.request":
            self.is_over = not message.get("more_body", False)
            self._seen += len(message.get("body", b""))
            if self._seen > self._allowed:
                raise HTTPException(413, f"The body is larger than {self._allowed} bytes.")
        return message


class EdgeMiddleware:
    """Plain ASGI, so that streams pass untouched. Gives each request an id, refuses what is not to be read, logs and measures."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app, self._guard = app, Guard(settings)
        self._max_body_bytes, self._max_upload_bytes = settings.max_body_bytes, settings.max_upload_bytes
        self._max_batch_bytes = settings.max_batch_bytes
        self._max_picture_body_bytes = max(settings.max_body_bytes, settings.max_picture_body_bytes)
        self._body_timeout_s, self._upload_timeout_s = settings.body_timeout_s, settings.upload_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self._serve(scope, receive, send)
        elif scope["type"] == "websocket" and (refusal := await self._judge(scope, _read_headers(scope), 0)) is not None:
            await _answer(refusal, scope["path"])(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = _read_headers(scope)
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        identity = given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(8)
        token = request_id.set(identity)
        started, status, begun = time.perf_counter(), 500, False

        async def send_completed(message: Message) -> None:
            nonlocal status, begun
            if message["type"] == "http.response.start":
                begun, status = True, message["status"]
                message["headers"] = [*self._guard.complete(scope, message["headers"]), (b"x-request-id", identity.encode())]
                if status == 408:
                    # The rest of the body may still come; nobody waits for it.
                    message["headers"].append((b"connection", b"close"))
            await send(message)

        try:
            allowed = self._most(scope, headers)
            if (refusal := await self._judge(scope, headers, allowed)) is not None:
                await _answer(refusal, scope["path"])(scope, receive, send_completed)
            else:
                scope[BOX] = streams = list[EventStream]()
                body = _Body(receive, allowed, self._upload_timeout_s if _is_upload(scope, headers) else self._body_timeout_s)
                await self._app(scope, body.receive, send_completed)
                for stream in streams:
                    body.is_over = True
                    await stream.run(body.receive, send_completed)
        except Exception as error:  # boundary: a surprise gets its answer and its log line here, where the request still has an id
            log.error("unexpected error", exc_info=error)
            if begun:
                raise
            surprise = FluxgateError("The gateway met something it did not expect; its log says what.")
            await _answer(surprise, scope["path"])(scope, receive, send_completed)
        finally:
            self._record(scope, status, time.perf_counter() - started)
            request_id.reset(token)

    async def _judge(self, scope: Scope, headers: dict[bytes, bytes], allowed: int) -> FluxgateError | None:
        """Why this is answered before its body is read."""
        runtime = scope["app"].state.runtime
        is_open = runtime.doorkeeper.is_open
        try:
            self._guard.check(scope, headers, is_open=is_open)
            declared = headers.get(b"content-length", b"0")
            size = int(declared) if declared.isdigit() else 0
            if size > allowed:
                return PayloadTooLarge(f"The body is larger than {allowed} bytes.", details={"allowed": allowed})
            # A stranger's is not held in memory to tell it afterwards that it may not.
            if not is_open and (size > _SMALL_BYTES or b"transfer-encoding" in headers):
                await runtime.doorkeeper.identify(headers.get(b"authorization", b"").decode("latin-1"))
        except FluxgateError as error:
            return error
        return None

    def _most(self, scope: Scope, headers: dict[bytes, bytes]) -> int:
        """Bytes the body may have."""
        if _is_upload(scope, headers):
            return self._max_upload_bytes
        if scope["path"] == "/v1/batches":
            return self._max_batch_bytes
        return self._max_picture_body_bytes if _TAKES_PICTURES.fullmatch(scope["path"]) else self._max_body_bytes

    def _record(self, scope: Scope, status: int, elapsed_s: float) -> None:
        route = getattr(scope.get("route"), "path", "unmatched")
        runtime = getattr(scope["app"].state, "runtime", None)
        if runtime is not None:
            runtime.metrics.requests.labels(scope["method"], route, status).inc()
            runtime.metrics.request_s.labels(route).observe(elapsed_s)
        said = {"method": scope["method"], "path": scope["path"], "status": status, "ms": round(elapsed_s * 1000, 1)}
        log.info("request", extra={**said, "caller": scope.get("state", {}).get("caller")})
