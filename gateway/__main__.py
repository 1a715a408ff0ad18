"""`python -m gateway`: the HTTP service, with the dispatcher inside unless DISPATCHER=off."""

from __future__ import annotations

import sys
from types import FrameType

import uvicorn
from fastapi import FastAPI
from pydantic import ValidationError

from comfy_workflows.errors import WorkflowError
from gateway.app import create_app
from gateway.auth import refuse_unsafe_binding
from gateway.errors import FluxgateError
from gateway.process import allow_many_files, collect_rarely
from gateway.settings import Settings, is_secret
from gateway.telemetry import configure_logging

STOP_S = 10
# Longer than clients and proxies keep theirs: a connection is never closed under a request that is on its way.
KEEP_ALIVE_S = 90
# Clients of WebSockets only listen: what they say is a ping.
MAX_MESSAGE_BYTES = 4096


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


def main() -> int:
    """Serve until told to stop. A deployment that cannot work is refused with one line."""
    try:
        settings = Settings()
        refuse_unsafe_binding(settings)
        configure_logging(settings.log_level)
        app = create_app(settings)
        allow_many_files()
        collect_rarely()
    except ValidationError as error:
        for fault in error.errors():
            name = ".".join(map(str, fault["loc"]))
            shown = "…" if is_secret(name) else repr(fault.get("input"))
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
    )
    GatewayServer(config, app).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
