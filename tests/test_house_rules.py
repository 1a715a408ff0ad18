"""The house's layout and manners, read from the source by ast. Every rule is also shown a small sin that it must find."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

from tests.house_layers import ADAPTERS, BARE, FRIENDS, LAYERS, STRANGERS

ROOT = Path(__file__).parents[1]
PACKAGES = ("gateway", "comfy_workflows", "trainer_worker", "local", "fluxgate", "tests", "bench", "docs")

VAGUE = ("utils", "util", "helpers", "helper", "common", "misc", "manager", "service")
LONGEST_FILE_LINES = 400
MOST_MOCKED_SHARE = 0.05


def find_files(*packages: str) -> list[Path]:
    return sorted(path for package in packages for path in (ROOT / package).rglob("*.py"))


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path) for path in find_files(*PACKAGES)}


def read_imports(source: str) -> Iterator[tuple[int, str]]:
    """(line, module) of every import, wherever it stands; `from package import module` counts as the module."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute here"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield node.lineno, whole if whole in MODULES else node.module or ""


def matches(module: str, pattern: str) -> bool:
    return module == pattern or module.startswith(f"{pattern}.")


def layer_of(module: str) -> int | None:
    fitting = [pattern for pattern in LAYERS if matches(module, pattern) and (pattern not in BARE or module == pattern)]
    return LAYERS[max(fitting, key=len)] if fitting else None


# -- the rules: each takes a module's name and source, and says what is wrong ----------------------------------


def find_layer_faults(module: str, source: str) -> Iterator[str]:
    """Upward and sideways imports between the gateway's layers, and what the sides may see of it."""
    own = layer_of(module)
    if own is None and matches(module, "gateway"):
        yield f"{module} has no place in the layer table"
        return
    for line, target in read_imports(source):
        other = layer_of(target)
        if other is None or target == module:
            continue
        if matches(module, "trainer_worker") and other > 2:
            yield f"{module}:{line} imports {target}: the trainer sees the gateway's layers 0-2 only"
        friends = any(matches(module, one) and matches(target, two) for one, two in FRIENDS)
        if own is not None and (other > own or (other == own and not friends)):
            yield f"{module}:{line} imports {target}: layer {own} must not know layer {other}"


def find_strangers(module: str, source: str) -> Iterator[str]:
    for line, target in read_imports(source):
        top = target.partition(".")[0]
        for package, refused in STRANGERS.items():
            if matches(module, package) and top in refused:
                yield f"{module}:{line} imports {target}, which {package} must not know"
        if matches(module, "gateway") and module not in ADAPTERS.get(top, {module}):
            yield f"{module}:{line} imports {target}; only {', '.join(ADAPTERS[top])} does"


def find_environment_readers(module: str, source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            read = node.attr in ("environ", "environb", "getenv")
        else:
            read = isinstance(node, ast.ImportFrom) and node.module == "os" and bool({a.name for a in node.names} & {"environ", "getenv"})
        if read and isinstance(node, ast.Attribute | ast.ImportFrom):
            yield f"{module}:{node.lineno} reads the environment; a Settings field does that"


def find_long_files(module: str, source: str) -> Iterator[str]:
    if (count := len(source.splitlines())) > LONGEST_FILE_LINES:
        yield f"{module} has {count} lines; split it by noun before {LONGEST_FILE_LINES}"


def find_vague_names(module: str, source: str) -> Iterator[str]:
    if set(module.rpartition(".")[2].lower().split("_")) & set(VAGUE):
        yield f"{module} is a vague name"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef) and node.name.lower().endswith(VAGUE):
            yield f"{module}:{node.lineno} class {node.name} is a vague name"


def find_broad_excepts(module: str, source: str) -> Iterator[str]:
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ExceptHandler):
            caught = {part.id for part in ast.walk(node.type) if isinstance(part, ast.Name)} if node.type else {"BaseException"}
            if caught & {"Exception", "BaseException"} and not re.search(r"#.*\bboundary: \w", lines[node.lineno - 1]):
                yield f"{module}:{node.lineno} catches everything without saying why (`# boundary: ...`)"


def find_unfinished(module: str, source: str) -> Iterator[str]:
    words = "|".join(("TO" + "DO", "FIX" + "ME", "XX" + "X", "NotImplemented" + "Error"))
    for number, line in enumerate(source.splitlines(), 1):
        if found := re.search(rf"\b({words})\b", line):
            yield f"{module}:{number} is unfinished: {found.group()}"


def find_work_at_import(module: str, source: str) -> Iterator[str]:
    """Statements that do something when a module is merely imported. Definitions and constants are no work."""
    idle = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
    if module.endswith(".__main__"):
        return
    for node in ast.parse(source).body:
        is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        is_main = isinstance(node, ast.If) and ast.unparse(node.test) in ("__name__ == '__main__'", "TYPE_CHECKING")
        if not (isinstance(node, idle) or is_text or is_main):
            yield f"{module}:{node.lineno} works at import: {ast.unparse(node).splitlines()[0][:80]}"


def find_timed_assertions(module: str, source: str) -> Iterator[str]:
    """Assertions about elapsed time. A deadline that ends a wait is none: it adds to the clock and does not subtract from it."""
    clocks = ("monotonic", "perf_counter", "process_time", "time", "time_ns", "monotonic_ns", "perf_counter_ns")

    def reads_clock(node: ast.AST, known: set[str]) -> bool:
        return any(
            (isinstance(part, ast.Call) and isinstance(part.func, ast.Attribute) and part.func.attr in clocks)
            or (isinstance(part, ast.Call) and isinstance(part.func, ast.Name) and part.func.id in clocks)
            or (isinstance(part, ast.Name) and part.id in known)
            for part in ast.walk(node)
        )

    def is_elapsed(node: ast.AST, readings: set[str], spans: set[str]) -> bool:
        return any(
            (isinstance(part, ast.BinOp) and isinstance(part.op, ast.Sub) and reads_clock(part, readings))
            or (isinstance(part, ast.Name) and part.id in spans)
            for part in ast.walk(node)
        )

    for function in ast.walk(ast.parse(source)):
        if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        readings, spans = set[str](), set[str]()
        for node in sorted((n for n in ast.walk(function) if hasattr(n, "lineno")), key=lambda n: n.lineno):
            if isinstance(node, ast.Assign):
                names = {part.id for target in node.targets for part in ast.walk(target) if isinstance(part, ast.Name)}
                if is_elapsed(node.value, readings, spans):
                    spans |= names
                elif reads_clock(node.value, readings):
                    readings |= names
            elif isinstance(node, ast.Assert) and is_elapsed(node.test, readings, spans):
                yield f"{module}:{node.lineno} asserts how long something took"


def count_tests(sources: Iterable[str]) -> tuple[int, int]:
    """(tests, those that put a mock where a real thing could stand)"""
    mocking = re.compile(r"\b(Mock|MagicMock|AsyncMock|mocker|mock\.patch|patch|monkeypatch\.setattr)\b")
    tests = [
        ast.unparse(node)
        for source in sources
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_")
    ]
    return len(tests), sum(bool(mocking.search(test)) for test in tests)


Rule = Callable[[str, str], Iterator[str]]
EVERYWHERE: tuple[Rule, ...] = (find_long_files, find_vague_names, find_broad_excepts, find_unfinished)
APPLIES: dict[Rule, tuple[str, ...]] = {
    find_layer_faults: ("gateway", "comfy_workflows", "trainer_worker"),
    find_strangers: ("gateway", "comfy_workflows", "trainer_worker", "fluxgate", "local"),
    find_work_at_import: ("gateway", "comfy_workflows", "trainer_worker", "fluxgate", "local"),
    find_environment_readers: ("gateway",),
    find_timed_assertions: ("tests",),
    **dict.fromkeys(EVERYWHERE, PACKAGES),
}
ALLOWED: dict[Rule, set[str]] = {find_environment_readers: {"gateway.settings"}}


@pytest.mark.parametrize("rule", APPLIES, ids=lambda rule: rule.__name__)
def test_the_code_keeps_the_rule(rule: Rule) -> None:
    faults = [
        fault
        for path in find_files(*APPLIES[rule])
        if module_of(path) not in ALLOWED.get(rule, ())
        for fault in rule(module_of(path), path.read_text())
    ]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    ("rule", "module", "source"),
    [
        (find_layer_faults, "gateway.errors", "import gateway.settings"),
        (find_layer_faults, "gateway.jobs.model", "from gateway.jobs import store"),
        (find_layer_faults, "gateway.jobs.events", "from gateway.jobs.store import JobStore"),
        (find_layer_faults, "gateway.loras.registry", "def f():\n    from gateway.storage import Storage"),
        (find_layer_faults, "gateway.storage", "from gateway.dispatch.fleet import choose"),
        (find_layer_faults, "gateway.dispatch.ingest", "from gateway.runtime import Runtime"),
        (find_layer_faults, "gateway.routes.events", "from gateway.routes import generations"),
        (find_layer_faults, "gateway.routes.deps", "from gateway.app import create_app"),
        (find_layer_faults, "comfy_workflows.render", "from gateway.jobs.store import JobStore"),
        (find_layer_faults, "trainer_worker.tasks", "from gateway.admission import Admission"),
        (find_layer_faults, "gateway.nowhere", "import json"),
        (find_layer_faults, "gateway.jobs.nowhere", "import json"),
        (find_strangers, "gateway.trainings.requests", "import torch.nn"),
        (find_strangers, "gateway.app", "from local.up import main"),
        (find_strangers, "gateway.jobs.store", "from redis.asyncio import Redis"),
        (find_strangers, "gateway.dispatch.ingest", "import botocore.exceptions"),
        (find_strangers, "comfy_workflows.graph", "import gateway.errors"),
        (find_strangers, "trainer_worker.tasks", "import torch"),
        (find_strangers, "trainer_worker.publish", "from fastapi import FastAPI"),
        (find_environment_readers, "gateway.app", "import os\nport = os.environ['PORT']"),
        (find_environment_readers, "gateway.app", "from os import getenv"),
        (find_long_files, "gateway.app", "x = 1\n" * 401),
        (find_vague_names, "gateway.utils", ""),
        (find_vague_names, "gateway.job_helpers", ""),
        (find_vague_names, "gateway.jobs.store", "class JobManager: ..."),
        (find_broad_excepts, "gateway.app", "try: ...\nexcept Exception: ..."),
        (find_broad_excepts, "gateway.app", "try: ...\nexcept (OSError, Exception): ..."),
        (find_broad_excepts, "gateway.app", "try: ...\nexcept: ..."),
        (find_unfinished, "gateway.app", "x = 1  # TO" + "DO later"),
        (find_unfinished, "gateway.app", "raise NotImplemented" + "Error"),
        (find_work_at_import, "gateway.app", "configure_logging('INFO')"),
        (find_work_at_import, "gateway.app", "with open('x') as file: text = file.read()"),
        (find_timed_assertions, "tests.test_x", "def test_x():\n    t = time.monotonic()\n    f()\n    assert time.monotonic() - t < 1"),
        (
            find_timed_assertions,
            "tests.test_x",
            "def test_x():\n    t = perf_counter()\n    took = perf_counter() - t\n    assert took < 1",
        ),
    ],
)
def test_the_rule_finds_a_sin(rule: Rule, module: str, source: str) -> None:
    assert list(rule(module, source))


@pytest.mark.parametrize(
    ("rule", "module", "source"),
    [
        (find_layer_faults, "gateway.jobs.store", "from gateway.jobs.events import read_events\nfrom gateway.jobs.model import Job"),
        (find_layer_faults, "gateway.routes.events", "from gateway.routes.deps import Runtime\nfrom gateway.errors import NotFound"),
        (find_broad_excepts, "gateway.runtime", "try: ...\nexcept Exception: ...  # boundary: the last line"),
        (find_timed_assertions, "tests.test_x", "def test_x():\n    end = time.monotonic() + 5\n    assert time.monotonic() < end"),
    ],
)
def test_the_rule_lets_honest_code_pass(rule: Rule, module: str, source: str) -> None:
    assert not list(rule(module, source))


def test_few_tests_use_mock_objects() -> None:
    tests, mocking = count_tests(path.read_text() for path in find_files("tests") if path != Path(__file__))
    assert mocking <= tests * MOST_MOCKED_SHARE, f"{mocking} of {tests} tests use mock objects"
    assert count_tests(["def test_x(): Mock()\ndef test_y(): ..."]) == (2, 1)
