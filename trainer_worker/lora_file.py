"""A safetensors file from an unknown sender: its header, checked before it is believed, and its tensors, read in bounded pieces.

It knows the format and nothing of LoRAs. The format: 8 bytes of header length, a JSON header, then the tensors without gaps.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from trainer_worker.lora_refused import LoraRefused

EXTENSION = ".safetensors"
CHUNK_BYTES = 4 << 20  # a multiple of every item size
MOST_DIMENSIONS = 8
LONGEST_KEY = 512
ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 1),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("I64", "U64", "F64"), 8),
}
# A whole text, or one mark outside of texts. Possessive and without a way to fail, so that a header of quotes takes linear time.
STRUCTURE = re.compile(r'"(?:[^"\\]|\\.)*+(?:"|\\?\Z)|[\[\]{},:]', re.S)
HALF_LETTER = re.compile("[\ud800-\udfff]")  # of a surrogate pair; JSON can spell one, UTF-8 cannot
DEEPEST = 3  # {"key": {"shape": [...]}}
MARKS_PER_TENSOR = 32  # brackets, commas and colons outside of strings; a tensor of eight dimensions has 22
CONTENTS = {
    b"PK\x03\x04": "a zip archive, as torch.save writes",
    b"\x80\x02": "a Python pickle",
    b"\x80\x03": "a Python pickle",
    b"\x80\x04": "a Python pickle",
    b"\x80\x05": "a Python pickle",
    b"GGUF": "a GGUF file",
    b"<": "a web page",
    b"version https://git-lfs": "a Git LFS pointer",
}


@dataclass(frozen=True)
class LoraLimits:
    """What a file may cost. A rank 128 LoRA of every Flux layer in bf16 is 1.2 GB; headers of real files stay under a few MB."""

    file_bytes: int = 4 << 30
    header_bytes: int = 16 << 20
    tensors: int = 10_000


@dataclass(frozen=True)
class Tensor:
    """Where a tensor lies: `start` and `end` count from the first byte after the header."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def size_bytes(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class TensorFile:
    """An open file whose header holds what it promises. `tensors` are in the order of their bytes."""

    stream: BinaryIO
    size_bytes: int
    data_start: int
    tensors: tuple[Tensor, ...]
    metadata: dict[str, str]

    def read(self, tensor: Tensor) -> Iterator[bytes]:
        """The tensor's bytes in pieces of CHUNK_BYTES."""
        self.stream.seek(self.data_start + tensor.start)
        left = tensor.size_bytes
        while left:
            piece = self.stream.read(min(left, CHUNK_BYTES))
            if not piece:
                raise LoraRefused(f"{tensor.key}: the file became shorter while it was read.", code="lora_changed")
            left -= len(piece)
            yield piece


@contextmanager
def open_tensor_file(path: Path, limits: LoraLimits) -> Iterator[TensorFile]:
    """Open without following a symbolic link, and check all of the header. Raises LoraRefused."""
    with open_regular_file(path) as stream:
        size = os.fstat(stream.fileno()).st_size
        if size > limits.file_bytes:
            refuse("lora_too_large", f"The file has {size} bytes; at most {limits.file_bytes} are allowed.", size_bytes=size)
        data_start, text = read_header(stream, size, limits)
        header = parse_json(text, marks=limits.tensors * MARKS_PER_TENSOR)
        metadata = check_metadata(header.pop("__metadata__", {}))
        if not 0 < len(header) <= limits.tensors:
            refuse("lora_too_many_tensors", f"The file has {len(header)} tensors; 1 to {limits.tensors} are allowed.", tensors=len(header))
        tensors = sorted((read_entry(key, entry) for key, entry in header.items()), key=lambda tensor: tensor.start)
        check_ranges(tensors, size - data_start)
        yield TensorFile(stream, size, data_start, tuple(tensors), metadata)


def refuse(code: str, message: str, hint: str | None = None, **details: Any) -> NoReturn:
    raise LoraRefused(message, code=code, hint=hint, details=details)


def open_regular_file(path: Path) -> BinaryIO:
    try:
        # O_NONBLOCK: opening a pipe must not wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ELOOP:
            refuse("lora_symlink", f"{path.name} is a symbolic link.", "Give the file itself.")
        refuse("lora_not_a_file", f"{path.name} cannot be opened: {error.strerror}.")
    except ValueError as error:  # a NUL byte in the path
        raise LoraRefused(f"{path.name!r} is no file name: {error}.", code="lora_bad_name") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        refuse("lora_not_a_file", f"{path.name} is not a regular file.")
    return os.fdopen(descriptor, "rb")


def read_header(stream: BinaryIO, size: int, limits: LoraLimits) -> tuple[int, str]:
    """(where the tensors begin, the header's text)"""
    start = stream.read(32)
    if start[8:9] != b"{":
        found = next((what for magic, what in CONTENTS.items() if start.startswith(magic)), "something else")
        hint = "Save it again with safetensors; a pickle can run code when it is opened and is never read here."
        refuse("lora_not_safetensors", f"This is no safetensors file but {found}.", hint, size_bytes=size)
    length = int.from_bytes(start[:8], "little")
    if length > limits.header_bytes:
        refuse(
            "lora_header_too_large", f"The header claims {length} bytes; at most {limits.header_bytes} are allowed.", header_bytes=length
        )
    if 8 + length > size:
        hint = "The upload or the copy was cut off; send the whole file."
        refuse("lora_truncated", f"The header takes {length} bytes, but the file has only {size}.", hint, expected_bytes=8 + length)
    stream.seek(8)
    try:
        return 8 + length, stream.read(length).decode()
    except UnicodeDecodeError as error:
        raise LoraRefused(f"The header is not UTF-8: {error}.", code="lora_bad_header") from error


def parse_json(text: str, marks: int) -> dict[str, Any]:
    """A JSON object of little depth, without repeated keys. `marks` bounds its size in memory before it is built."""
    depth = seen = 0
    for found in STRUCTURE.finditer(text):
        mark = text[found.start()]
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(mark, 0)
        seen += mark != '"'
        if depth > DEEPEST or seen > marks:
            refuse("lora_bad_header", f"The header is nested deeper than {DEEPEST} levels or has more than {marks} parts.")
    try:
        header = json.loads(text, object_pairs_hook=keep_single, parse_constant=refuse_constant)
    except ValueError as error:  # also a number of too many digits
        raise LoraRefused(f"The header is no JSON: {error}.", code="lora_bad_header") from error
    if not isinstance(header, dict):
        refuse("lora_bad_header", "The header is no JSON object.")
    return header


def refuse_constant(name: str) -> NoReturn:
    refuse("lora_bad_header", f"{name} is no JSON.")


def keep_single(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        refuse("lora_duplicate_key", f"The header names {twice[:LONGEST_KEY]!r} twice.", key=twice[:LONGEST_KEY])
    return found


def check_metadata(metadata: Any) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        refuse("lora_bad_header", "__metadata__ must map texts to texts.")
    if any(HALF_LETTER.search(text) for pair in metadata.items() for text in pair):
        refuse("lora_bad_header", "__metadata__ holds half of a surrogate pair, which cannot be written again.")
    return metadata


def read_entry(key: str, entry: Any) -> Tensor:
    if not key.isprintable() or len(key) > LONGEST_KEY:
        refuse("lora_bad_header", f"The tensor name {key[:64]!r} is not printable or longer than {LONGEST_KEY} characters.")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        refuse("lora_bad_header", f"{key}: an entry has dtype, shape and data_offsets.", key=key)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        refuse("lora_unknown_dtype", f"{key}: unknown dtype {str(dtype)[:32]!r}.", key=key, allowed=sorted(ITEM_BYTES))
    if not is_counts(shape) or len(shape) > MOST_DIMENSIONS or 0 in shape:
        refuse("lora_bad_header", f"{key}: a shape is at most {MOST_DIMENSIONS} positive numbers.", key=key)
    if not is_counts(offsets) or len(offsets) != 2:
        refuse("lora_bad_header", f"{key}: data_offsets are two numbers.", key=key)
    if offsets[1] - offsets[0] != prod(shape) * ITEM_BYTES[dtype]:
        refuse("lora_bad_header", f"{key}: its shape and dtype need another number of bytes than its data_offsets span.", key=key)
    return Tensor(key, dtype, tuple(shape), offsets[0], offsets[1])


def is_counts(value: Any) -> bool:
    """Whether it is a list of natural numbers; True is a bool, and 64 bits are enough for all."""
    return isinstance(value, list) and all(type(number) is int and 0 <= number < 1 << 63 for number in value)


def check_ranges(tensors: list[Tensor], data_bytes: int) -> None:
    """The tensors must lie one after the other and fill the file."""
    expected = 0
    for tensor in tensors:
        if tensor.start != expected:
            problem = (
                "overlaps another tensor" if tensor.start < expected else f"leaves a hole of {tensor.start - expected} bytes before it"
            )
            refuse("lora_bad_header", f"{tensor.key} {problem}.", key=tensor.key)
        expected = tensor.end
    if expected > data_bytes:
        hint = "The upload or the copy was cut off; send the whole file."
        refuse(
            "lora_truncated",
            f"The tensors take {expected} bytes, but the file holds {data_bytes}.",
            hint,
            missing_bytes=expected - data_bytes,
        )
    if expected < data_bytes:
        refuse("lora_bad_header", f"{data_bytes - expected} bytes follow the last tensor.", extra_bytes=data_bytes - expected)
