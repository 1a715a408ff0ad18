"""Beside the worker, a second one for imports of LoRAs: they need no GPU, and shall not wait for a training of hours."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from gateway.redis_client import IMPORT_QUEUE, work_on
from gateway.settings import Settings
from gateway.telemetry import configure_logging
from trainer_worker.process import Child

LOG_NAME = "imports.log"


@contextmanager
def importing(settings: Settings) -> Iterator[None]:
    """The process runs as long as this lasts, and not longer, however the worker ends."""
    folder = settings.training_dir.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    child = Child([sys.executable, "-m", "trainer_worker.importing"], os.environ, folder / LOG_NAME)
    try:
        yield
    finally:
        child.close()


def main() -> None:
    settings = Settings()
    configure_logging(settings.log_level)
    work_on(settings.redis_url, IMPORT_QUEUE)


if __name__ == "__main__":
    main()
