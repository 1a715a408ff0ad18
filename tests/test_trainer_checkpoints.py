"""Checkpoints as trainers leave them, and as a kill or a full disk does."""

from __future__ import annotations

import json
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from trainer_worker.checkpoints import (
    LAST_NAME,
    OPTIMIZER_NAME,
    STATE_NAME,
    WEIGHTS_NAME,
    find_checkpoints,
    find_final_weights,
    is_whole_safetensors,
    set_broken_aside,
)

Damage = Callable[[Path], object]


def write_weights(path: Path, header: object = None, data: bytes = b"\0" * 8) -> None:
    tensors = {"__metadata__": {"format": "pt"}, "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
    text = json.dumps(tensors if header is None else header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def write_checkpoint(output_dir: Path, step: int) -> Path:
    folder = output_dir / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    write_weights(folder / WEIGHTS_NAME)
    (folder / STATE_NAME).write_text(json.dumps({"global_step": step}))
    for name in (OPTIMIZER_NAME, "scheduler.bin", LAST_NAME):
        with zipfile.ZipFile(folder / name, "w") as archive:
            archive.writestr("data", b"0" * 100)
    return folder


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4])


DAMAGES: dict[str, Damage] = {
    "no state": lambda folder: (folder / STATE_NAME).unlink(),
    "half a state": lambda folder: cut(folder / STATE_NAME),
    "another step's state": lambda folder: (folder / STATE_NAME).write_text('{"global_step": 3}'),
    "a state that is a list": lambda folder: (folder / STATE_NAME).write_text("[20]"),
    "no weights": lambda folder: (folder / WEIGHTS_NAME).unlink(),
    "cut weights": lambda folder: cut(folder / WEIGHTS_NAME),
    "no optimizer": lambda folder: (folder / OPTIMIZER_NAME).unlink(),
    "cut optimizer": lambda folder: cut(folder / OPTIMIZER_NAME),
    "interrupted at the optimizer, which Python closed": lambda folder: (folder / LAST_NAME).unlink(),
    "cut random states": lambda folder: cut(folder / LAST_NAME),
    "empty schedule": lambda folder: (folder / "scheduler.bin").write_bytes(b""),
}


def test_whole_checkpoints_come_newest_first(tmp_path: Path) -> None:
    for step in (10, 9, 100):
        write_checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-final").mkdir()
    (tmp_path / "checkpoint-7").write_text("a file")
    assert find_checkpoints(tmp_path) == [(step, tmp_path / f"checkpoint-{step}") for step in (100, 10, 9)]
    assert find_checkpoints(tmp_path / "nowhere") == []


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_broken_newest_checkpoint_gives_way_to_the_one_before(tmp_path: Path, damage: Damage) -> None:
    write_checkpoint(tmp_path, 10)
    newest = write_checkpoint(tmp_path, 20)
    assert len(find_checkpoints(tmp_path)) == 2
    damage(newest)
    assert [step for step, _ in find_checkpoints(tmp_path)] == [10]
    assert set_broken_aside(tmp_path) == [tmp_path / "broken-checkpoint-20"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken-checkpoint-20", "checkpoint-10"]
    # The same step may break once more.
    damage(write_checkpoint(tmp_path, 20))
    assert len(set_broken_aside(tmp_path)) == 1


@pytest.mark.parametrize(
    "header",
    [
        {},
        {"__metadata__": {}},
        [],
        {"a": {"data_offsets": [0, 4]}},
        {"a": {"data_offsets": [0, 12]}},
        {"a": {"data_offsets": "08"}},
        {"a": {}},
        {"a": 3},
    ],
)
def test_headers_that_do_not_fit_their_file_are_refused(tmp_path: Path, header: object) -> None:
    write_weights(tmp_path / WEIGHTS_NAME, header)
    assert find_final_weights(tmp_path) is None


@pytest.mark.parametrize(
    "content", [b"", b"1234", struct.pack("<Q", 2**60) + b"{}", struct.pack("<Q", 4) + b"\xff\xff\xff\xff", b"\x80\x04pickle" * 9]
)
def test_other_files_are_no_weights(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / WEIGHTS_NAME
    assert not is_whole_safetensors(path)
    path.write_bytes(content)
    assert not is_whole_safetensors(path)
    write_weights(path)
    assert find_final_weights(tmp_path) == path
