"""`python -m trainer_worker`: waits for trainings and works on one at a time. A second worker on another GPU is a second process."""

from __future__ import annotations

import asyncio
import sys

from gateway.errors import FluxgateError
from gateway.moderation.judges import open_judge
from gateway.redis_client import TRAINING_QUEUE, work_on
from gateway.settings import Settings
from gateway.state_version import prepare_state_at
from gateway.telemetry import configure_logging
from trainer_worker.importing import importing
from trainer_worker.reporting import reporting


def main() -> int:
    """Until told to stop. A state that cannot be worked on, or no Redis, is refused with one line."""
    settings = Settings()
    configure_logging(settings.log_level)
    try:
        open_judge(settings, None)
        asyncio.run(prepare_state_at(settings.redis_url))
    except FluxgateError as error:
        print(f"fluxgate: {error.message} {error.hint}", file=sys.stderr)
        return 2
    with reporting(settings), importing(settings):
        work_on(settings.redis_url, TRAINING_QUEUE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
