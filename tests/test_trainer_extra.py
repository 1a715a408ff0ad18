"""The extra `trainer` names all that a trainer worker imports: shown by importing it where nothing else can be imported."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in (ROOT / "trainer_worker").rglob("*.py")
)
# Run by file name in another interpreter, which has what they name.
ELSEWHERE = ("trainer_worker.trainers.simpletuner_launcher", "trainer_worker.keeper", "trainer_worker.captioners.launcher")
PROGRAM = """
import importlib, importlib.abc, sys

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        top = name.partition(".")[0]
        if top in refused:
            raise ModuleNotFoundError(f"{top} is not in the extra `trainer`", name=top)
        return None

refused = set(sys.argv[1].split(","))
sys.meta_path.insert(0, Refuse())
for module in sys.argv[2].split(","):
    importlib.import_module(module)
"""


def normalise(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def read_requirement(text: str) -> str | None:
    """The distribution's name; None for what only an extra of it needs, but the one that is asked for by name."""
    if "extra ==" in text and "hiredis" not in text:
        return None
    found = re.match(r"[A-Za-z0-9._-]+", text)
    return normalise(found[0]) if found else None


def find_closure(names: set[str]) -> set[str]:
    """These distributions and all they require."""
    waiting, known = list(names), set[str]()
    while waiting:
        name = waiting.pop()
        if name not in known:
            known.add(name)
            try:
                needed = requires(name) or []
            except PackageNotFoundError:
                continue
            waiting += [found for text in needed if (found := read_requirement(text))]
    return known


def list_refused() -> set[str]:
    """Top-level modules of every installed distribution that the extra does not bring."""
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["trainer"]
    brought = find_closure({name for text in extra if (name := read_requirement(text))})
    own = {path.name for path in ROOT.iterdir() if path.is_dir()}
    return {top for top, names in packages_distributions().items() if not {normalise(name) for name in names} & brought} - own


def run(refused: set[str], modules: list[str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM, ",".join(sorted(refused)), ",".join(modules)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)


def test_the_worker_imports_what_the_extra_brings_and_nothing_else() -> None:
    refused = list_refused()
    assert {"fastapi", "starlette", "torch", "uvicorn", "huggingface_hub", "pytest"} <= refused
    done = run(refused, [module for module in MODULES if module not in ELSEWHERE and not module.endswith("__main__")])
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("needed", ["numpy", "rq", "PIL", "boto3", "aiohttp", "prometheus_client"])
def test_what_the_extra_names_is_needed(needed: str) -> None:
    done = run({needed}, ["trainer_worker.tasks"])
    assert done.returncode != 0
    assert needed in done.stderr
