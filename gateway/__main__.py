"""`python -m gateway`: the HTTP service, with the dispatcher inside unless DISPATCHER=off.

`python -m gateway keys` is about its keys, `... doctor` about all it stands on, `... models` about base models.
"""

from __future__ import annotations

import asyncio
import sys
from contextlib import suppress
from types import FrameType

import uvicorn
from fastapi import FastAPI
from pydantic import ValidationError

from comfy_workflows.errors import WorkflowError
from gateway.app import create_app
from gateway.auth import UnsafeBinding, refuse_unsafe_binding
from gateway.callers.command import run_keys_command
from gateway.callers.keys import KeyStore
from gateway.doctor.command import run_doctor
from gateway.edge.protocol import BoundedProtocol
from gateway.errors import FluxgateError, RedisUnavailable
from gateway.models.command import run_models_command
from gateway.process import allow_many_files, collect_rarely
from gateway.redaction import hide_user
from gateway.redis_client import connect_redis
from gateway.settings import Settings, is_secret
from gateway.state_version import prepare_state_at
from gateway.telemetry import configure_logging

STOP_S = 10
# Longer than clients and proxies keep theirs: a connection is never closed under a request that is on its way.
KEEP_ALIVE_S = 90
# Clients of WebSockets only listen: what they say is a ping.
MAX_MESSAGE_BYTES = 4096
COMMANDS = {"keys": run_keys_command, "doctor": run_doctor, "models": run_models_command}


class GatewayServer(uvicorn.Server):
    """On the first signal open streams are told to reconnect, so that the stop need not wait for them."""

    def __init__(self, config: uvicorn.Config, app: FastAPI) -> None:
        super().__init__(config)
        self._app = app

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        runtime = getattr(self._app.state, "runtime", None)
        if runtime is not None:
            # A signal comes between any two instructions: the loop does it when it is ready.
            self._app.state.loop.call_soon_threadsafe(runtime.feed.close)
        super().handle_exit(sig, frame)


async def _has_keys(settings: Settings) -> bool:
    redis = connect_redis(settings.redis_url)
    try:
        return await KeyStore(redis).version() > 0
    finally:
        await redis.aclose(close_connection_pool=True)


def _refuse_unsafe_binding(settings: Settings) -> None:
    """Keys are looked for only where they decide: a loopback gateway starts before its Redis."""
    try:
        refuse_unsafe_binding(settings)
    except UnsafeBinding as unsafe:
        try:
            found = asyncio.run(_has_keys(settings))
        except RedisUnavailable as error:
            raise UnsafeBinding(f"{unsafe.message} Keys could not be looked for: {error.message}.") from error
        refuse_unsafe_binding(settings, has_keys=found)


def _prepare_state(settings: Settings) -> None:
    """Refuse a newer state before anything listens. Where Redis is not there yet, the runtime does it when it is."""
    with suppress(RedisUnavailable):
        asyncio.run(prepare_state_at(settings.redis_url))


def main() -> int:
    """Serve until told to stop. A deployment that cannot work is refused with one line."""
    try:
        command = COMMANDS.get(sys.argv[1]) if len(sys.argv) > 1 else None
        if command is not None:
            return command(sys.argv[2:], Settings())
        settings = Settings()
        _refuse_unsafe_binding(settings)
        configure_logging(settings.log_level)
        _prepare_state(settings)
        app = create_app(settings)
        allow_many_files()
        collect_rarely()
    except ValidationError as error:
        for fault in error.errors():
            name = ".".join(map(str, fault["loc"]))
            shown = "…" if is_secret(name) else repr(hide_user(str(fault.get("input"))))
            print(f"fluxgate: {name.upper()}={shown}: {fault['msg']}", file=sys.stderr)
        return 2
    except (FluxgateError, WorkflowError) as error:
        print(f"fluxgate: {error.message} {error.hint or ''}".rstrip(), file=sys.stderr)
        return 2
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=STOP_S,
        timeout_keep_alive=KEEP_ALIVE_S,
        ws_max_size=MAX_MESSAGE_BYTES,
        http=BoundedProtocol,
    )
    GatewayServer(config, app).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
