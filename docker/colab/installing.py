"""What has to be installed for a plan, as commands that run once each. Every part gets an environment of its own:
nothing goes into the Python that Colab brings, whose torch and torchvision fit each other and nothing else."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from decisions import Machine, Plan
from tunnels import PROGRAMS

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]


@dataclass(frozen=True)
class Step:
    """One command. It is done when it ended well once; another command under its name runs again."""

    name: str
    command: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)

    @property
    def mark(self) -> str:
        return f".done-{self.name}-{hashlib.sha256(repr(self.command).encode()).hexdigest()[:12]}"


def read_versions(text: str) -> dict[str, str]:
    """NAME=VALUE lines of docker/versions.env."""
    lines = (line.partition("=") for line in text.splitlines() if line and not line.startswith("#"))
    return {name: value for name, equals, value in lines if equals}


def list_steps(plan: Plan, machine: Machine, folder: Path, versions: Mapping[str, str]) -> list[Step]:
    """In order. Environments are made by virtualenv: Colab's Python comes without ensurepip, and `venv` fails there."""
    tools = {"PYTHONPATH": str(folder / "tools")}
    extras = "local,rented" if not plan.comfyui else "rented"
    pip = ("-m", "pip", "install", "--quiet", "--disable-pip-version-check")

    def make_env(name: str) -> Step:
        return Step(f"{name}-env", (sys.executable, "-m", "virtualenv", "--quiet", str(folder / name)), tools)

    steps = [
        Step("tools", (sys.executable, *pip, "--target", str(folder / "tools"), "virtualenv")),
        make_env("gateway"),
        Step(
            "gateway",
            (python_in(folder, "gateway"), *pip, "-c", str(REPOSITORY / "constraints.txt"), "-e", f"{REPOSITORY}[{extras}]"),
        ),
        # For the notebook's own Python, behind what it has: the client's few packages.
        Step("client", (sys.executable, *pip, "--target", str(folder / "client"), "httpx", "httpx-sse", "pydantic", "rich")),
    ]
    if plan.comfyui:
        comfy = str(folder / "comfyui-env" / "bin" / "comfy")
        path = {"PATH": f"{folder / 'comfyui-env' / 'bin'}:{os.environ.get('PATH', '')}", "VIRTUAL_ENV": str(folder / "comfyui-env")}
        install = (comfy, "--skip-prompt", "--workspace", str(folder / "ComfyUI"), "install", "--version", versions["COMFYUI_VERSION"])
        steps += [
            make_env("comfyui-env"),
            Step("comfy-cli", (python_in(folder, "comfyui-env"), *pip, f"comfy-cli=={versions['COMFY_CLI_VERSION']}")),
            Step("comfyui", (*install, "--nvidia", "--cuda-version", versions["CUDA_VERSION"], "--skip-manager"), path),
        ]
        pull = ("-m", "gateway", "models", "--dir", str(folder / "ComfyUI" / "models"), "pull", plan.base_model)
        # The plan has left room beside the files already.
        steps.append(Step("base-model", (python_in(folder, "gateway"), *pull), {"MODELS_MIN_FREE_BYTES": "0"}))
    if plan.install_simpletuner:
        python = "python3.11"
        if not machine.has_python_3_11:
            uv = folder / "tools" / "bin" / "uv"
            steps.append(Step("uv", (sys.executable, *pip, "--target", str(folder / "tools"), "uv")))
            steps.append(Step("python3.11", (str(uv), "python", "install", "3.11", "--install-dir", str(folder / "pythons"))))
            python = str(folder / "pythons" / "python3.11")
        env = {"TORCH_INDEX": versions["SIMPLETUNER_TORCH_INDEX"], "PYTHON": python}
        installer = str(REPOSITORY / "tests" / "simpletuner" / "install.sh")
        steps.append(Step("simpletuner", ("sh", installer, str(folder / "simpletuner")), env))
    return steps


def python_in(folder: Path, name: str) -> str:
    return str(folder / name / "bin" / "python")


def install(steps: list[Step], plan: Plan, folder: Path, say: Callable[[str], None]) -> None:
    """Run what has not been done here yet. Raises CalledProcessError for the first that fails; a next start goes on from there."""
    folder.mkdir(parents=True, exist_ok=True)
    for step in steps:
        mark = folder / step.mark
        if mark.exists():
            continue
        say(f"installing {step.name} ...")
        subprocess.run(step.command, env={**os.environ, **step.env}, check=True)
        if step.name == "python3.11":
            link_python(folder / "pythons")
        mark.touch()
    if plan.comfyui:
        place_extension(folder)
    if plan.tunnel != "none":
        fetch_tunnel(plan.tunnel, folder, say)


def link_python(folder: Path) -> None:
    """uv names its folders after the whole version."""
    [program] = sorted(folder.glob("cpython-3.11*/bin/python3.11"))[-1:]
    (folder / "python3.11").symlink_to(program)


def place_extension(folder: Path) -> None:
    """Our extension, where ComfyUI looks for such."""
    extension = folder / "ComfyUI" / "custom_nodes" / "fluxgate"
    if not extension.is_symlink():
        extension.symlink_to(REPOSITORY / "docker" / "comfyui" / "custom_nodes" / "fluxgate")


def fetch_tunnel(kind: str, folder: Path, say: Callable[[str], None]) -> None:
    """The tunnel's program, unless the machine has it."""
    program = folder / kind
    if program.exists() or shutil.which(kind):
        return
    say(f"fetching {kind} ...")
    body, _ = urllib.request.urlretrieve(PROGRAMS[kind])
    if PROGRAMS[kind].endswith(".tgz"):
        with tarfile.open(body) as archive:
            archive.extract(kind, folder, filter="data")
    else:
        shutil.copy(body, program)
    program.chmod(0o755)
