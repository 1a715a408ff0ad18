"""What a failed prompt means to the caller: ComfyUI's reports in our error shape, without tensors, graph or paths. Pure."""

from __future__ import annotations

import re
from typing import Any

from gateway.comfy.messages import ErrorData
from gateway.errors import PromptRejected
from gateway.jobs.model import JobError

# An absolute path, POSIX, drive or share, its folders' names with a few blanks at most: no URL, and no slash between two numbers.
_NAME = r"[^\s/\\'\",;:<>|]+"
_PATH = re.compile(rf"(?<![\w:/\\.])(?:[A-Za-z]:\\|\\\\|/)(?:{_NAME}(?: {_NAME}){{0,3}}[\\/])+{_NAME}")
_TENSOR = re.compile(r"tensor\([^()]*(?:\([^()]*\)[^()]*)*\)")
# What is longer than a person reads is cut before anything else looks at it: messages may quote whole prompts.
_MAX_RAW, _MAX_MESSAGE = 4000, 500
_OUT_OF_MEMORY = ("OutOfMemoryError", "torch.cuda.OutOfMemoryError", "torch.OutOfMemoryError")


def clean(message: str) -> str:
    """The first paragraph, shortened, without tensors; file paths are replaced by the file's name."""
    # ComfyUI appends tips for its own users after a newline.
    first = message[:_MAX_RAW].strip().split("\n\n")[0].split("\nTips")[0].strip()
    told = _PATH.sub(lambda match: re.split(r"[\\/]", match.group())[-1], _TENSOR.sub("<tensor>", first))
    return told[:_MAX_MESSAGE]


def _title(graph: dict[str, Any], node_id: str | None) -> str:
    node = graph.get(node_id or "", {})
    return str(node.get("_meta", {}).get("title") or node.get("class_type") or node_id or "a node")


def describe_node_error(error: ErrorData, graph: dict[str, Any]) -> JobError:
    """A node raised: its title and class, and what it said."""
    title, said = _title(graph, error.node_id), clean(error.exception_message)
    details = {"node": title, "node_class": error.node_type, "node_id": error.node_id, "exception": error.exception_type}
    if error.exception_type in _OUT_OF_MEMORY or "out of memory" in said.lower():
        return JobError(
            code="out_of_memory",
            message=f"The instance ran out of memory in {title!r}.",
            hint="Ask for a smaller size or fewer images, or choose a quantised base model.",
            details=details,
        )
    return JobError(code="node_error", message=f"{title!r} ({error.node_type}) failed: {said}", details=details)


def _say(error: dict[str, Any]) -> str:
    said = str(error.get("details") or error.get("message") or "")
    # ComfyUI goes on to list every file it has: names of other callers' LoRAs among them.
    return said.partition(" not in ")[0] + " is not there" if error.get("type") == "value_not_in_list" else said


def misses_a_value(rejection: PromptRejected) -> bool:
    """Whether a value was not among an input's choices: as when a file went after the job was placed."""
    reports = (report.get("errors") or [] for report in rejection.node_errors.values())
    return any(error.get("type") == "value_not_in_list" for errors in reports for error in errors)


def describe_rejection(rejection: PromptRejected, graph: dict[str, Any]) -> JobError:
    """ComfyUI refused the graph: which node, which input, why."""
    nodes = []
    for node_id, report in rejection.node_errors.items():
        for error in report.get("errors") or []:
            nodes.append(
                {
                    "node": _title(graph, node_id),
                    "node_id": node_id,
                    "node_class": report.get("class_type"),
                    "problem": error.get("type"),
                    "input": (error.get("extra_info") or {}).get("input_name"),
                    "message": clean(_say(error)),
                }
            )
    first = nodes[0] if nodes else None
    said = f"{first['node']!r}: {first['problem']} ({first['message']})" if first else clean(rejection.message)
    return JobError(
        code=rejection.code,
        message=f"The instance refused the graph: {said}",
        hint="The workflow needs a node class, model file or value that this instance does not have.",
        details={"nodes": nodes},
    )
