"""The client of a Fluxgate gateway: `Client` and `AsyncClient`, their answers and their errors. `fluxgate.cli` is the same on the
command line, `fluxgate.notebook` in a notebook."""

from fluxgate.client import AsyncClient, Client
from fluxgate.errors import ApiError, FluxgateError, Silent, Unreachable
from fluxgate.wire import (
    BaseModelInfo,
    Batch,
    BatchItem,
    Dataset,
    DatasetFile,
    Event,
    Job,
    JobError,
    Lora,
    LoraInfo,
    Output,
    Page,
    Preflight,
    Problem,
    Progress,
    Sample,
    Training,
    Upload,
    Workflow,
)

__all__ = [
    "ApiError",
    "AsyncClient",
    "BaseModelInfo",
    "Batch",
    "BatchItem",
    "Client",
    "Dataset",
    "DatasetFile",
    "Event",
    "FluxgateError",
    "Job",
    "JobError",
    "Lora",
    "LoraInfo",
    "Output",
    "Page",
    "Preflight",
    "Problem",
    "Progress",
    "Sample",
    "Silent",
    "Training",
    "Unreachable",
    "Upload",
    "Workflow",
]
