"""What a trainer leaves in its output folder, and whether it can be read. The names are SimpleTuner's; the small trainer uses them too.

Only the files' frames are read (no weight): enough to tell a file that was cut off.
"""

from __future__ import annotations

import json
import re
import shutil
import struct
import zipfile
from pathlib import Path

WEIGHTS_NAME = "pytorch_lora_weights.safetensors"
STATE_NAME = "training_state.json"
OPTIMIZER_NAME = "optimizer.bin"
LAST_NAME = "random_states_0.pkl"  # written after all the others
FOLDER_NAME = re.compile(r"checkpoint-(\d+)")
LARGEST_HEADER_BYTES = 100 * 2**20  # the limit of the safetensors library itself
ASIDE = "broken-"  # SimpleTuner takes every folder whose name begins with "checkpoint" for one


def find_final_weights(output_dir: Path) -> Path | None:
    path = output_dir / WEIGHTS_NAME
    return path if is_whole_safetensors(path) else None


def find_checkpoints(output_dir: Path) -> list[tuple[int, Path]]:
    """(step, folder) of those that can be continued from, newest first."""
    return [(step, folder) for step, folder in list_checkpoints(output_dir) if is_whole_checkpoint(step, folder)]


def list_checkpoints(output_dir: Path) -> list[tuple[int, Path]]:
    """(step, folder) of all, newest first, whether whole or not."""
    if not output_dir.is_dir():
        return []
    found = [(FOLDER_NAME.fullmatch(folder.name), folder) for folder in output_dir.iterdir() if folder.is_dir()]
    return sorted(((int(name[1]), folder) for name, folder in found if name), reverse=True)


def set_broken_aside(output_dir: Path) -> list[Path]:
    """Rename checkpoints that cannot be continued from, so that no trainer takes one for its latest; their new places."""
    moved = []
    for step, folder in list_checkpoints(output_dir):
        if not is_whole_checkpoint(step, folder):
            place = folder.with_name(ASIDE + folder.name)
            if place.exists():
                shutil.rmtree(place)
            moved.append(folder.rename(place))
    return moved


def is_whole_checkpoint(step: int, folder: Path) -> bool:
    """The state is the last but three that a trainer writes; optimizer, schedule and random states come after it, in this order.

    Interrupted in torch's writing, Python still closes the archive: it looks whole and lacks its tensors. Only the file behind it tells.
    """
    try:
        state = json.loads((folder / STATE_NAME).read_text("utf-8"))
    except (OSError, ValueError):
        return False
    archives = [*folder.glob("*.bin"), folder / LAST_NAME]
    return (
        isinstance(state, dict)
        and state.get("global_step") == step
        and is_whole_safetensors(folder / WEIGHTS_NAME)
        and folder / OPTIMIZER_NAME in archives
        # torch writes zip files, whose list of contents comes last.
        and all(zipfile.is_zipfile(path) for path in archives)
    )


def is_whole_safetensors(path: Path) -> bool:
    """Its header can be read and the tensors it lists fill the file exactly."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(size - 8, LARGEST_HEADER_BYTES):
                return False
            header = json.loads(file.read(length))
    except (OSError, ValueError, struct.error):
        return False
    if not isinstance(header, dict):
        return False
    ends = [read_end(entry) for name, entry in header.items() if name != "__metadata__"]
    return bool(ends) and max(ends) == size - 8 - length and min(ends) >= 0


def read_end(entry: object) -> int:
    """Where a tensor's bytes end, counted from the end of the header; -1 for an entry that says none."""
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    return offsets[1] if isinstance(offsets, list) and len(offsets) == 2 and all(isinstance(offset, int) for offset in offsets) else -1
