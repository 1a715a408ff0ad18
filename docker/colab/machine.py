"""What the machine says of itself: GPU by nvidia-smi, memory, disk, token. The standard library alone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from decisions import Machine

NVIDIA_SMI = ["nvidia-smi", "--query-gpu=memory.total,name", "--format=csv,noheader,nounits"]


def read_gpu(text: str) -> tuple[int, str]:
    """(bytes, name) of the first GPU in nvidia-smi's answer; (0, "") without one."""
    memory, _, name = (text.strip().splitlines() or [""])[0].partition(",")
    return (int(memory) * 1024 * 1024, name.strip()) if memory.strip().isdecimal() else (0, "")


def ask_gpu() -> tuple[int, str]:
    try:
        done = subprocess.run(NVIDIA_SMI, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return 0, ""
    return read_gpu(done.stdout) if done.returncode == 0 else (0, "")


def find_existing(folder: Path) -> Path:
    """The folder, or the nearest one above that is there."""
    return folder if folder.exists() else find_existing(folder.parent)


def measure(folder: Path, keep: str, env: Mapping[str, str]) -> Machine:
    """This machine, as it is now. `folder` is where everything is put."""
    gpu_bytes, gpu_name = ask_gpu()
    kept = Path(keep) if keep and not keep.startswith("s3://") else None
    return Machine(
        gpu_bytes,
        os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        shutil.disk_usage(find_existing(folder)).free,
        gpu_name,
        has_hf_token=bool(env.get("HF_TOKEN")),
        has_python_3_11=shutil.which("python3.11") is not None,
        keep_free_bytes=shutil.disk_usage(find_existing(kept)).free if kept else None,
    )


def load(file: Path) -> Machine:
    """A machine that was described before."""
    return Machine(**json.loads(file.read_text()))
