"""Every error of the workflow library, and how names and values are shortened to stand in one.

It knows what a caller or a folder's author must be told; it knows nothing of HTTP.

WorkflowError
├── UnknownWorkflow     workflow_not_found      no folder of that name
├── UnknownBaseModel    base_model_not_found    not in base_models.toml
├── ParameterError
│   ├── InvalidParameter    invalid_parameter   missing, of the wrong type, out of range
│   └── UnknownParameter    unknown_parameter   the workflow declares no such name
├── FamilyMismatch      family_mismatch         a LoRA or base model made for another family
├── RawGraphError
│   ├── InvalidGraph        invalid_workflow    a caller's own graph holds what may not be run
│   ├── EditorGraph         workflow_format_ui  it is in the editor's own format
│   └── MissingAsset        missing_asset       it names an asset that is not there
└── BrokenWorkflow      broken_workflow         for the author: bad bindings, titles, export
"""

import difflib
import json
import math
import reprlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

LONGEST_SHOWN_VALUE = 200
MOST_FAULTS_SHOWN = 20
# Below this likeness a suggestion confuses more than it helps ("steps" for "prompt").
LEAST_LIKENESS = 0.5


class WorkflowError(Exception):
    code: ClassVar[str] = "workflow_error"

    def __init__(self, message: str, *, hint: str | None = None, details: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.details = details or {}


class UnknownWorkflow(WorkflowError):
    code = "workflow_not_found"

    def __init__(self, name: str, known: Iterable[str]) -> None:
        message, hint, details = _describe_unknown("workflow", name, known)
        super().__init__(message, hint=hint, details=details)


class UnknownBaseModel(WorkflowError):
    code = "base_model_not_found"

    def __init__(self, name: str, known: Iterable[str]) -> None:
        message, hint, details = _describe_unknown("base model", name, known)
        super().__init__(message, hint=hint, details={"parameter": "base_model", **details})


@dataclass(frozen=True)
class ParameterFault:
    """One thing wrong with one parameter of a request; `value` is already shortened and JSON-able."""

    code: str
    parameter: str
    message: str
    value: Any = None
    allowed: Any = None
    nearest: Any = None

    def to_details(self) -> dict[str, Any]:
        details = {"code": self.code, "parameter": self.parameter, "message": self.message}
        return details | {"value": self.value, "allowed": self.allowed, "nearest": self.nearest}


class ParameterError(WorkflowError):
    """Carries every fault of a request: the first one's fields on top, all under `details["parameters"]`."""

    def __init__(self, faults: Sequence[ParameterFault]) -> None:
        first = faults[0]
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        hint = f"did you mean {first.nearest!r}?" if first.nearest is not None else None
        shown = [fault.to_details() for fault in faults[:MOST_FAULTS_SHOWN]]
        top = {key: value for key, value in shown[0].items() if key not in ("code", "message")}
        super().__init__(first.message + more, hint=hint, details={**top, "parameters": shown})


class InvalidParameter(ParameterError):
    code = "invalid_parameter"


class UnknownParameter(ParameterError):
    code = "unknown_parameter"


class FamilyMismatch(WorkflowError):
    code = "family_mismatch"

    def __init__(self, noun: str, name: str, family: str, *, wanted_by: str, wanted: Sequence[str], hint: str) -> None:
        message = f"{noun} {quote(name)} belongs to family {family!r}, but {wanted_by} needs {' or '.join(map(repr, wanted))}"
        parameter = "base_model" if noun == "base model" else "loras"
        super().__init__(
            message, hint=hint, details={"parameter": parameter, "value": shorten(name), "family": family, "allowed": list(wanted)}
        )


class BrokenWorkflow(WorkflowError):
    """`details["problems"]` lists everything found wrong in the folder, `message` says the first."""

    code = "broken_workflow"

    def __init__(self, workflow: str, problems: Sequence[str], *, hint: str | None = None) -> None:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        details = {"workflow": workflow, "problems": list(problems)}
        super().__init__(f"workflow {workflow!r}: {problems[0]}{more}", hint=hint, details=details)


class RawGraphError(WorkflowError):
    """A graph that a caller brought cannot be taken."""


class InvalidGraph(RawGraphError):
    """`details["node_errors"]` lists by node id what is wrong, `message` says the first."""

    code = "invalid_workflow"


class EditorGraph(RawGraphError):
    code = "workflow_format_ui"

    def __init__(self) -> None:
        hint = "in the editor choose the menu Workflow -> Export (API)"
        super().__init__("the workflow is in the editor's own format, which ComfyUI does not run", hint=hint)


class MissingAsset(RawGraphError):
    code = "missing_asset"

    def __init__(self, node_id: str, name: str, asset_id: Any) -> None:
        details = {"node_id": node_id, "input": name, "value": shorten(asset_id)}
        super().__init__(f"node {node_id}, input {name!r}: there is no asset {quote(asset_id)}", details=details)


def find_nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name most like `name` whatever its case, or None when none is alike."""
    by_folded = {candidate.casefold(): candidate for candidate in known}
    found = difflib.get_close_matches(name[:LONGEST_SHOWN_VALUE].casefold(), by_folded, n=1, cutoff=LEAST_LIKENESS)
    return by_folded[found[0]] if found else None


def shorten(value: Any, longest: int = LONGEST_SHOWN_VALUE) -> Any:
    """`value` as it may stand in an error: encodable as UTF-8 JSON, and no longer than `longest` characters."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return value if value.bit_length() <= 128 else f"an integer of {value.bit_length()} bits"
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if not isinstance(value, str):
        # reprlib bounds the depth as well: a deeply nested body must not exhaust the stack here.
        value = reprlib.repr(value)
    text = value if len(value) <= longest else f"{value[: longest - 1]}…"
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def quote(value: Any) -> str:
    """A value inside a sentence, written as JSON so that `true`, `null` and control characters look as they were sent."""
    shown = shorten(value, longest=60)
    is_container = isinstance(shown, str) and not isinstance(value, str)
    return str(shown) if is_container else json.dumps(shown, ensure_ascii=False)


def _describe_unknown(noun: str, name: str, known: Iterable[str]) -> tuple[str, str | None, dict[str, Any]]:
    names = sorted(known)
    nearest = find_nearest(name, names)
    hint = f"did you mean {nearest!r}?" if nearest else f"known: {', '.join(names) or 'none'}"
    return f"there is no {noun} {quote(name)}", hint, {"value": shorten(name), "allowed": names, "nearest": nearest}
