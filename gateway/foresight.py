"""What would happen if a wish were admitted now, and when a job will have ended. It looks and estimates; it stores and runs nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gateway.admission import Admission, Wish
from gateway.auth import Caller
from gateway.dispatch.fleet import Candidate, InstanceView, choose, missing
from gateway.instances import InstanceFacts, InstanceRegistry
from gateway.jobs.model import Job, JobSpec, JobStatus, now_ms
from gateway.jobs.records import Item, Load
from gateway.jobs.store import JobStore
from gateway.presentation import present_request
from gateway.pricing import ENOUGH, Estimate, compute_cost, estimate, estimate_rest_s, estimate_wait_s, measure_work


class Foresight:
    """Raises what an admission raises."""

    def __init__(self, admission: Admission, store: JobStore, registry: InstanceRegistry) -> None:
        self._admission, self._store, self._registry = admission, store, registry

    async def preview(self, wish: Wish, caller: Caller) -> dict[str, Any]:
        """The job that would be made, and what would become of it."""
        rendered = await self._admission.prepare(wish, caller)
        needs = self._admission.beside_published(rendered)
        await self._admission.check_fleet(needs)
        item = self._admission.seal(rendered, wish)
        cache, twin = await self._look_into_cache(item)
        up = await self._up()
        facts, warm = await self._find_instance(item.spec, up)
        expected = await self._estimate(item.spec, facts)
        position = await self._store.position_of_next(caller.id, item.spec.priority)
        return {
            "object": "generation.preview",
            **present_request(item.spec),
            "graph": rendered.graph,
            "cache": cache,
            "cache_job": twin,
            "instance": facts.id if facts else None,
            "warm": warm,
            "queue_position": position,
            "estimate": _present(expected, warm, position, len(up), answered=cache == "hit"),
            "cost": compute_cost(_gpu_seconds(expected, warm, answered=cache == "hit"), item.spec.price_per_gpu_hour),
        }

    async def eta_s(self, job: Job, position: int | None) -> float | None:
        """Seconds until it has ended, from what jobs like it took lately; None when that is not known."""
        facts = next((one for one in await self._registry.recent() if one.id == job.instance), None)
        run_s = (await self._estimate(job.spec, facts)).run_s
        if job.started_ms is not None:
            return estimate_rest_s(run_s, (now_ms() - job.started_ms) / 1000)
        return estimate_wait_s(run_s, position or 0, len(await self._up()))

    async def _look_into_cache(self, item: Item) -> tuple[str, str | None]:
        """(off, miss, hit or in_flight, the job that answers)"""
        if item.spec.cache_key is None:
            return "off", None
        source_id, leader_id = await self._store.twins(item.spec.cache_key) if item.reuse else (None, None)
        source, leader = [await self._store.load(job_id) if job_id else None for job_id in (source_id, leader_id)]
        if source is not None and source.status is JobStatus.SUCCEEDED and source.outputs:
            return "hit", source.id
        if leader is not None and not leader.is_terminal:
            return "in_flight", leader.id
        return "miss", None

    async def _up(self) -> list[InstanceFacts]:
        """As the admission saw them; what they hold is read by `_find_instance`."""
        return [facts for facts in await self._registry.recent() if facts.state == "up"]

    async def _find_instance(self, spec: JobSpec, up: Sequence[InstanceFacts]) -> tuple[InstanceFacts | None, bool | None]:
        """Where it would go, and whether its base model is loaded there. None: no instance is up, so nobody knows."""
        able = dict[str, tuple[InstanceFacts, InstanceView]]()
        _, loads = await self._store.peek(1, [facts.id for facts in up])
        for facts in up:
            catalog = await self._registry.catalog(facts)
            if catalog is None or not missing(spec.needs, catalog):
                able[facts.id] = facts, _view(facts, loads[facts.id], catalog)
        files = frozenset(lora.file for lora in spec.loras)
        candidate = Candidate(spec.id, spec.base_model, files, spec.needs, spec.created_ms, priority=spec.priority)
        placement = choose([candidate], [view for _, view in able.values()], now_ms())
        if placement is not None:
            return able[placement.instance][0], placement.warm
        # It would wait for one: rather for one where its base model is loaded.
        ranked = sorted(able.values(), key=lambda pair: (pair[1].base_model != spec.base_model, pair[1].slots_used, pair[1].id))
        return (ranked[0][0], ranked[0][1].base_model == spec.base_model) if ranked else (None, None)

    async def _estimate(self, spec: JobSpec, facts: InstanceFacts | None) -> Estimate:
        measured = await self._store.measurements(spec.workflow, spec.base_model)
        return estimate(measured, measure_work(spec.parameters), facts.device if facts else None)


def _present(expected: Estimate, warm: bool | None, position: int, instances: int, *, answered: bool) -> dict[str, Any]:
    if answered:
        return {"seconds": 0.0, "run_s": None, "load_s": None, "basis": "answered from the cache", "measured": 0}
    load_s = None if warm else expected.load_s
    wait_s = estimate_wait_s(expected.run_s, position, instances)
    seconds = None if wait_s is None else round(wait_s + (load_s or 0.0), 1)
    # Jobs of all callers: that there were enough is told, and not how many somebody else ran meanwhile.
    measured = 0 if expected.run_s is None else min(expected.measured, ENOUGH)
    return {"seconds": seconds, "run_s": expected.run_s, "load_s": load_s, "basis": expected.basis, "measured": measured}


def _gpu_seconds(expected: Estimate, warm: bool | None, *, answered: bool) -> float | None:
    if answered:
        return 0.0
    return None if expected.run_s is None else round(expected.run_s + (0.0 if warm else expected.load_s or 0.0), 3)


def _view(facts: InstanceFacts, load: Load, catalog: Any) -> InstanceView:
    """As the dispatchers see it; how long what runs there will take only they know."""
    return InstanceView(
        id=facts.id,
        free_slots=max(0, facts.slots - load.slots_used),
        slots_used=load.slots_used,
        base_model=load.base_model,
        lora_files=load.lora_files,
        recent=load.recent,
        catalog=catalog,
        share=facts.slots,
    )
