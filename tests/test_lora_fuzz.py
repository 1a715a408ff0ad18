"""Hostile LoRA files: whatever the bytes, the answer is a report or a reason, in little memory."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.lora_files import REFUSED, TO_Q, Write, make_pairs, write_file, write_raw
from trainer_worker.lora import LoraLimits, LoraRefused, inspect_lora
from trainer_worker.lora_file import CHUNK_BYTES, open_tensor_file
from trainer_worker.lora_tensors import scan_tensors

TINY = 160


def inspect_or_refuse(path: Path) -> str:
    try:
        return inspect_lora(path).naming
    except LoraRefused as refused:
        return refused.code


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """A place to write to, and the bytes of a small good file."""
    folder = tmp_path_factory.mktemp("fuzz")
    layers = {"transformer_blocks.0.attn.to_q": (1, 1), "single_transformer_blocks.0.attn.to_k": (1, 1)}
    path = write_file(folder / "a.safetensors", make_pairs(layers, hidden=TINY, alpha=4), {"format": "pt"})
    assert inspect_or_refuse(path) == "diffusers"
    return path, path.read_bytes()


LENIENT = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@LENIENT
@given(data=st.data())
def test_no_corruption_is_unexpected(sample: tuple[Path, bytes], data: st.DataObject) -> None:
    path, whole = sample
    header_end = 8 + int.from_bytes(whole[:8], "little")
    edited = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, min(header_end + 64, len(edited))))
        until = at + data.draw(st.integers(0, 8))
        edited[at:until] = data.draw(st.binary(max_size=8) | st.sampled_from([b"{", b"}", b"[", b'"', b"\\", b"-1", b"0", b"NaN", b"null"]))
    if data.draw(st.booleans()):
        del edited[data.draw(st.integers(0, len(edited))) :]
    path.write_bytes(edited)
    inspect_or_refuse(path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 1 << 70) | st.floats() | st.text(max_size=5) | st.sampled_from(["F32", "BF16", "Q4"]),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "__metadata__", "x"]), inner)
    ),
    max_leaves=12,
)
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "U8", "I64"]) | JSON,
        "shape": st.lists(st.integers(-1, 1 << 66) | st.integers(0, 4), max_size=9) | JSON,
        "data_offsets": st.tuples(st.integers(0, 64), st.integers(0, 64)).map(list) | JSON,
    }
)
KEYS = st.sampled_from([f"{TO_Q}.lora_A.weight", f"{TO_Q}.lora_B.weight", f"{TO_Q}.alpha", "lycoris_x.lokr_w1", "__metadata__"]) | st.text(
    max_size=9
)


@LENIENT
@given(header=st.dictionaries(KEYS, ENTRY | JSON, max_size=6), extra=st.binary(max_size=64))
def test_no_header_is_unexpected(sample: tuple[Path, bytes], header: dict[str, object], extra: bytes) -> None:
    inspect_or_refuse(write_raw(sample[0], header, extra))


SHAPES = st.lists(st.sampled_from([1, 2, 4, 8, 16, 160, 640]), max_size=3)
PARTS = [
    "lora_A.weight",
    "lora_B.weight",
    "alpha",
    "dora_scale",
    "lokr_w1",
    "lokr_w1_a",
    "lokr_w1_b",
    "lokr_w2",
    "hada_w1_a",
    "hada_w2_b",
    "diff",
]


@LENIENT
@given(
    parts=st.dictionaries(
        st.sampled_from(PARTS), st.tuples(st.sampled_from(["F32", "F16", "I8", "F8_E4M3"]), SHAPES), min_size=1, max_size=5
    )
)
def test_no_set_of_parts_is_unexpected(sample: tuple[Path, bytes], parts: dict[str, tuple[str, list[int]]]) -> None:
    items = {"F32": 4, "F16": 2, "I8": 1, "F8_E4M3": 1}
    filled = {f"{TO_Q}.{part}": (dtype, shape, b"\1" * (items[dtype] * int(np.prod(shape)))) for part, (dtype, shape) in parts.items()}
    inspect_or_refuse(write_file(sample[0], filled))


def measure_peak_bytes(act: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        act()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def write_metadata_bomb(folder: Path) -> Path:
    return write_raw(folder / "a.safetensors", {"__metadata__": {str(n): "" for n in range(400_000)}})


@pytest.mark.parametrize(
    "write",
    [REFUSED[title][1] for title in ("a deep header", "a wide header", "a header of quotes", "huge header")] + [write_metadata_bomb],
)
def test_a_bomb_takes_little_memory(write: Write, tmp_path: Path) -> None:
    path = write(tmp_path)
    assert measure_peak_bytes(lambda: inspect_or_refuse(path)) < 48 << 20


def test_a_large_file_is_read_in_pieces(tmp_path: Path) -> None:
    size = 64 << 20
    path = write_raw(tmp_path / "a.safetensors", {"a": {"dtype": "BF16", "shape": [size // 2], "data_offsets": [0, size]}})
    with path.open("r+b") as stream:
        stream.truncate(path.stat().st_size + size)
    with open_tensor_file(path, LoraLimits()) as file:
        assert measure_peak_bytes(lambda: scan_tensors(file)) < 4 * CHUNK_BYTES
