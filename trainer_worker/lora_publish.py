"""The LoRA file that people use: keys that ComfyUI applies, our metadata in its header, and a name that never means other bytes.

A published file appears whole or not at all. ComfyUI lists a file the moment it exists, and keeps what it read under a name.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from trainer_worker.lora import Judged, LoraReport, open_lora
from trainer_worker.lora_file import EXTENSION, ITEM_BYTES, LoraLimits, Tensor, refuse

PREFIX = "fluxgate."
CALLERS_KEYS = frozenset({"base_model", "trigger_word", "training", "settings"})
NAME = re.compile(r"[a-z0-9_-]{1,64}")
ALIGNMENT = 8  # of the header, so that the tensors begin on a word


@dataclass(frozen=True)
class PublishedLora:
    """`report` is of the source; `left_out` are the keys of the source that ComfyUI would have ignored."""

    path: Path
    sha256: str
    size_bytes: int
    left_out: tuple[str, ...]
    metadata: dict[str, str]
    report: LoraReport


def published_name(name: str, sha256: str) -> str:
    """`<name>-<sha8>.safetensors`. Give the sha256 of the published file: then the name stands for its bytes."""
    if not NAME.fullmatch(name):
        hint = "Allowed are lower case letters, digits, - and _, 1 to 64 of them."
        refuse("lora_bad_name", f"{name[:80]!r} is no name for a LoRA.", hint, parameter="name", value=name[:80], allowed=NAME.pattern)
    if not re.fullmatch(r"[0-9a-f]{64}", sha256):
        raise ValueError(f"{sha256!r} is no sha256 in hexadecimal")
    return f"{name}-{sha256[:8]}{EXTENSION}"


def publish_lora(
    source: Path, folder: Path, name: str, *, metadata: Mapping[str, str], family: str | None = None, limits: LoraLimits | None = None
) -> PublishedLora:
    """Write `source` into `folder`, under published_name of the new file's own sha256. Raises LoraRefused.

    Keys of `metadata`: base_model, trigger_word, training, settings. A file that is there already is left as it is when it has the
    same bytes, and never replaced when it has others. OSError where the folder cannot be written.
    """
    published_name(name, "0" * 64)  # a bad name is told before the work
    with write_beside(source, folder, metadata, family, limits) as (temporary, published):
        return settle(temporary, published, folder / published_name(name, published.sha256))


@contextmanager
def write_beside(
    source: Path, folder: Path, metadata: Mapping[str, str], family: str | None, limits: LoraLimits | None
) -> Iterator[tuple[Path, PublishedLora]]:
    """A finished file under a temporary name, which ComfyUI does not list, and which is gone afterwards."""
    check_metadata(metadata)
    with open_lora(source, family=family, limits=limits) as judged:
        descriptor, text = tempfile.mkstemp(dir=folder, prefix=".lora-", suffix=".tmp")
        temporary = Path(text)
        try:
            with os.fdopen(descriptor, "wb") as stream:
                os.fchmod(descriptor, 0o644)  # mkstemp's 0600 would hide it from a ComfyUI of another user
                published = write_lora(stream, judged, metadata, temporary)
                stream.flush()
                os.fsync(descriptor)
            yield temporary, published
        finally:
            temporary.unlink(missing_ok=True)


def settle(temporary: Path, published: PublishedLora, target: Path) -> PublishedLora:
    """Give the file its name, durably."""
    if os.path.lexists(target):
        if target.is_symlink() or not target.is_file() or hash_file(target) != published.sha256:
            refuse("lora_exists", f"{target.name} exists with other bytes; a published file is never replaced.", "Choose another name.")
    else:
        os.replace(temporary, target)
        sync_folder(target.parent)
    return PublishedLora(target, published.sha256, published.size_bytes, published.left_out, published.metadata, published.report)


def write_lora(stream: BinaryIO, judged: Judged, metadata: Mapping[str, str], path: Path) -> PublishedLora:
    keys = {tensor.key: change.keys[part] for change in judged.changes for part, tensor in change.parts.items()}
    # Wide items first, as safetensors itself writes: a key left out must not put a float on an odd byte.
    kept = sorted((t for t in judged.file.tensors if t.key in keys), key=lambda t: (-ITEM_BYTES[t.dtype], t.start))
    merged = merge_metadata(judged, metadata)
    header = write_header([(keys[tensor.key], tensor) for tensor in kept], merged)
    whole = hashlib.sha256(header)
    stream.write(header)
    for tensor in kept:
        own = hashlib.sha256()
        for piece in judged.file.read(tensor):
            whole.update(piece)
            own.update(piece)
            stream.write(piece)
        if own.hexdigest() != judged.scan.digests[tensor.key]:
            refuse("lora_changed", f"{tensor.key} changed while the file was read.", "Wait until it is written, then try again.")
    left_out = tuple(tensor.key for tensor in judged.file.tensors if tensor.key not in keys)
    return PublishedLora(path, whole.hexdigest(), stream.tell(), left_out, merged, judged.report)


def check_metadata(metadata: Mapping[str, str]) -> None:
    wrong = [key for key, value in metadata.items() if key not in CALLERS_KEYS or not isinstance(value, str)]
    if wrong:
        raise ValueError(f"metadata {wrong[0]!r}: allowed are texts under {', '.join(sorted(CALLERS_KEYS))}")


def merge_metadata(judged: Judged, metadata: Mapping[str, str]) -> dict[str, str]:
    """The file's own metadata with ours beside it. Nothing under our prefix is believed of a source."""
    report = judged.report
    kept = {key: value for key, value in report.metadata.items() if not key.startswith(PREFIX)}
    alphas = report.alphas or report.ranks  # without alpha tensors ComfyUI scales by 1, as if alpha were the rank
    own = {
        "family": report.family,
        "rank": ",".join(str(rank) for rank in report.ranks),
        "alpha": ",".join(f"{alpha:g}" for alpha in alphas),
        "sha256": report.tensors_sha256,
    }
    return {"format": "pt"} | kept | {PREFIX + key: value for key, value in sorted((own | dict(metadata)).items())}


def write_header(tensors: list[tuple[str, Tensor]], metadata: dict[str, str]) -> bytes:
    """The first bytes of the file. The same tensors and metadata give the same bytes."""
    entries: dict[str, Any] = {"__metadata__": metadata}
    start = 0
    for key, tensor in tensors:
        entries[key] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [start, start + tensor.size_bytes]}
        start += tensor.size_bytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def hash_file(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sync_folder(folder: Path) -> None:
    """Make the new name survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
