"""What a rented machine can do, decided from a description of it. The standard library alone: a bare Python reads it.
The figures of trainings are those of `gateway/trainings/presets.py`, which a test compares; those of base models are read from their
one table."""

from __future__ import annotations

import tomllib
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

GB = 1_000_000_000
# A card or a memory of a nominal size shows a little less.
TOLERANCE = 0.97
COMFYUI_BYTES = 9 * GB  # its environment: torch with CUDA
SIMPLETUNER_BYTES = 9 * GB
TRAINING_BASE_BYTES = 34 * GB  # FLUX.1-dev as diffusers' folder
WORK_BYTES = 10 * GB  # pictures, caches, checkpoints
BUILT_IN = "tinyflux"


TABLE = Path(__file__).resolve().parents[2] / "comfy_workflows" / "base_models.toml"
# Those that the workflow `flux` draws with.
FAMILY = "flux1"
WHOLE, SMALL = "flux1-dev", "flux1-dev-fp8"
# GPU memory, best first.
PRECISIONS = {"bf16": 30 * GB, "int8": 18 * GB, "int4": 13 * GB, "nf4": 9 * GB}
LOADING_RAM_BYTES, QUANTISING_RAM_BYTES = 24 * GB, 50 * GB
# Transformer, text encoders and activations of a megapixel stay on the GPU from here on.
FULL_GPU_BYTES, FP8_GPU_BYTES, LEAST_GPU_BYTES = 38 * GB, 20 * GB, 8 * GB


@dataclass(frozen=True)
class Machine:
    """What was measured. Zero GPU memory: no GPU."""

    gpu_bytes: int
    ram_bytes: int
    disk_free_bytes: int
    gpu_name: str = ""
    has_hf_token: bool = False
    has_python_3_11: bool = False
    keep_free_bytes: int | None = None  # where the state is kept; None: nowhere, or not known

    @property
    def has_gpu(self) -> bool:
        return self.gpu_bytes > 0


@dataclass(frozen=True)
class Wish:
    """What the person asked for; None and empty: decide."""

    base_model: str = ""
    train: bool = True
    tunnel: str = "none"


@dataclass(frozen=True)
class Plan:
    """What is done. `reasons` say why, for people; `refusal` is why nothing can be done at all."""

    base_model: str
    comfyui: bool = False
    comfyui_flags: tuple[str, ...] = ()
    trainer: str = "off"
    precision: str = ""  # what a training will run with, as the trainer decides again
    install_simpletuner: bool = False
    needs_bytes: int = 0
    tunnel: str = "none"
    reasons: tuple[str, ...] = field(default=())
    refusal: str = ""

    def describe(self) -> dict[str, Any]:
        return asdict(self)


def say(size_bytes: float) -> str:
    return f"{size_bytes / GB:.0f} GB"


def fits(needed_bytes: int, room_bytes: int) -> bool:
    return needed_bytes * TOLERANCE <= room_bytes


@cache
def read_base_models() -> dict[str, dict[str, Any]]:
    """Those that can be fetched and drawn with, by name."""
    table = tomllib.loads(TABLE.read_text(encoding="utf-8"))
    return {name: said for name, said in table.items() if said["family"] == FAMILY and said.get("sources")}


def size_of(base_model: str) -> int:
    size_bytes: int = read_base_models()[base_model]["size_bytes"]
    return size_bytes


def decide(machine: Machine, wish: Wish) -> Plan:
    """The plan for that machine."""
    if not machine.has_gpu and wish.base_model not in ("", BUILT_IN):
        return Plan(
            "", refusal=f"{wish.base_model} needs a GPU, and nvidia-smi tells of none; without --base-model the built-in model runs."
        )
    if not machine.has_gpu:
        reason = "no GPU: the built-in small model stands in for Flux; its pictures are toys, all else is real"
        trainer = "tiny" if wish.train else "off"
        return _check_disk(machine, Plan(BUILT_IN, trainer=trainer, needs_bytes=6 * GB, tunnel=wish.tunnel, reasons=(reason,)))
    if not fits(LEAST_GPU_BYTES, machine.gpu_bytes):
        return Plan("", refusal=f"{machine.gpu_name} has {say(machine.gpu_bytes)}; Flux needs {say(LEAST_GPU_BYTES)} at the least.")
    if refusal := _refuse_wish(machine, wish):
        return Plan("", refusal=refusal)
    base_model, why_base = choose_base_model(machine, wish)
    flags, why_flags = choose_flags(machine, base_model)
    precision, why_training = choose_precision(machine) if wish.train else ("", "training was not asked for")
    needs = COMFYUI_BYTES + size_of(base_model) + WORK_BYTES
    if precision and not fits(needs + SIMPLETUNER_BYTES + TRAINING_BASE_BYTES, machine.disk_free_bytes):
        wanted = needs + SIMPLETUNER_BYTES + TRAINING_BASE_BYTES
        precision, why_training = "", f"no training: it would take {say(wanted)} of disk, {say(machine.disk_free_bytes)} are free"
    needs += SIMPLETUNER_BYTES + TRAINING_BASE_BYTES if precision else 0
    plan = Plan(
        base_model,
        comfyui=True,
        comfyui_flags=flags,
        trainer="simpletuner" if precision else "off",
        precision=precision,
        install_simpletuner=bool(precision),
        needs_bytes=needs,
        tunnel=wish.tunnel,
        reasons=(why_base, why_flags, why_training),
    )
    return _check_disk(machine, plan)


def _refuse_wish(machine: Machine, wish: Wish) -> str:
    """Why the base model that was asked for cannot be had; empty where it can, or where none was asked for."""
    if not wish.base_model:
        return ""
    known = read_base_models()
    if wish.base_model not in known:
        return f"There is no base model {wish.base_model!r} here; allowed is {', '.join(known)}."
    if known[wish.base_model]["gated"] and not machine.has_hf_token:
        page = f"https://huggingface.co/{known[wish.base_model]['source']}"
        return f"{wish.base_model} is gated: accept its licence on {page}, and give HF_TOKEN of that account."
    return ""


def choose_base_model(machine: Machine, wish: Wish) -> tuple[str, str]:
    """(base model, why): the whole one where GPU, RAM, disk and token allow."""
    if wish.base_model:
        return wish.base_model, f"{wish.base_model}: asked for"
    lacks = [
        text
        for text, is_there in (
            (f"{say(FULL_GPU_BYTES)} of GPU memory", fits(FULL_GPU_BYTES, machine.gpu_bytes)),
            ("a Hugging Face token", machine.has_hf_token),
            (f"{say(size_of(WHOLE))} of RAM", fits(size_of(WHOLE), machine.ram_bytes)),
            ("the disk", fits(COMFYUI_BYTES + size_of(WHOLE) + WORK_BYTES, machine.disk_free_bytes)),
        )
        if not is_there
    ]
    if lacks:
        return SMALL, f"{SMALL}: {WHOLE} lacks {', '.join(lacks)}"
    return WHOLE, f"{WHOLE}: {machine.gpu_name} has {say(machine.gpu_bytes)}"


def choose_flags(machine: Machine, base_model: str) -> tuple[tuple[str, ...], str]:
    """(ComfyUI's start flags, why)."""
    flags, reasons = ["--preview-method", "auto"], list[str]()
    room = FP8_GPU_BYTES if base_model == SMALL else FULL_GPU_BYTES
    if not fits(room, machine.gpu_bytes):
        flags.append("--lowvram")
        reasons.append(f"--lowvram: {say(machine.gpu_bytes)} of GPU memory do not hold all of {base_model} at once")
    # Its LRU keeps the models of earlier prompts in RAM; its default cache those of the last one alone.
    if fits(2 * size_of(base_model), machine.ram_bytes):
        flags += ["--cache-lru", "20"]
        reasons.append(f"--cache-lru: {say(machine.ram_bytes)} of RAM hold two sets of models")
    else:
        reasons.append(f"no --cache-lru: {say(machine.ram_bytes)} of RAM hold one set of models")
    return tuple(flags), "; ".join(reasons)


def choose_precision(machine: Machine) -> tuple[str, str]:
    """(the precision of the frozen base in trainings, why); empty where none is possible."""
    if not machine.has_hf_token:
        return "", "no training: FLUX.1-dev is gated; accept its licence and give HF_TOKEN"
    chosen = next((name for name, needed in PRECISIONS.items() if fits(needed, machine.gpu_bytes)), "")
    if not chosen:
        return "", f"no training: {say(machine.gpu_bytes)} of GPU memory; nf4 takes {say(PRECISIONS['nf4'])}"
    ram = LOADING_RAM_BYTES if chosen == "bf16" else QUANTISING_RAM_BYTES
    if not fits(ram, machine.ram_bytes):
        return "", f"no training: loading in {chosen} takes {say(ram)} of RAM, there are {say(machine.ram_bytes)}"
    return chosen, f"training in {chosen}, with {say(machine.gpu_bytes)} of GPU memory; the GPU's turns are taken"


def _check_disk(machine: Machine, plan: Plan) -> Plan:
    if fits(plan.needs_bytes, machine.disk_free_bytes):
        return plan
    return Plan("", refusal=f"{plan.base_model} takes {say(plan.needs_bytes)} of disk; {say(machine.disk_free_bytes)} are free.")
