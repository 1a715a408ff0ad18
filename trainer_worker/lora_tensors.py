"""The numbers inside a LoRA's tensors: one pass over the file that finds NaN, Inf and all-zero tensors and makes the checksums.

It holds one piece of a few MB at a time and does not know what a tensor is for.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from trainer_worker.lora_file import CHUNK_BYTES, Tensor, TensorFile, refuse


class Bits(NamedTuple):
    """How to look at a float as an unsigned number: not finite where all bits of `special` are set; -0.0 is zero too."""

    word: str
    special: int
    sign: int


FLOATS = {
    "F64": Bits("<u8", 0x7FF0_0000_0000_0000, 1 << 63),
    "F32": Bits("<u4", 0x7F80_0000, 1 << 31),
    "F16": Bits("<u2", 0x7C00, 1 << 15),
    "BF16": Bits("<u2", 0x7F80, 1 << 15),
    "F8_E5M2": Bits("u1", 0x7C, 1 << 7),
    "F8_E4M3": Bits("u1", 0x7F, 1 << 7),  # has no Inf and a single NaN
}
SCALARS = {"F64": "<d", "F32": "<f", "F16": "<e", "I64": "<q", "I32": "<i", "I16": "<h", "I8": "<b", "U8": "<B"}


@dataclass(frozen=True)
class Scan:
    """`sha256` of the whole file; `digests` by key, of each tensor's bytes; `zeros` are the keys of tensors of nothing but zeros."""

    sha256: str
    digests: dict[str, str]
    zeros: frozenset[str]


def scan_tensors(file: TensorFile) -> Scan:
    """Read everything once. Raises LoraRefused at the first tensor with NaN or Inf."""
    whole = hashlib.sha256()
    file.stream.seek(0)
    left = file.data_start
    while left and (piece := file.stream.read(min(left, CHUNK_BYTES))):
        whole.update(piece)
        left -= len(piece)
    digests, zeros = {}, set()
    for tensor in file.tensors:
        own, is_zero = hashlib.sha256(), True
        for piece in file.read(tensor):
            whole.update(piece)
            own.update(piece)
            is_zero &= look_at(tensor, piece)
        digests[tensor.key] = own.hexdigest()
        if is_zero:
            zeros.add(tensor.key)
    return Scan(whole.hexdigest(), digests, frozenset(zeros))


def look_at(tensor: Tensor, piece: bytes) -> bool:
    """Whether the piece is all zeros; raises LoraRefused where a number is not finite."""
    bits = FLOATS.get(tensor.dtype)
    if bits is None:
        return not any(piece)
    words = np.frombuffer(piece, dtype=bits.word)
    special, sign = words.dtype.type(bits.special), words.dtype.type(bits.sign)
    if bool(((words & special) == special).any()):
        hint = "Such a training has diverged; use an earlier checkpoint or a lower learning rate."
        refuse("lora_not_finite", f"{tensor.key} holds NaN or Inf.", hint, key=tensor.key)
    return not bool((words & ~sign).any())


def read_scalar(file: TensorFile, tensor: Tensor) -> float:
    """The one number of an alpha tensor."""
    if tensor.size_bytes > 8 or any(side != 1 for side in tensor.shape):
        refuse("lora_shape_mismatch", f"{tensor.key} must be one number; its shape is {list(tensor.shape)}.", key=tensor.key)
    data = b"".join(file.read(tensor))
    if tensor.dtype == "BF16":  # the upper half of an F32
        return float(struct.unpack("<f", b"\0\0" + data)[0])
    if tensor.dtype not in SCALARS:
        refuse("lora_unknown_dtype", f"{tensor.key}: no alpha is {tensor.dtype}.", key=tensor.key, allowed=["BF16", *sorted(SCALARS)])
    return float(struct.unpack(SCALARS[tensor.dtype], data)[0])
