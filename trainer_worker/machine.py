"""What the trainer's machine has: GPU memory by nvidia-smi, or by torch in the trainer's own interpreter; RAM; disk.

torch is never imported here: it would hold GPU memory for as long as the worker lives.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from gateway.settings import Settings
from gateway.trainings.presets import Machine
from trainer_worker.launch import pass_environment

QUERY = ("--query-gpu=index,uuid,name,memory.total,memory.free", "--format=csv,noheader,nounits")
SMI_TIMEOUT_S = 10.0
PROBE_TIMEOUT_S = 120.0
MIB = 1 << 20
MEMORY_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
# Also AMD's, which torch calls cuda; on a Mac the GPU's memory is the machine's.
PROBE = """
import json, torch
if torch.cuda.is_available():
    free, total = torch.cuda.mem_get_info()
    print(json.dumps({"gpu": "present", "gpu_name": torch.cuda.get_device_name(), "gpu_total_bytes": total, "gpu_free_bytes": free}))
elif torch.backends.mps.is_available():
    print(json.dumps({"gpu": "present", "gpu_name": "mps"}))
else:
    print(json.dumps({"gpu": "absent"}))
"""


def measure(settings: Settings, *, env: Mapping[str, str] = os.environ) -> Machine:
    """All of it, now. The small trainer's GPU is not looked for: it uses none."""
    gpu = {} if settings.trainer == "tiny" else measure_gpu(settings.simpletuner_python, env)
    return Machine.model_validate({**gpu, **measure_ram(), **measure_disk(settings.training_dir)})


def measure_gpu(python: Path | None, env: Mapping[str, str] = os.environ) -> dict[str, object]:
    """The GPU that a trainer would take: the first that it may see."""
    said = ask_smi(env)
    if said is not None:
        return read_smi(said, env.get("CUDA_VISIBLE_DEVICES"))
    return probe(python, env) if python is not None else {}


def ask_smi(env: Mapping[str, str] = os.environ) -> str | None:
    """What nvidia-smi says; None where there is none, or no driver behind it."""
    program = shutil.which("nvidia-smi", path=env.get("PATH"))
    if program is None:
        return None
    try:
        answer = subprocess.run([program, *QUERY], capture_output=True, text=True, timeout=SMI_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout if answer.returncode == 0 else None


def read_smi(text: str, visible: str | None = None) -> dict[str, object]:
    """nvidia-smi's lines -> the GPU that CUDA counts as its first. `visible` is CUDA_VISIBLE_DEVICES: numbers or beginnings of UUIDs."""
    rows = [[part.strip() for part in line.split(",")] for line in text.splitlines() if line.count(",") == 4]
    if visible is not None:
        first = visible.split(",")[0].strip()
        rows = [row for row in rows if first and (row[0] == first or row[1].startswith(first))]
    if not rows:
        return {"gpu": "absent"}
    _, _, name, total, free = rows[0]
    # A part of a card that shares its memory with the system says [N/A].
    sizes = {"gpu_total_bytes": total, "gpu_free_bytes": free}
    return {"gpu": "present", "gpu_name": name, **{key: int(value) * MIB for key, value in sizes.items() if value.isdigit()}}


def probe(python: Path, env: Mapping[str, str] = os.environ) -> dict[str, object]:
    """torch's word, from the trainer's interpreter; nothing when it cannot be asked."""
    try:
        answer = subprocess.run(
            [str(python), "-c", PROBE], capture_output=True, text=True, timeout=PROBE_TIMEOUT_S, env=pass_environment(env, {}), check=False
        )
        found = json.loads(answer.stdout.splitlines()[-1])
    except (OSError, subprocess.TimeoutExpired, ValueError, IndexError):
        return {}
    return found if isinstance(found, dict) else {}


def measure_ram() -> dict[str, object]:
    """Of the machine, or of the container's share where that is less."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for path in MEMORY_LIMITS:
        text = read_text(path)
        if text.isdigit():
            total = min(total, int(text))
    available = next((line.split()[1] for line in read_text("/proc/meminfo").splitlines() if line.startswith("MemAvailable:")), None)
    return {"ram_total_bytes": total, "ram_free_bytes": min(total, int(available) * 1024) if available else None}


def measure_disk(folder: Path) -> dict[str, object]:
    """Where the folder is, or will be."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    return {"disk_free_bytes": shutil.disk_usage(place).free}


def read_text(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


if __name__ == "__main__":
    print(measure(Settings()).model_dump_json(indent=1), file=sys.stdout)
