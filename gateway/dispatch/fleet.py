"""Which job goes to which instance next: a pure function over a snapshot. It knows no network, no clock and no Redis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gateway.instances import Catalog
from gateway.jobs.model import Needs


@dataclass(frozen=True, slots=True)
class Candidate:
    """A waiting job, as far as its place matters. Candidates come in line order."""

    job_id: str
    base_model: str
    lora_files: frozenset[str]
    needs: Needs
    created_ms: int = 0
    avoid: frozenset[str] = frozenset()  # instances that ran out of memory with it


@dataclass(frozen=True, slots=True)
class InstanceView:
    """An instance as placement sees it. `catalog` None: not known yet, so anything may run there."""

    id: str
    free_slots: int
    slots_used: int
    base_model: str | None
    lora_files: frozenset[str]
    catalog: Catalog | None


@dataclass(frozen=True, slots=True)
class Placement:
    job_id: str
    instance: str
    warm: bool


def missing(needs: Needs, catalog: Catalog) -> list[str]:
    """What a graph needs and the catalogue lacks, in words; empty when it can run."""
    lacks = [f"node class {name}" for name in needs.classes if name not in catalog]
    for class_type, input_name, value in needs.choices:
        choices = catalog.get(class_type, {}).get(input_name)
        if choices is not None and value not in choices:
            lacks.append(f"{class_type}.{input_name} = {value}")
    return lacks


def _rank(candidate: Candidate, view: InstanceView) -> tuple[bool, bool, int, str]:
    """Lower is better: base model loaded there, LoRAs loaded there, emptier."""
    cold_model = view.base_model != candidate.base_model
    return cold_model, cold_model or view.lora_files != candidate.lora_files, view.slots_used, view.id


def choose(candidates: Sequence[Candidate], views: Sequence[InstanceView], now_ms: int) -> Placement | None:
    """The first job in line that some free instance can run, on the instance that has most of it loaded."""
    free = [view for view in views if view.free_slots > 0]
    for candidate in candidates:
        able = [view for view in free if view.catalog is None or not missing(candidate.needs, view.catalog)]
        # An instance that ran out of memory is good enough when there is no other.
        able = [view for view in able if view.id not in candidate.avoid] or (able if candidate.avoid >= {v.id for v in views} else [])
        if able:
            best = min(able, key=lambda view: _rank(candidate, view))
            return Placement(candidate.job_id, best.id, warm=best.base_model == candidate.base_model)
    return None
