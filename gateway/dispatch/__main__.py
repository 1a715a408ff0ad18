"""`python -m gateway.dispatch`: a dispatcher in a process of its own."""

from __future__ import annotations

import asyncio
import signal
import sys

import uvloop

from gateway.moderation.judges import JudgeBroken
from gateway.process import allow_many_files, collect_rarely
from gateway.runtime import open_runtime
from gateway.settings import Settings
from gateway.state_version import StateRefused
from gateway.telemetry import configure_logging


async def _run(settings: Settings) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for name in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(name, stop.set)
    async with open_runtime(settings, dispatch=True):
        await stop.wait()


def main() -> int:
    """Until told to stop. A state that cannot be worked on, or a judge that cannot be asked, is refused with one line."""
    settings = Settings()
    configure_logging(settings.log_level)
    allow_many_files()
    collect_rarely()
    try:
        uvloop.run(_run(settings))
    except (StateRefused, JudgeBroken) as error:
        print(f"fluxgate: {error.message} {error.hint}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
