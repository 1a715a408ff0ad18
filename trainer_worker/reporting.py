"""Beside the worker, a process that measures the machine and tells it, so that what cannot fit is refused before it is queued.

A process of its own, because the worker forks for each training, which a thread would not survive well.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gateway.errors import RedisUnavailable
from gateway.redis_client import connect_redis
from gateway.settings import Settings
from gateway.telemetry import configure_logging
from gateway.trainings.machines import TrainerMachines
from gateway.trainings.presets import Machine
from trainer_worker.machine import ask_smi, measure
from trainer_worker.process import Child

log = logging.getLogger(__name__)

REPORT_S = 10.0
LOG_NAME = "machine.log"


@contextmanager
def reporting(settings: Settings) -> Iterator[None]:
    """The process runs as long as this lasts, and not longer, however the worker ends."""
    folder = settings.training_dir.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    child = Child([sys.executable, "-m", "trainer_worker.reporting", str(os.getpid())], os.environ, folder / LOG_NAME)
    try:
        yield
    finally:
        child.close()


async def report(settings: Settings, worker: str) -> None:
    """For ever. Without nvidia-smi torch is asked once: each asking takes seconds and some memory of the GPU."""
    redis = connect_redis(settings.redis_url)
    machines, first = TrainerMachines(redis), None
    while True:
        machine = await asyncio.to_thread(_measure_again, settings, first)
        first = first or machine
        try:
            await machines.publish(worker, machine)
        except RedisUnavailable as error:
            log.warning("machine not reported", extra={"error": error.message})
        await asyncio.sleep(REPORT_S)


def _measure_again(settings: Settings, first: Machine | None) -> Machine:
    if first is None or ask_smi() is not None:
        return measure(settings)
    known = first.model_dump(include={"gpu", "gpu_name", "gpu_total_bytes"})
    without = settings.model_copy(update={"trainer": "tiny"})
    return measure(without).model_copy(update=known)


def main() -> None:
    settings = Settings()
    configure_logging(settings.log_level)
    asyncio.run(report(settings, f"{socket.gethostname()}-{Path(sys.argv[1]).name}"))


if __name__ == "__main__":
    main()
