"""LoRA files for tests, written byte by byte: of every naming, and broken in every way. Needs no torch."""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
RANK = 4
FLUX1 = 3072
# layer -> (outputs, inputs) in units of the hidden width. All in the first blocks, which the smallest stand-in of a model has too.
DIFFUSERS = {
    "transformer_blocks.0.attn.to_q": (1, 1),
    "transformer_blocks.0.attn.add_v_proj": (1, 1),
    "transformer_blocks.0.attn.to_out.0": (1, 1),
    "transformer_blocks.0.ff.net.0.proj": (4, 1),
    "transformer_blocks.0.norm1_context.linear": (6, 1),
    "single_transformer_blocks.0.attn.to_k": (1, 1),
    "single_transformer_blocks.0.proj_mlp": (4, 1),
    "single_transformer_blocks.0.proj_out": (1, 5),
}
BFL = {
    "double_blocks.0.img_attn.qkv": (3, 1),
    "double_blocks.0.txt_mlp.2": (1, 4),
    "single_blocks.0.linear1": (7, 1),
    "single_blocks.0.modulation.lin": (3, 1),
}
Entry = tuple[str, list[int], bytes]  # dtype, shape, bytes


def random_matrix(outputs: int, inputs: int) -> Array:
    return np.random.default_rng(outputs * 7 + inputs).normal(0, 0.02, (outputs, inputs)).astype(np.float32)


def pack(array: Array, dtype: str = "BF16") -> Entry:
    """An array as a file holds it. BF16 is the upper half of F32."""
    shape = list(array.shape)
    if dtype == "BF16":
        return dtype, shape, (array.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()
    return dtype, shape, array.astype({"F16": "<f2", "F32": "<f4", "F64": "<f8"}[dtype]).tobytes()


def write_file(path: Path, entries: Mapping[str, Entry], metadata: Mapping[str, str] | None = None) -> Path:
    """A correct safetensors file."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    start = 0
    for key, (dtype, shape, data) in entries.items():
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [start, start + len(data)]}
        start += len(data)
    return write_raw(path, header, b"".join(data for _, _, data in entries.values()))


def write_raw(path: Path, header: Any, data: bytes = b"") -> Path:
    """Any header (an object, or the text itself) before any data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def make_pairs(
    layers: Mapping[str, tuple[int, int]],
    prefix: str = "transformer.",
    ends: tuple[str, str] = (".lora_A.weight", ".lora_B.weight"),
    *,
    dotted: bool = True,
    alpha: float | None = None,
    hidden: int = FLUX1,
    dtype: str = "BF16",
) -> dict[str, Entry]:
    """The two halves for every layer, and its alpha if there is one."""
    entries = {}
    for layer, (outputs, inputs) in layers.items():
        name = prefix + (layer if dotted else layer.replace(".", "_"))
        entries[name + ends[0]] = pack(random_matrix(RANK, inputs * hidden), dtype)
        entries[name + ends[1]] = pack(random_matrix(outputs * hidden, RANK), dtype)
        if alpha is not None:
            entries[name + ".alpha"] = pack(np.array(alpha), dtype)
    return entries


DOWN_UP = (".lora_down.weight", ".lora_up.weight")


def make_lokr() -> dict[str, Entry]:
    """Kronecker products, as SimpleTuner's LyCORIS writes them."""
    entries = {}
    for layer in ("transformer_blocks_0_attn_to_q", "single_transformer_blocks_0_attn_to_v"):
        entries[f"lycoris_{layer}.lokr_w1"] = pack(random_matrix(16, 16))
        entries[f"lycoris_{layer}.lokr_w2_a"] = pack(random_matrix(192, RANK))
        entries[f"lycoris_{layer}.lokr_w2_b"] = pack(random_matrix(RANK, 192))
        entries[f"lycoris_{layer}.alpha"] = pack(np.array(4.0))
    return entries


def make_loha() -> dict[str, Entry]:
    entries = {}
    for half in ("w1", "w2"):
        entries[f"lycoris_transformer_blocks_0_attn_to_q.hada_{half}_a"] = pack(random_matrix(FLUX1, RANK))
        entries[f"lycoris_transformer_blocks_0_attn_to_q.hada_{half}_b"] = pack(random_matrix(RANK, FLUX1))
    return entries


Write = Callable[[Path], Path]


def of_entries(entries: Callable[[], Mapping[str, Entry]], metadata: Mapping[str, str] | None = None) -> Write:
    return lambda folder: write_file(folder / "a.safetensors", entries(), metadata)


@dataclass(frozen=True)
class Good:
    """A file that is taken. `layers` of it ComfyUI patches after publishing, `before` as it came."""

    title: str
    naming: str
    write: Write
    layers: int = len(DIFFUSERS)
    before: int = len(DIFFUSERS)
    alpha: float | None = None
    left_out: int = 0

    @property
    def converts(self) -> bool:
        return self.before < self.layers


def ignored(title: str, naming: str, entries: Callable[[], Mapping[str, Entry]], layers: int = len(DIFFUSERS), **more: Any) -> Good:
    """One whose keys ComfyUI does not know."""
    return Good(title, naming, of_entries(entries), layers, 0, **more)


GOOD = (
    Good("diffusers, as SimpleTuner ends", "diffusers", of_entries(lambda: make_pairs(DIFFUSERS))),
    Good(
        "diffusers lora.down, as its checkpoints",
        "diffusers_updown",
        of_entries(lambda: make_pairs(DIFFUSERS, ends=(".lora.down.weight", ".lora.up.weight"))),
    ),
    Good("diffusers lora_down", "diffusers_updown", of_entries(lambda: make_pairs(DIFFUSERS, ends=DOWN_UP, alpha=2)), alpha=2.0),
    Good(
        "PEFT's default adapter",
        "diffusers",
        of_entries(lambda: make_pairs(DIFFUSERS, ends=(".lora_A.default.weight", ".lora_B.default.weight"))),
    ),
    Good(
        "kohya",
        "kohya",
        of_entries(lambda: make_pairs(BFL, "lora_unet_", DOWN_UP, dotted=False, alpha=2, dtype="F16")),
        len(BFL),
        len(BFL),
        alpha=2.0,
    ),
    Good("BFL", "bfl", of_entries(lambda: make_pairs(BFL, "diffusion_model.", dtype="F32")), len(BFL), len(BFL)),
    Good("LyCORIS", "lycoris", of_entries(lambda: make_pairs(DIFFUSERS, "lycoris_", DOWN_UP, dotted=False, alpha=4)), alpha=4.0),
    Good("LyCORIS LoKr", "lycoris", of_entries(make_lokr), 2, 2, alpha=4.0),
    Good("LyCORIS LoHa", "lycoris", of_entries(make_loha), 1, 1),
    Good(
        "OneTrainer",
        "onetrainer",
        of_entries(lambda: make_pairs(DIFFUSERS, "lora_transformer_", DOWN_UP, dotted=False, alpha=4)),
        alpha=4.0,
    ),
    Good(
        "kohya with a text encoder and a stranger",
        "kohya",
        of_entries(
            lambda: (
                make_pairs(BFL, "lora_unet_", DOWN_UP, dotted=False, alpha=2)
                | make_pairs({"text_model_encoder_layers_0_mlp_fc1": (4, 1)}, "lora_te1_", DOWN_UP, hidden=64)
                | make_pairs({"nowhere": (1, 1)}, "lora_unet_", DOWN_UP, hidden=64)
            )
        ),
        len(BFL),
        len(BFL),
        alpha=2.0,
        left_out=4,
    ),
    ignored("diffusers without prefix", "bare_diffusers", lambda: make_pairs(DIFFUSERS, "")),
    ignored("BFL without prefix", "bare_bfl", lambda: make_pairs(BFL, ""), len(BFL)),
    ignored("PEFT's own", "peft_base_model", lambda: make_pairs(DIFFUSERS, "base_model.model.", alpha=8), alpha=8.0),
    ignored("unet prefix", "unet", lambda: make_pairs(DIFFUSERS, "unet.")),
    ignored("kohya with diffusers names", "kohya_diffusers", lambda: make_pairs(DIFFUSERS, "lora_unet_", DOWN_UP, dotted=False)),
    ignored("SimpleTuner's comfyui checkpoint", "bfl_diffusers", lambda: make_pairs(DIFFUSERS, "diffusion_model.", alpha=4), alpha=4.0),
    ignored(
        "an adapter of another name",
        "diffusers",
        lambda: make_pairs(DIFFUSERS, ends=(".lora_A.style.weight", ".lora_B.style.weight")),
    ),
)

# -- files that are refused ------------------------------------------------------------------------------------


def write_good(folder: Path, name: str = "a.safetensors") -> Path:
    return write_file(folder / name, make_pairs(DIFFUSERS))


def cut_off(folder: Path) -> Path:
    path = write_good(folder)
    os.truncate(path, path.stat().st_size - 1000)
    return path


def cut_in_header(folder: Path) -> Path:
    path = write_good(folder)
    os.truncate(path, 100)
    return path


def pickle_renamed(folder: Path) -> Path:
    path = folder / "a.safetensors"
    path.write_bytes(pickle.dumps({"transformer.x_embedder.lora_A.weight": [0.0] * 1000}))
    return path


def zip_renamed(folder: Path) -> Path:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}))
    path = folder / "a.safetensors"
    path.write_bytes(packed.getvalue())
    return path


def huge_header(folder: Path) -> Path:
    """A claim of 200 MB, in a file that is as large, without taking the disk."""
    path = folder / "a.safetensors"
    path.write_bytes((200 << 20).to_bytes(8, "little") + b'{"')
    os.truncate(path, (200 << 20) + 8)
    return path


def symlink(folder: Path) -> Path:
    write_good(folder, "real.safetensors")
    (folder / "a.safetensors").symlink_to(folder / "real.safetensors")
    return folder / "a.safetensors"


def climbing_path(folder: Path) -> Path:
    (folder / "sub").mkdir()
    write_good(folder)
    return folder / "sub" / ".." / "a.safetensors"


def pipe(folder: Path) -> Path:
    os.mkfifo(folder / "a.safetensors")
    return folder / "a.safetensors"


def directory(folder: Path) -> Path:
    (folder / "a.safetensors").mkdir()
    return folder / "a.safetensors"


def empty(folder: Path) -> Path:
    (folder / "a.safetensors").touch()
    return folder / "a.safetensors"


def with_number(number: float, dtype: str = "BF16") -> Write:
    def write(folder: Path) -> Path:
        entries = make_pairs(DIFFUSERS, dtype=dtype)
        matrix = random_matrix(RANK, FLUX1)
        matrix[RANK - 1, FLUX1 - 1] = number
        return write_file(
            folder / "a.safetensors", entries | {"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": pack(matrix, dtype)}
        )

    return write


def untrained(folder: Path) -> Path:
    """As after no step: every lora_B is zero, some of them a negative zero."""
    entries = make_pairs(DIFFUSERS)
    entries |= {key: (dtype, shape, b"\0\x80" * (len(data) // 2)) for key, (dtype, shape, data) in entries.items() if "lora_B" in key}
    return write_file(folder / "a.safetensors", entries)


def without(part: str) -> Write:
    def write(folder: Path) -> Path:
        return write_file(folder / "a.safetensors", {key: entry for key, entry in make_pairs(DIFFUSERS).items() if part not in key})

    return write


def with_more(entries: Callable[[], dict[str, Entry]]) -> Write:
    return lambda folder: write_file(folder / "a.safetensors", make_pairs(DIFFUSERS) | entries())


def of_header(header: Any, data: bytes = b"") -> Write:
    return lambda folder: write_raw(folder / "a.safetensors", header, data)


def entry(start: int, end: int, *, dtype: str = "U8", shape: Iterable[int] | None = None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - start] if shape is None else list(shape), "data_offsets": [start, end]}


SDXL = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
TO_Q = "transformer.transformer_blocks.0.attn.to_q"
REFUSED: dict[str, tuple[str, Write]] = {
    "truncated": ("lora_truncated", cut_off),
    "truncated in its header": ("lora_truncated", cut_in_header),
    "a pickle renamed": ("lora_not_safetensors", pickle_renamed),
    "a zip renamed": ("lora_not_safetensors", zip_renamed),
    "empty": ("lora_not_safetensors", empty),
    "wrong extension": ("lora_extension", lambda folder: write_good(folder, "a.ckpt")),
    "hidden": ("lora_bad_name", lambda folder: write_good(folder, ".a.safetensors")),
    "huge header": ("lora_header_too_large", huge_header),
    "symlink": ("lora_symlink", symlink),
    "a path that climbs": ("lora_bad_name", climbing_path),
    "a pipe": ("lora_not_a_file", pipe),
    "a folder": ("lora_not_a_file", directory),
    "not there": ("lora_not_a_file", lambda folder: folder / "a.safetensors"),
    "NaN": ("lora_not_finite", with_number(float("nan"))),
    "Inf in F16": ("lora_not_finite", with_number(float("inf"), "F16")),
    "-Inf in F32": ("lora_not_finite", with_number(-float("inf"), "F32")),
    "trained for no step": ("lora_trains_nothing", untrained),
    "zero coverage": ("lora_no_coverage", of_entries(lambda: make_pairs({"foo": (1, 1)}, "", hidden=64))),
    "another base: SDXL": ("lora_wrong_base", of_entries(lambda: make_pairs({SDXL: (1, 1)}, "", DOWN_UP, hidden=640))),
    "another base: more blocks": ("lora_wrong_base", with_more(lambda: make_pairs({"transformer_blocks.19.attn.to_q": (1, 1)}))),
    "another base: Qwen": ("lora_wrong_base", with_more(lambda: make_pairs({"transformer_blocks.0.img_mlp.net.2": (1, 4)}))),
    "another width": ("lora_shape_mismatch", of_entries(lambda: make_pairs(DIFFUSERS, hidden=1536))),
    "one layer of another shape": ("lora_shape_mismatch", with_more(lambda: make_pairs({"x_embedder": (1, 1)}))),
    "half of a pair": ("lora_unpaired", without("to_q.lora_A")),
    "one layer under two names": (
        "lora_duplicate_key",
        with_more(lambda: make_pairs({"double_blocks.0.img_attn.proj": (1, 1)}, "diffusion_model.")),
    ),
    "PEFT's DoRA": ("lora_unsupported", with_more(lambda: {f"{TO_Q}.lora_magnitude_vector": pack(random_matrix(1, FLUX1)[0])})),
    "integers as weights": (
        "lora_unknown_dtype",
        with_more(lambda: {f"{TO_Q}.lora_A.weight": ("I8", [RANK, FLUX1], b"\1" * RANK * FLUX1)}),
    ),
    "an alpha of two numbers": ("lora_shape_mismatch", with_more(lambda: {f"{TO_Q}.alpha": pack(np.ones(2))})),
    "unknown dtype": ("lora_unknown_dtype", of_header({"a": entry(0, 4, dtype="Q4_0")}, bytes(4))),
    "a key twice": ("lora_duplicate_key", of_header(b'{"a":{"dtype":"U8"},"a":{"dtype":"U8"}}')),
    "overlapping tensors": ("lora_bad_header", of_header({"a": entry(0, 4), "b": entry(2, 6)}, bytes(6))),
    "a hole": ("lora_bad_header", of_header({"a": entry(0, 4), "b": entry(6, 8)}, bytes(8))),
    "bytes at the end": ("lora_bad_header", of_header({"a": entry(0, 4)}, bytes(5))),
    "a shape that lies": ("lora_bad_header", of_header({"a": entry(0, 4, shape=[1 << 40, 1 << 40])}, bytes(4))),
    "a negative offset": ("lora_bad_header", of_header({"a": entry(-4, 0, shape=[4])}, bytes(4))),
    "an empty tensor": ("lora_bad_header", of_header({"a": entry(0, 0)})),
    "an offset of 10000 digits": ("lora_bad_header", of_header(b'{"a":' + b"1" * 10_000 + b"}")),
    "a deep header": ("lora_bad_header", of_header(b'{"a":' + b"[" * 200_000)),
    "a wide header": ("lora_bad_header", of_header(b'{"a":[' + b"[],[]," * 200_000)),
    "a header of quotes": ("lora_bad_header", of_header(b'{"' + b'\\"' * 400_000)),
    "a header that is no UTF-8": ("lora_bad_header", of_header(b'{"\xff":1}')),
    "metadata that is no text": ("lora_bad_header", of_header({"__metadata__": {"a": 1}, "b": entry(0, 4)}, bytes(4))),
    "half a letter in the metadata": ("lora_bad_header", of_header({"__metadata__": {"a": "\ud800"}, "b": entry(0, 4)}, bytes(4))),
    "no tensors": ("lora_too_many_tensors", of_header({})),
    "too many tensors": ("lora_too_many_tensors", of_header({f"t{n}": entry(n, n + 1) for n in range(10_001)}, bytes(10_001))),
    "a name with a line break": ("lora_bad_header", of_header({"a\nb": entry(0, 4)}, bytes(4))),
}
