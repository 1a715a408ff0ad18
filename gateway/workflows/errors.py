"""The workflow library's errors in the gateway's tree."""

from __future__ import annotations

from comfy_workflows.errors import UnknownWorkflow, WorkflowError
from gateway.errors import FluxgateError, NotFound, Unprocessable


def translate_workflow_error(error: WorkflowError) -> FluxgateError:
    """A workflow that is not there is absent; whatever else is wrong does not fit one."""
    kind = NotFound if isinstance(error, UnknownWorkflow) else Unprocessable
    return kind(error.message, code=error.code, hint=error.hint, details=error.details)
