"""`python -m trainer_worker`: waits for trainings and works on one at a time. A second worker on another GPU is a second process."""

from __future__ import annotations

from gateway.redis_client import TRAINING_QUEUE, work_on
from gateway.settings import Settings
from gateway.telemetry import configure_logging
from trainer_worker.importing import importing
from trainer_worker.reporting import reporting


def main() -> None:
    settings = Settings()
    configure_logging(settings.log_level)
    with reporting(settings), importing(settings):
        work_on(settings.redis_url, TRAINING_QUEUE)


if __name__ == "__main__":
    main()
