"""The error tree, and that no foreign exception gets past the adapter that talks to the foreign system."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import boto3
import botocore.exceptions
import pytest
import redis.exceptions
from aiohttp import web

import gateway.errors
from gateway.comfy.client import ComfyClient, OutputFile
from gateway.errors import (
    FluxgateError,
    InstanceError,
    InstanceUnreachable,
    OutputMissing,
    PromptRejected,
    RedisUnavailable,
    StorageUnavailable,
)
from gateway.plain_http import PlainHttp
from gateway.redis_client import translate_redis
from gateway.settings import Settings
from gateway.storage import Storage
from local.child import pick_free_port


def descend(kind: type[BaseException]) -> Iterator[type[BaseException]]:
    yield kind
    for child in kind.__subclasses__():
        yield from descend(child)


# -- the tree --------------------------------------------------------------------------------------------------

TREE = [kind for kind in descend(FluxgateError) if kind.__module__ == "gateway.errors"]


def test_the_tree_drawn_on_top_is_the_tree() -> None:
    drawn = set(re.findall(r"^[│ ]*(?:[├└]── )?(\w+)(?: {2,}|$)", gateway.errors.__doc__ or "", re.M))
    assert {kind.__name__ for kind in TREE} <= drawn


@pytest.mark.parametrize("kind", TREE, ids=lambda kind: kind.__name__)
def test_every_error_has_a_code_of_its_own_and_one_shape(kind: type[FluxgateError]) -> None:
    assert re.fullmatch(r"[a-z][a-z_]+", kind.code)
    assert [other for other in TREE if getattr(other, "code", None) == kind.code] == [kind]
    assert 400 <= kind.status < 600
    error = kind("said", hint="do this", details={"value": 1}) if kind is not PromptRejected else kind("said")
    body = error.body()["error"]
    assert set(body) == {"code", "message", "hint", "details"}
    assert (body["code"], body["message"], str(error)) == (kind.code, "said", "said")
    json.dumps(error.body())


# -- Redis -----------------------------------------------------------------------------------------------------

REDIS_ERRORS = [
    *(kind for kind in descend(redis.exceptions.RedisError) if kind.__module__ == "redis.exceptions"),
    OSError,
    ConnectionResetError,
    TimeoutError,
]


def make(kind: type[BaseException]) -> BaseException:
    """An instance of a foreign class, whatever its constructor wants."""
    error = kind.__new__(kind)
    Exception.__init__(error, "foreign words")
    if isinstance(error, botocore.exceptions.ClientError):
        error.response = {}
    return error


@pytest.mark.parametrize("kind", REDIS_ERRORS, ids=lambda kind: kind.__name__)
async def test_redis_errors_leave_as_ours(kind: type[BaseException]) -> None:
    @translate_redis
    async def break_down() -> None:
        raise make(kind)

    with pytest.raises(RedisUnavailable) as caught:
        await break_down()
    assert isinstance(caught.value.__cause__, kind)


@pytest.mark.parametrize("kind", [ValueError, KeyError, asyncio.CancelledError])
async def test_what_is_not_of_redis_passes(kind: type[BaseException]) -> None:
    @translate_redis
    async def break_down() -> None:
        raise kind("own fault")

    with pytest.raises(kind):
        await break_down()


# -- S3 --------------------------------------------------------------------------------------------------------

BOTO_ERRORS = [
    kind
    for root in (botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError)
    for kind in descend(root)
    if kind.__module__ == "botocore.exceptions"
]


@pytest.mark.parametrize("kind", BOTO_ERRORS, ids=lambda kind: kind.__name__)
async def test_botocore_errors_leave_as_ours(kind: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    """Raised by a hook that botocore itself calls before each request."""

    def break_down(**_: Any) -> None:
        raise make(kind)

    session = boto3.session.Session()
    session.events.register("before-parameter-build.s3", break_down)
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", session)
    storage = Storage(Settings.model_validate({"aws_access_key_id": "a", "aws_secret_access_key": "b"}))
    with pytest.raises(StorageUnavailable) as caught:
        await storage.get("k")
    assert isinstance(caught.value.__cause__, kind)
    storage.close()


# -- ComfyUI ---------------------------------------------------------------------------------------------------

Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


@asynccontextmanager
async def instance_that(answer: Answer) -> AsyncIterator[ComfyClient]:
    """A client, as a dispatcher has one, of a server that answers everything in one way."""
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    port, plain = pick_free_port(), PlainHttp()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    try:
        async with aiohttp.ClientSession() as session:
            yield ComfyClient(f"http://127.0.0.1:{port}", session, timeout_s=0.3, plain=plain)
    finally:
        plain.close()
        await runner.cleanup()


def list_calls(client: ComfyClient) -> dict[str, Awaitable[Any]]:
    """Every request the gateway makes of an instance."""
    return {
        "submit": client.submit("p", "c", b"{}"),
        "queue": client.queue(),
        "history": client.history("p"),
        "view": client.view(OutputFile("a.png", "", "output")),
        "drop": client.drop("p"),
        "interrupt": client.interrupt("p"),
        "object_info": client.object_info(),
        "system_stats": client.system_stats(),
        "model_names": client.model_names("loras"),
        "model_metadata": client.model_metadata("loras", "a"),
    }


async def collect(client: ComfyClient) -> dict[str, BaseException | None]:
    """What each call raised."""
    calls = list_calls(client)
    said = await asyncio.gather(*calls.values(), return_exceptions=True)
    return {name: one if isinstance(one, BaseException) else None for name, one in zip(calls, said, strict=True)}


async def hang_up(request: web.Request) -> web.StreamResponse:
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


async def stop_in_the_middle(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Length": "1000"})
    await response.prepare(request)
    await response.write(b"{")
    assert request.transport is not None
    request.transport.abort()
    return response


async def say_nothing(request: web.Request) -> web.StreamResponse:
    await asyncio.sleep(1)
    return web.Response()


@pytest.mark.parametrize("answer", [hang_up, stop_in_the_middle, say_nothing], ids=lambda answer: answer.__name__)
async def test_an_instance_that_breaks_off_is_unreachable(answer: Answer) -> None:
    async with instance_that(answer) as client:
        for name, error in (await collect(client)).items():
            assert isinstance(error, InstanceUnreachable), name
            assert isinstance(error.__cause__, aiohttp.ClientError | OSError), name


async def test_an_instance_that_is_not_there_is_unreachable() -> None:
    async with aiohttp.ClientSession() as session:
        for name, error in (await collect(ComfyClient(f"http://127.0.0.1:{pick_free_port()}", session))).items():
            assert isinstance(error, InstanceUnreachable), name


async def test_an_instance_that_fails_inside_is_an_instance_error() -> None:
    async def fail(request: web.Request) -> web.StreamResponse:
        return web.Response(status=500, text="500 Internal Server Error")

    async with instance_that(fail) as client:
        errors = await collect(client)
    silent = {name for name, error in errors.items() if error is None}
    assert silent == {"drop", "interrupt", "model_metadata"}, "these ask for nothing that could be wrong"
    assert all(isinstance(error, InstanceError) for name, error in errors.items() if name not in silent)
    assert isinstance(errors["view"], OutputMissing)
    assert not isinstance(errors["submit"], PromptRejected), "a 500 says nothing about the graph"


async def test_an_answer_that_is_elsewhere_is_fetched_there() -> None:
    async def send_on(request: web.Request) -> web.StreamResponse:
        if request.path == "/else":
            return web.Response(body=b"picture")
        raise web.HTTPFound("/else")

    async with instance_that(send_on) as client:
        assert await client.view(OutputFile("a b&c.png", "f", "output")) == b"picture"


async def test_an_instance_that_speaks_no_json_is_an_instance_error() -> None:
    async def greet(request: web.Request) -> web.StreamResponse:
        return web.Response(text="<html>Welcome</html>")

    async with instance_that(greet) as client:
        errors = await collect(client)
    for name in ("submit", "queue", "history", "object_info", "system_stats", "model_names"):
        assert isinstance(errors[name], InstanceError), name


async def test_a_dropped_branch_is_a_rejection() -> None:
    report = {"5": {"class_type": "K", "errors": [], "dependent_outputs": ["9"]}}

    async def accept_half(request: web.Request) -> web.StreamResponse:
        return web.json_response({"prompt_id": "p", "number": 1, "node_errors": report})

    async with instance_that(accept_half) as client:
        with pytest.raises(PromptRejected) as refused:
            await client.submit("p", "c", b"{}")
    assert refused.value.node_errors == report
