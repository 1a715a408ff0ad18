"""What trains: a worker that reports, the interpreter SimpleTuner lies in, and room for the base model of the deployment."""

from __future__ import annotations

import asyncio
import json
import subprocess
from pathlib import Path
from typing import Any

from comfy_workflows.catalog import Catalog as Workflows
from comfy_workflows.errors import WorkflowError
from gateway.doctor.finding import Finding, fault, skip, warn, well
from gateway.errors import RedisUnavailable, Unprocessable
from gateway.redis_client import RedisClient
from gateway.settings import Settings
from gateway.trainings.machines import REPORT_TTL_S, TrainerMachines
from gateway.trainings.presets import FAMILIES, GB, Machine, choose_preset, estimate_disk, require_disk

PROBE_S = 60.0
# Run by the trainer's interpreter, which has nothing of ours.
PROBE = """
import importlib.metadata as metadata, json
found = {}
for name in ("simpletuner", "torch", "diffusers", "transformers"):
    try: found[name] = metadata.version(name)
    except metadata.PackageNotFoundError: found[name] = None
try:
    import torch
    found["cuda"] = torch.cuda.is_available()
    found["bf16"] = found["cuda"] and torch.cuda.is_bf16_supported()
    import simpletuner
except Exception as error: found["error"] = f"{type(error).__name__}: {error}"
print(json.dumps(found))
"""
_INSTALL = "Install SimpleTuner into an environment of its own (make test-simpletuner shows how), and set SIMPLETUNER_PYTHON to its python."


async def examine_trainer(settings: Settings, workflows: Workflows, redis: RedisClient) -> list[Finding]:
    if settings.trainer == "off":
        return [skip("trainer", "TRAINER=off")]
    try:
        machines = await TrainerMachines(redis).all()
    except RedisUnavailable:
        machines = {}
    findings = []
    if settings.trainer == "simpletuner":
        findings.append(await asyncio.to_thread(_judge_interpreter, settings.simpletuner_python, bool(machines)))
    if not machines:
        remedy = "Start one: python -m trainer_worker, with the gateway's settings. Set TRAINER=off where nothing is to be trained."
        return [*findings, warn("trainer.worker", f"no worker has reported within {REPORT_TTL_S} s", remedy)]
    return findings + [_judge_machine(settings, workflows, name, machine) for name, machine in machines.items()]


def _judge_interpreter(python: Path | None, elsewhere: bool) -> Finding:
    """Where a worker reports and no interpreter is named here, it has its own. Blocks."""
    if python is None:
        if elsewhere:
            return skip("trainer.python", "SIMPLETUNER_PYTHON is not set here; the worker has its own")
        return fault("trainer.python", "SIMPLETUNER_PYTHON is not set", _INSTALL)
    if not python.exists():
        return fault("trainer.python", f"SIMPLETUNER_PYTHON={python} does not exist", _INSTALL)
    try:
        answer = subprocess.run([str(python), "-c", PROBE], capture_output=True, text=True, timeout=PROBE_S, check=False)
        found = json.loads(answer.stdout.splitlines()[-1])
    except (OSError, subprocess.TimeoutExpired, ValueError, IndexError) as error:
        return fault("trainer.python", f"{python} cannot be asked: {type(error).__name__}", _INSTALL)
    return _judge_packages(python, found)


def _judge_packages(python: Path, found: dict[str, Any]) -> Finding:
    versions = ", ".join(f"{name} {found.get(name)}" for name in ("simpletuner", "torch", "diffusers", "transformers") if found.get(name))
    if not found.get("simpletuner") or found.get("error"):
        return fault("trainer.python", f"{python} cannot import SimpleTuner: {found.get('error') or 'it is not installed'}", _INSTALL)
    if not found.get("cuda"):
        remedy = "Install torch with CUDA there, and see that nvidia-smi works. Without a GPU only the small model can be trained."
        return warn("trainer.python", f"{versions}; no CUDA", remedy)
    if not found.get("bf16"):
        return warn("trainer.python", f"{versions}; the GPU has no bf16", "Train on Ampere or newer: without bf16 losses overflow.")
    return well("trainer.python", f"{versions}; CUDA with bf16")


def _judge_machine(settings: Settings, workflows: Workflows, name: str, machine: Machine) -> Finding:
    """Whether the deployment's base model can be trained there, at rank 16 with 20 pictures of 1024."""
    try:
        model = workflows.base_model(settings.default_base_model)
        if model.family not in FAMILIES:
            return skip("trainer.machine", f"{name} reports; {model.name} is of a family that is not trained")
        preset = choose_preset(model.family, None, machine, whole=True)
        require_disk(estimate_disk(model.family, rank=16, resolution=1024, files=20, dataset_bytes=60_000_000), machine)
    except Unprocessable as error:
        return fault("trainer.machine", f"{name}: {error.message}", error.hint)
    except WorkflowError as error:
        return skip("trainer.machine", f"{name} reports; {error.message}")
    sizes = {"GPU": machine.gpu_total_bytes, "RAM": machine.ram_total_bytes, "disk free": machine.disk_free_bytes}
    said = ", ".join(f"{what} {size / GB:.0f} GB" for what, size in sizes.items() if size)
    return well("trainer.machine", f"{name} reports: {machine.gpu_name or 'no GPU'}; {said}; trains {model.name} in {preset.precision}")
