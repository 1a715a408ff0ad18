"""How a training fits a machine: the precision of the frozen base by GPU memory, and the RAM and disk it takes. Pure arithmetic.

The figures are SimpleTuner's own for rank 16 and batch 1 ("more than N GB"), in decimal gigabytes; none of them was measured here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict

from gateway.errors import Unprocessable

GB = 1_000_000_000
PRECISIONS = ("bf16", "int8", "int4", "nf4")


class Machine(BaseModel):
    """What a trainer worker measured where it runs; None where it could not."""

    model_config = ConfigDict(extra="ignore")

    gpu: Literal["present", "absent", "unknown"] = "unknown"
    gpu_name: str | None = None
    gpu_total_bytes: int | None = None
    gpu_free_bytes: int | None = None
    ram_total_bytes: int | None = None
    ram_free_bytes: int | None = None
    disk_free_bytes: int | None = None


@dataclass(frozen=True)
class Needs:
    """Of one family. `gpu_bytes` by precision, best first; empty where no figure is known. The others are upper estimates."""

    gpu_bytes: dict[str, int]
    quantising_ram_bytes: int
    loading_ram_bytes: int
    checkpoint_bytes_per_rank: int  # weights and the optimizer's states, float32
    sample_cache_bytes: int  # per picture of 1024 x 1024 and its caption: latents and text embeddings
    needs_gpu: bool = True


FLUX = Needs(
    {"bf16": 30 * GB, "int8": 18 * GB, "int4": 13 * GB, "nf4": 9 * GB},
    quantising_ram_bytes=50 * GB,
    loading_ram_bytes=24 * GB,
    checkpoint_bytes_per_rank=30_000_000,
    sample_cache_bytes=6_000_000,
)
# No NF4 and no INT4 there. A clip's latents grow with its frames; the figure is for 81 of 480p.
WAN = Needs({}, 0, 0, 30_000_000, 20_000_000)
# 24 to 32 GB of GPU memory at 480p, and 64 GB of RAM.
HUNYUAN = Needs({"bf16": 32 * GB, "int8": 24 * GB}, 64 * GB, 64 * GB, 30_000_000, 20_000_000)
TINY = Needs({}, 0, 0, 200_000, 2_000_000, needs_gpu=False)
FAMILIES = {"flux1": FLUX, "wan": WAN, "hunyuanvideo": HUNYUAN, "tinyflux": TINY}
SLACK_BYTES = 256 << 20  # log, samples, configuration
# Folders are written beside the checkpoints that are kept.
CHECKPOINTS_AT_ONCE = 3
# A card of a nominal size shows a little less.
TOLERANCE = 0.97


class Preset(BaseModel):
    """What a training runs with, and why."""

    model_config = ConfigDict(extra="ignore")

    precision: str
    reason: str
    gpu: str | None = None
    gpu_free_bytes: int | None = None
    needed_gpu_bytes: int | None = None
    needed_ram_bytes: int | None = None
    needed_disk_bytes: int | None = None


def choose_preset(family: str, asked: str | None, machine: Machine, *, whole: bool = False) -> Preset:
    """The best precision that fits the free GPU memory, or the asked one. `whole` counts what others use now as free, as before queueing.

    Raises Unprocessable when nothing fits, or the asked one does not: `insufficient_gpu_memory`, `insufficient_ram`.
    """
    needs = FAMILIES[family]
    room = machine.gpu_total_bytes if whole else machine.gpu_free_bytes
    if needs.needs_gpu and machine.gpu == "absent":
        raise _refuse_gpu(family, asked, 0, "There is no GPU on the trainer's machine.", needs)
    if not needs.gpu_bytes or room is None:
        reason = "nothing to choose for this base" if not needs.gpu_bytes else "the GPU's memory could not be measured"
        chosen = asked or "bf16"
        preset = Preset(precision=chosen, reason=f"asked for; {reason}" if asked else reason, gpu=machine.gpu_name)
    else:
        chosen = asked or next((name for name, needed in needs.gpu_bytes.items() if needed * TOLERANCE <= room), "")
        needed = needs.gpu_bytes.get(chosen)
        if not chosen or (needed is not None and needed * TOLERANCE > room):
            share = "in all" if whole else "free now"
            raise _refuse_gpu(family, asked, room, f"{machine.gpu_name or 'The GPU'} has {_say(room)} {share}.", needs)
        reason = "asked for" if asked else f"the best that fits {_say(room)} of GPU memory"
        preset = Preset(precision=chosen, reason=reason, gpu=machine.gpu_name, gpu_free_bytes=room, needed_gpu_bytes=needed)
    ram = needs.loading_ram_bytes if chosen in ("bf16", "no_change") else needs.quantising_ram_bytes
    _require_ram(family, chosen, ram, machine)
    return preset.model_copy(update={"needed_ram_bytes": ram or None})


def estimate_disk(family: str, *, rank: int, resolution: int, files: int, dataset_bytes: int, model_bytes: int = 0) -> int:
    """Bytes a training writes at most: pictures, caches, checkpoints, samples. `model_bytes`: of a base that is to be fetched first."""
    needs = FAMILIES[family]
    cache = files * needs.sample_cache_bytes * max(0.25, (resolution / 1024) ** 2)
    return int(dataset_bytes + cache + CHECKPOINTS_AT_ONCE * rank * needs.checkpoint_bytes_per_rank + model_bytes + SLACK_BYTES)


def require_disk(needed_bytes: int, machine: Machine) -> None:
    """Raises Unprocessable `insufficient_disk` when the trainer's folder has less room."""
    if machine.disk_free_bytes is not None and machine.disk_free_bytes < needed_bytes:
        raise Unprocessable(
            f"The training writes up to {_say(needed_bytes)}; the trainer's disk has {_say(machine.disk_free_bytes)} free.",
            code="insufficient_disk",
            hint="Free space in TRAINING_DIR (old trainings lie there), or lower rank or resolution.",
            details={"needed_bytes": needed_bytes, "free_bytes": machine.disk_free_bytes},
        )


def _require_ram(family: str, precision: str, needed: int, machine: Machine) -> None:
    if machine.ram_total_bytes is not None and machine.ram_total_bytes < needed * TOLERANCE:
        raise Unprocessable(
            f"Loading {family} in {precision} takes about {_say(needed)} of RAM; the trainer's has {_say(machine.ram_total_bytes)}.",
            code="insufficient_ram",
            hint="Train on a machine with more RAM, or in bf16 where the GPU allows: quantising is what takes most."
            if precision not in ("bf16", "no_change")
            else "Train on a machine with more RAM.",
            details={"parameter": "precision", "value": precision, "needed_bytes": needed, "total_bytes": machine.ram_total_bytes},
        )


def _refuse_gpu(family: str, asked: str | None, room: int, why: str, needs: Needs) -> Unprocessable:
    tiers = ", ".join(f"{name} {_say(needed)}" for name, needed in needs.gpu_bytes.items())
    fitting = [name for name, needed in needs.gpu_bytes.items() if needed * TOLERANCE <= room]
    takes = f"{family} takes {tiers}" if tiers else f"{family} needs a GPU"
    return Unprocessable(
        f"{why} {takes}.",
        code="insufficient_gpu_memory",
        hint=f"Ask for precision {fitting[0]!r}, or leave it out." if fitting else "Train on a machine with a larger GPU.",
        details={"parameter": "precision", "value": asked, "allowed": fitting, "needed_bytes": needs.gpu_bytes, "room_bytes": room},
    )


def _say(size_bytes: int) -> str:
    return f"{size_bytes / GB:.1f} GB"
