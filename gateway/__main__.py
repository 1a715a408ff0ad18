"""`python -m gateway`: the HTTP service, with the dispatcher inside unless DISPATCHER=off."""

from __future__ import annotations

import sys

import uvicorn
from pydantic import ValidationError

from comfy_workflows.errors import WorkflowError
from gateway.app import create_app
from gateway.auth import refuse_unsafe_binding
from gateway.errors import FluxgateError
from gateway.settings import Settings
from gateway.telemetry import configure_logging


def main() -> int:
    """Serve until told to stop. A deployment that cannot work is refused with one line."""
    try:
        settings = Settings()
        refuse_unsafe_binding(settings)
        configure_logging(settings.log_level)
        app = create_app(settings)
    except ValidationError as error:
        for fault in error.errors():
            print(f"fluxgate: {'.'.join(map(str, fault['loc'])).upper()}={fault.get('input')!r}: {fault['msg']}", file=sys.stderr)
        return 2
    except (FluxgateError, WorkflowError) as error:
        print(f"fluxgate: {error.message} {error.hint or ''}".rstrip(), file=sys.stderr)
        return 2
    uvicorn.run(app, host=settings.host, port=settings.port, log_config=None, access_log=False, timeout_graceful_shutdown=5)
    return 0


if __name__ == "__main__":
    sys.exit(main())
