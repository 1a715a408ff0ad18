"""A LoRA file, judged: whether it is safe to open, what it was made for, and how much of it ComfyUI's Flux loader will apply.

It reads one file and writes none; lora_publish writes the file that people use. It knows no Redis, no S3 and no torch.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from trainer_worker.lora_change import Change, check_change, collect_changes
from trainer_worker.lora_file import EXTENSION, LoraLimits, Tensor, TensorFile, open_tensor_file, refuse
from trainer_worker.lora_flux import FAMILIES, Family
from trainer_worker.lora_keys import TEXT_ENCODER, UNSUPPORTED, name_other_family, split_key
from trainer_worker.lora_refused import LoraRefused
from trainer_worker.lora_tensors import Scan, read_scalar, scan_tensors

__all__ = ["Coverage", "LoraLimits", "LoraRefused", "LoraReport", "inspect_lora"]

MOST_LISTED = 10


@dataclass(frozen=True)
class Coverage:
    """`layers` of the file's change a layer of the model, `patched` of them ComfyUI will patch; `idle` of those add only zeros.

    Layers of a text encoder are not counted: the Flux graph loads LoRAs onto the model alone.
    """

    layers: int
    patched: int
    idle: int

    @property
    def share(self) -> float:
        return self.patched / self.layers


@dataclass(frozen=True)
class LoraReport:
    """What an accepted file is. Alpha is None where ComfyUI will scale by 1; with several ranks or alphas, the commonest is named."""

    naming: str
    converts: bool  # whether keys must be renamed for ComfyUI to apply them
    family: str
    rank: int | None
    ranks: tuple[int, ...]
    alpha: float | None
    alphas: tuple[float, ...]
    dtypes: tuple[str, ...]  # the commonest first
    tensors: int
    size_bytes: int
    sha256: str  # of the file
    tensors_sha256: str  # of what will be applied: the same for one LoRA under two namings
    coverage: Coverage
    unknown_keys: tuple[str, ...]  # the first ten that no layer of the model has
    unknown_count: int
    text_encoder_count: int  # keys that belong to a text encoder
    metadata: dict[str, str]


@dataclass(frozen=True)
class Judged:
    """An accepted file, still open: what is needed to write the published one."""

    file: TensorFile
    scan: Scan
    changes: tuple[Change, ...]
    report: LoraReport


def inspect_lora(path: Path, *, family: str | None = None, name: str | None = None, limits: LoraLimits | None = None) -> LoraReport:
    """Judge the file at `path`. `name` is what its sender calls it, `family` what it must be for. Raises LoraRefused."""
    with open_lora(path, family=family, name=name, limits=limits) as judged:
        return judged.report


@contextmanager
def open_lora(path: Path, *, family: str | None = None, name: str | None = None, limits: LoraLimits | None = None) -> Iterator[Judged]:
    """The same, with the file left open."""
    check_file_name(path.name if name is None else name)
    if ".." in path.parts:
        refuse("lora_bad_name", f"The path {str(path)!r} leads upwards.", value=str(path))
    with open_tensor_file(path, limits or LoraLimits()) as file:
        made_for = recognise_family(file.tensors, family)
        changes, strangers = collect_changes(file.tensors, made_for)
        check_strangers(strangers, made_for)
        for change in changes.values():
            check_change(change, made_for)
        scan = scan_tensors(file)
        yield Judged(file, scan, tuple(changes.values()), write_report(file, scan, made_for, list(changes.values()), strangers))


def check_file_name(name: str) -> None:
    """A bare file name of the right extension; anything that could lead elsewhere is refused."""
    if not name.isprintable() or name.startswith(".") or any(mark in name for mark in "/\\:") or not 0 < len(name) <= 255:
        hint = f"Give a bare name such as my-style{EXTENSION}, without folders and not hidden."
        refuse("lora_bad_name", f"{name[:80]!r} is no file name.", hint, value=name[:255])
    if not name.lower().endswith(EXTENSION):
        hint = "Other formats can run code when they are opened; save the LoRA with safetensors."
        refuse("lora_extension", f"{name!r} does not end in {EXTENSION}.", hint, value=name, allowed=[EXTENSION])


def recognise_family(tensors: Iterable[Tensor], wanted: str | None) -> Family:
    """The family most of whose layers the file fits. Raises LoraRefused when it is none, or not the wanted one."""
    tensors = tuple(tensors)
    layers = {key.layer if (key := split_key(tensor.key)) else tensor.key for tensor in tensors}
    fitting, named = {}, 0
    for family in FAMILIES.values():
        changes = collect_changes(tensors, family)[0].values()
        fitting[family] = sum(change.is_complete() and change.fits() for change in changes)
        named = max(named, len(changes))
    best = max(fitting, key=lambda family: fitting[family])
    if not fitting[best]:
        refuse_stranger(layers, named, wanted)
    other = name_other_family(layers, best) or best.name
    if other != best.name or wanted not in (None, best.name):
        refuse_base(other, wanted or best.name)
    return best


def refuse_stranger(layers: set[str], named: int, wanted: str | None) -> None:
    allowed = sorted(FAMILIES)
    if other := name_other_family(layers, None):
        refuse_base(other, wanted or " or ".join(allowed))
    if named:
        message = f"{named} layers have the names of Flux, but none is complete and of the shape of {' or '.join(allowed)}."
        refuse("lora_shape_mismatch", message, "It was made for another size of the model, or a part of it is missing.", allowed=allowed)
    hint = "ComfyUI would load this file without an error and without any effect."
    refuse("lora_no_coverage", "No key of the file names a layer of Flux.", hint, examples=sorted(layers)[:MOST_LISTED], allowed=allowed)


def refuse_base(found: str, wanted: str) -> None:
    hint = f"Train it again on {wanted}, or use it with the model it was made for."
    refuse("lora_wrong_base", f"The LoRA was made for {found}, not for {wanted}.", hint, family=found, wanted=wanted)


def check_strangers(strangers: list[Tensor], family: Family) -> None:
    """Keys without a layer may be left out, unless they change what the others mean."""
    for tensor in strangers:
        if UNSUPPORTED.search(tensor.key) and not TEXT_ENCODER.match(tensor.key):
            hint = "Plain LoRA is taken everywhere; of LyCORIS, LoHa and LoKr without Tucker parts are. DoRA needs dora_scale tensors."
            refuse(
                "lora_unsupported", f"{tensor.key} is a kind of change that is not applied here.", hint, key=tensor.key, family=family.name
            )


def write_report(file: TensorFile, scan: Scan, family: Family, changes: list[Change], strangers: list[Tensor]) -> LoraReport:
    alphas = read_alphas(file, changes)
    ranks = Counter(change.rank for change in changes if change.rank)
    text = [tensor.key for tensor in strangers if TEXT_ENCODER.match(tensor.key)]
    unknown = [tensor.key for tensor in strangers if not TEXT_ENCODER.match(tensor.key)]
    unknown_layers = {key.layer if (key := split_key(name)) else name for name in unknown}
    namings = Counter(change.naming for change in changes)
    return LoraReport(
        naming=namings.most_common(1)[0][0],
        converts=any(tensor.key != change.keys[part] for change in changes for part, tensor in change.parts.items()),
        family=family.name,
        rank=ranks.most_common(1)[0][0] if ranks else None,
        ranks=tuple(sorted(ranks)),
        alpha=alphas.most_common(1)[0][0] if alphas else None,
        alphas=tuple(sorted(alphas)),
        dtypes=tuple(dtype for dtype, _ in Counter(tensor.dtype for tensor in file.tensors).most_common()),
        tensors=len(file.tensors),
        size_bytes=file.size_bytes,
        sha256=scan.sha256,
        tensors_sha256=hash_changes(scan, changes),
        coverage=Coverage(len(changes) + len(unknown_layers), len(changes), count_idle(scan, alphas, changes)),
        unknown_keys=tuple(unknown[:MOST_LISTED]),
        unknown_count=len(unknown),
        text_encoder_count=len(text),
        metadata=file.metadata,
    )


def read_alphas(file: TensorFile, changes: list[Change]) -> Counter[float]:
    alphas = Counter(read_scalar(file, change.parts["alpha"]) for change in changes if "alpha" in change.parts)
    if not all(math.isfinite(alpha) for alpha in alphas):
        refuse("lora_not_finite", "An alpha of the file is not finite.")
    return alphas


def count_idle(scan: Scan, alphas: Counter[float], changes: list[Change]) -> int:
    """Changes that add nothing. Raises LoraRefused when all are so: a training that never took a step leaves such a file."""
    idle = sum(any(tensor.key in scan.zeros for tensor in change.weights()) and "dora_scale" not in change.parts for change in changes)
    if idle == len(changes) or set(alphas) == {0.0}:
        hint = "Did the training take any step? lora_B starts as zeros."
        refuse("lora_trains_nothing", f"All {len(changes)} changes multiply to zero: the LoRA has no effect.", hint, layers=len(changes))
    return idle


def hash_changes(scan: Scan, changes: list[Change]) -> str:
    """Over layer, part, dtype, shape and bytes of all that is applied, in the order of the names."""
    lines = sorted(
        f"{change.name.layer} {part} {tensor.dtype} {list(tensor.shape)} {scan.digests[tensor.key]}\n"
        for change in changes
        for part, tensor in change.parts.items()
    )
    return hashlib.sha256("".join(lines).encode()).hexdigest()
