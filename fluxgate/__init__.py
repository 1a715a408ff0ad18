"""The client of a Fluxgate gateway: `Client`, its answers and its errors. `fluxgate.cli` is the same on the command line."""

from fluxgate.client import Client
from fluxgate.errors import ApiError, FluxgateError, Unreachable
from fluxgate.wire import Batch, BatchItem, Event, Job, JobError, Lora, Output, Page, Progress

__all__ = [
    "ApiError",
    "Batch",
    "BatchItem",
    "Client",
    "Event",
    "FluxgateError",
    "Job",
    "JobError",
    "Lora",
    "Output",
    "Page",
    "Progress",
    "Unreachable",
]
