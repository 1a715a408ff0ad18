"""Writes the reference pages beside this file from the code they describe: `python docs/generate.py`.

A test compares the pages with what this would write, so a setting, route, code or event kind cannot go undocumented.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import sys
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

from pydantic_core import PydanticUndefined

import comfy_workflows.errors
import gateway.errors
from comfy_workflows.errors import WorkflowError
from gateway.app import create_app
from gateway.errors import FluxgateError
from gateway.jobs.model import EventKind, Job, JobError, JobSpec, JobStatus, Output, Progress
from gateway.outside.hub_files import PullFailed
from gateway.presentation import present_job, present_output
from gateway.settings import Settings
from gateway.storage import Storage
from gateway.workflows.errors import translate_workflow_error

HERE = Path(__file__).parent
ROOT = HERE.parent
HEAD = "<!-- Written by docs/generate.py; edit the code it reads instead. -->\n\n"
HOME = "http://127.0.0.1:8000"


def tabulate(titles: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [titles := list(titles), ["---"] * len(titles), *(list(row) for row in rows)]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|').replace(chr(10), ' ') for cell in line)} |\n" for line in lines)


# -- settings --------------------------------------------------------------------------------------------------


def show_default(default: Any) -> str:
    if default is None or default is PydanticUndefined:
        return ""
    return f"`{','.join(map(str, default)) if isinstance(default, tuple) else default}`"


def write_settings() -> str:
    rows = [(f"`{name.upper()}`", show_default(field.default), field.description or "") for name, field in Settings.model_fields.items()]
    return f"{HEAD}# Settings\n\nAll are read from the environment, once, at start.\n\n{tabulate(('Name', 'Default', 'Meaning'), rows)}"


# -- errors ----------------------------------------------------------------------------------------------------


class Code(NamedTuple):
    """A code as it stands in the source: `owner` is the class that has it (`is_own`), or that is raised with it."""

    code: str
    owner: str
    meaning: str
    hint: str
    is_own: bool = False


def read_text(node: ast.AST | None) -> str:
    """A message's words, with `…` for what is inserted; empty for anything that is not written out."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(read_text(part) if isinstance(part, ast.Constant) else "…" for part in node.values)
    if isinstance(node, ast.IfExp):
        return read_text(node.body)
    return ""


def read_class_code(node: ast.ClassDef) -> Iterator[Code]:
    values = {
        ast.unparse(line.targets[0] if isinstance(line, ast.Assign) else line.target): line.value
        for line in node.body
        if isinstance(line, ast.Assign | ast.AnnAssign)
    }
    if code := read_text(values.get("code")):
        yield Code(code, node.name, (ast.get_docstring(node) or "").split("\n")[0], read_text(values.get("hint")), True)


def find_codes(source: str) -> Iterator[Code]:
    """Every error code written in a source: `code = "..."` of a class, `code="..."` of a call, `DeadlinePassed("...")`.

    A call without a code tells what its class is used to say; it comes with an empty one.
    """
    nodes = list(ast.walk(ast.parse(source)))
    assigned = [(node.lineno, ast.unparse(node.targets[0]), read_text(node.value)) for node in nodes if isinstance(node, ast.Assign)]

    def say(node: ast.AST | None) -> str:
        if isinstance(node, ast.Name):
            before = [(line, text) for line, name, text in assigned if name == node.id and line < node.lineno and text]
            return max(before)[1] if before else ""
        return read_text(node)

    for node in nodes:
        if isinstance(node, ast.ClassDef):
            yield from read_class_code(node)
        elif isinstance(node, ast.Call):
            given = {keyword.arg: keyword.value for keyword in node.keywords}
            first, owner = node.args[0] if node.args else None, ast.unparse(node.func)
            if owner == "DeadlinePassed":
                yield Code(say(first), owner, say(node.args[1]), "")
            elif "code" not in given or read_text(given["code"]):
                yield Code(read_text(given.get("code")), owner, say(given.get("message", first)), say(given.get("hint")))


def read_tree(docstring: str) -> dict[str, str]:
    """Class -> what the tree drawn at the top of an errors module says of it."""
    lines = re.findall(r"[├└]── (\w+)[ ]*(?:\d{3})?[ ]*([a-z_]+_[a-z_]+(?=  ))?[ ]*(.*)", docstring)
    return {name: said for name, _, said in lines}


def collect_statuses() -> dict[str, int]:
    """Class -> HTTP status, for every error that can be an answer."""

    def descend(kind: type[Any]) -> Iterator[type[Any]]:
        yield kind
        for child in kind.__subclasses__():
            yield from descend(child)

    found = {kind.__name__: int(kind.status) for kind in descend(FluxgateError)}
    for kind in descend(WorkflowError):
        error = Exception.__new__(kind)
        WorkflowError.__init__(error, "")
        found[kind.__name__] = translate_workflow_error(error).status
    return found


# Codes whose status is not their class's: said at the place that answers.
STATUSES = {"method_not_allowed": 405}
# Never an answer: they stop a start or a command, or a folder from being accepted.
AT_START = {"UnsafeBinding", "BrokenWorkflow", "StateRefused", PullFailed.__name__}
# What becomes the `error` of a job.
ENDINGS = {"JobError", "DeadlinePassed"}


def collect_codes() -> list[Code]:
    """All codes, and for every class its first message as one with an empty code."""
    sources = [path.read_text() for package in ("gateway", "comfy_workflows") for path in sorted((ROOT / package).rglob("*.py"))]
    return [code for source in sources for code in find_codes(source)]


def tabulate_codes(titles: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    return tabulate(titles, ((f"`{code}`", *rest) for code, *rest in sorted(rows)))


def write_errors() -> str:
    found, statuses = collect_codes(), collect_statuses()
    tree = read_tree(gateway.errors.__doc__ or "") | read_tree(comfy_workflows.errors.__doc__ or "")
    said = {code.owner: code.meaning for code in reversed(found) if code.meaning and not code.code}
    answers, endings, starts = dict[str, tuple[str, ...]](), dict[str, tuple[str, ...]](), dict[str, tuple[str, ...]]()
    for code, owner, message, hint, is_own in found:
        if not code or owner not in statuses.keys() | ENDINGS:
            continue
        meaning = tree.get(owner) or said.get(owner) or message if is_own else message
        row = (code, meaning, hint)
        if owner in AT_START:
            starts.setdefault(code, row)
        elif owner in ENDINGS:
            endings.setdefault(code, row)
        else:
            status = str(STATUSES.get(code, statuses[owner]))
            known = answers.get(code, (code, status, meaning, hint))
            # One code can be said with two statuses: of a thing in the address (404), and of one in the body (422).
            answers[code] = (code, ", ".join(sorted({*known[1].split(", "), status})), *known[2:])
    # An instance's refusal is called the same on the job as in the exception that brought it.
    endings["graph_rejected"] = ("graph_rejected", *answers["graph_rejected"][2:])
    return f"""{HEAD}# Errors

Every error has one shape: `{{"error": {{"code", "message", "hint", "details"}}}}`. Codes are stable; messages are not.

## Answers

{tabulate_codes(("Code", "Status", "Meaning", "Hint"), answers.values())}
## Jobs

A job that did not succeed carries one of these in `error`.

{tabulate_codes(("Code", "Meaning", "Hint"), endings.values())}
## At start

What stops a process before it serves, or a command.

{tabulate_codes(("Code", "Meaning", "Hint"), starts.values())}"""


# -- events ----------------------------------------------------------------------------------------------------


class _UnsignedStorage:
    """Stands where pages want an address that is the same every time they are written."""

    def sign(self, key: str) -> str:
        return f"https://s3.example/fluxgate/{key}?X-Amz-Signature=..."


def make_examples() -> dict[EventKind, Any]:
    """What each kind's data looks like, made by the code that makes the real ones."""
    storage = cast(Storage, _UnsignedStorage())
    job_id = "gen_0198f2a4c1003f9c2b7d5e8a6104"
    output = Output(
        index=0, key=f"generations/{job_id}/0.png", content_type="image/png", size_bytes=312044, sha256="9f2c...", width=1024, height=1024
    )
    progress = Progress(value=0.62, nodes_done=7, nodes_total=13, current_node="Sample", current_node_class="SamplerCustomAdvanced")
    spec = JobSpec(
        id=job_id,
        caller="local",
        workflow="flux",
        workflow_version="3f1c9a",
        base_model="flux1-dev",
        parameters={"prompt": "a red circle"},
        seed=7,
        created_ms=1767225600000,
    )
    job = Job(spec=spec, status=JobStatus.RUNNING, attempts=1, instance="127.0.0.1-8188", started_ms=1767225600420)
    error = JobError(code="out_of_memory", message="The instance ran out of memory in 'Sample'.", details={"node": "Sample"})
    return {
        EventKind.STATUS: present_job(job, base_url=HOME, storage=storage),
        EventKind.PROGRESS: progress.model_copy(update={"step": 9, "steps": 20}).model_dump(),
        EventKind.PREVIEW: {"mime": "image/jpeg", "base64": "/9j/4AAQ..."},
        EventKind.OUTPUT: present_output(output, storage),
        EventKind.LOG: {"message": "a line worth showing"},
        EventKind.ERROR: error.model_dump(),
        EventKind.RECONNECT: {},
    }


MEANINGS = {
    EventKind.PROGRESS: inspect.getdoc(Progress),
    EventKind.OUTPUT: inspect.getdoc(Output),
    EventKind.ERROR: inspect.getdoc(JobError),
    EventKind.LOG: "A line for people.",
}


def read_comments() -> dict[str, str]:
    """Kind -> the comment behind it in EventKind."""
    return {value: said or "" for value, said in re.findall(r'= "(\w+)"(?:  # (.*))?', inspect.getsource(EventKind))}


def write_events() -> str:
    comments, examples = read_comments(), make_examples()
    sections = []
    for kind in EventKind:
        meaning = " ".join((comments[kind] or MEANINGS.get(kind) or "").split())
        if not meaning:
            raise SystemExit(f"{kind!r} says nowhere what it is: put a comment behind it in gateway/jobs/model.py")
        section = f"## `{kind}`\n\n{meaning[:1].upper()}{meaning[1:]}\n"
        if kind in examples:
            section += f"\n```json\n{json.dumps(examples[kind], indent=1, ensure_ascii=False)}\n```\n"
        sections.append(section)
    return f"""{HEAD}# Events

{" ".join((inspect.getdoc(EventKind) or "").split())}
Streams speak Server-Sent Events: `id`, `event` (the kind) and `data` (JSON). The first event is the job as it stands and has no id;
the last is the terminal `status`.

""" + "\n".join(sections)


# -- routes ----------------------------------------------------------------------------------------------------


def read_openapi() -> dict[str, Any]:
    with warnings.catch_warnings():
        # One function that answers GET and POST has one operation id.
        warnings.filterwarnings("ignore", "Duplicate Operation ID")
        return create_app(Settings(workflows_dir=None)).openapi()


def write_routes() -> str:
    tables: dict[str, list[tuple[str, ...]]] = {}
    for path, operations in read_openapi()["paths"].items():
        # The methods of one function come in any order.
        for method, operation in sorted(operations.items()):
            said = operation.get("description") or operation.get("summary", "")
            given = ", ".join(f"`{each['name']}`" for each in operation.get("parameters", []) if each["in"] != "path")
            row = (f"`{method.upper()}`", f"`{path}`", said.split("\n\n")[0], given)
            tables.setdefault(operation.get("tags", ["other"])[0], []).append(row)
    titles = ("Method", "Path", "What", "Query and headers")
    sections = [f"## {tag.capitalize()}\n\n{tabulate(titles, rows)}" for tag, rows in tables.items()]
    return f"{HEAD}# Routes\n\nThe machine's version is `GET /openapi.json`; `GET /docs` shows it.\n\n" + "\n".join(sections)


PAGES = {"settings.md": write_settings, "errors.md": write_errors, "events.md": write_events, "routes.md": write_routes}


def find_stale(folder: Path) -> list[str]:
    """Names of the pages in `folder` that are not what would be written now."""
    return [name for name, write in PAGES.items() if not (folder / name).is_file() or (folder / name).read_text() != write()]


def main() -> None:
    for name in find_stale(HERE):
        (HERE / name).write_text(PAGES[name]())
        sys.stdout.write(f"wrote docs/{name}\n")


if __name__ == "__main__":
    main()
