"""What placement never does and always does, whatever its taste: rules over any fleet and any line."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.dispatch.fleet import LOOK_AHEAD, PATIENCE_S, Candidate, InstanceView, Placement, choose, missing
from gateway.instances import Catalog, count_kept_jobs
from gateway.jobs.model import Needs

# Long after every candidate came: no patience is left.
LATER_MS = 10**9

DEV: Catalog = {"KSampler": {"sampler_name": ["euler", "dpm"]}, "UNETLoader": {"unet_name": ["dev.safetensors"]}}
SCHNELL: Catalog = {"KSampler": {"sampler_name": ["euler"]}, "UNETLoader": {"unet_name": ["schnell.safetensors"]}}
NEEDS_DEV = Needs(classes=("KSampler", "UNETLoader"), choices=(("UNETLoader", "unet_name", "dev.safetensors"),))


def waiting(job_id: str, base_model: str = "dev", **fields: Any) -> Candidate:
    given: dict[str, Any] = {"job_id": job_id, "base_model": base_model, "lora_files": frozenset(), "needs": NEEDS_DEV}
    return Candidate(**(given | fields))


def instance(name: str, base_model: str | None = None, **fields: Any) -> InstanceView:
    given: dict[str, Any] = {"id": name, "free_slots": 2, "slots_used": 0, "base_model": base_model, "lora_files": frozenset()}
    return InstanceView(**(given | {"catalog": DEV} | fields))


def test_what_is_missing_is_said_in_words() -> None:
    assert missing(NEEDS_DEV, DEV) == []
    assert missing(NEEDS_DEV, SCHNELL) == ["UNETLoader.unet_name = dev.safetensors"]
    assert missing(NEEDS_DEV, {}) == ["node class KSampler", "node class UNETLoader"]


def test_text_that_is_no_choice_is_not_missing() -> None:
    assert missing(Needs(classes=("KSampler",), choices=(("KSampler", "note", "anything"),)), DEV) == []


def test_nothing_to_place_or_nowhere_to_place_it() -> None:
    assert choose([], [instance("a")], LATER_MS) is None
    assert choose([waiting("one")], [], LATER_MS) is None
    assert choose([waiting("one")], [instance("a", free_slots=0, slots_used=2)], LATER_MS) is None
    assert choose([waiting("one")], [instance("a", catalog=SCHNELL)], LATER_MS) is None


def test_a_warm_instance_is_preferred_to_a_cold_one() -> None:
    fleet = [instance("a"), instance("b", "dev"), instance("c", "schnell")]
    assert choose([waiting("one")], fleet, LATER_MS) == Placement("one", "b", warm=True)


def test_nobody_waits_for_an_instance_that_takes_nothing_more() -> None:
    just_came = waiting("one", created_ms=LATER_MS)
    working, draining = (instance("a", "dev", free_slots=0, slots_used=1, takes_more=more) for more in (True, False))
    assert choose([just_came], [working, instance("b")], LATER_MS) is None
    assert choose([just_came], [draining, instance("b")], LATER_MS) == Placement("one", "b", warm=False)


def test_nothing_holds_more_than_its_share_while_another_could_run_it() -> None:
    just_came = waiting("one", created_ms=LATER_MS)
    quick = instance("a", "dev", free_slots=1, slots_used=2)
    assert choose([just_came], [quick], LATER_MS) == Placement("one", "a", warm=True)
    assert choose([just_came], [quick, instance("b", catalog=SCHNELL)], LATER_MS) == Placement("one", "a", warm=True)
    assert choose([just_came], [quick, instance("b")], LATER_MS) is None, "it holds out for one that is warm, and no longer than ever"
    assert choose([waiting("one")], [quick, instance("b")], LATER_MS) == Placement("one", "b", warm=False)
    assert choose([just_came], [quick, instance("b", "dev")], LATER_MS) == Placement("one", "b", warm=True)


def test_the_loras_decide_between_warm_instances() -> None:
    styled = frozenset({"style.safetensors"})
    fleet = [instance("a", "dev"), instance("b", "dev", lora_files=styled)]
    placed = choose([waiting("one", lora_files=styled)], fleet, LATER_MS)
    assert placed is not None
    assert placed.instance == "b"


def test_loras_that_a_cache_holds_take_no_load() -> None:
    styled, other = frozenset({"style.safetensors"}), frozenset({"other.safetensors"})
    forgot, kept = instance("a", "dev", lora_files=other), instance("b", "dev", lora_files=other, recent=(styled, other), keeps=2)
    active = instance("c", "dev", lora_files=styled)
    line = [waiting("one", lora_files=styled)]
    assert choose(line, [forgot, kept], LATER_MS) == Placement("one", "b", warm=True)
    assert choose(line, [forgot, kept, active], LATER_MS) == Placement("one", "c", warm=True), "what is active needs no change either"
    just_came = [waiting("one", lora_files=styled, created_ms=LATER_MS)]
    behind = {"free_slots": 1, "slots_used": 1, "lora_files": other}
    assert choose(just_came, [instance("a", "dev", **behind)], LATER_MS) is None
    assert choose(just_came, [instance("b", "dev", **behind, recent=(styled, other), keeps=2)], LATER_MS) == Placement(
        "one", "b", warm=True
    )


def test_a_short_wait_saves_a_load() -> None:
    styled = frozenset({"style.safetensors"})
    line = [waiting("one", lora_files=styled)]
    idle = instance("a", "dev")

    def running(rest_s: float, **fields: Any) -> InstanceView:
        return instance("b", "dev", free_slots=1, slots_used=1, lora_files=styled, rest_s=rest_s, **fields)

    behind, at_once = Placement("one", "b", warm=True), Placement("one", "a", warm=True)
    assert choose(line, [idle, running(PATIENCE_S)], LATER_MS) == behind
    assert choose(line, [idle, running(PATIENCE_S + 0.1)], LATER_MS) == at_once
    assert choose(line, [idle, running(math.inf)], LATER_MS) == at_once, "how long it takes is not known"
    assert choose(line, [idle, running(0.0, share=1)], LATER_MS) == at_once, "it has its share"
    assert choose(line, [instance("a", "dev", lora_files=styled), running(0.0)], LATER_MS) == at_once, "there is nothing to save"
    assert choose([waiting("one", lora_files=styled, priority="high")], [idle, running(0.0)], LATER_MS) == at_once
    assert choose([waiting("one", lora_files=styled, avoid=frozenset("b"))], [idle, running(0.0)], LATER_MS) == at_once


def test_two_loads_are_worth_twice_the_wait() -> None:
    pair = frozenset({"style.safetensors", "light.safetensors"})
    fleet = [instance("a", "dev"), instance("b", "dev", free_slots=1, slots_used=1, lora_files=pair, rest_s=2 * PATIENCE_S)]
    assert choose([waiting("one", lora_files=pair)], fleet, LATER_MS) == Placement("one", "b", warm=True)
    assert choose([waiting("one", lora_files=frozenset({"style.safetensors"}))], fleet, LATER_MS) == Placement("one", "a", warm=True)


def test_what_is_asked_for_often_is_not_what_a_cache_lets_go_of() -> None:
    new, often, rare = (frozenset({f"{name}.safetensors"}) for name in ("new", "often", "rare"))
    fleet = [
        instance("a", "dev", recent=(often, rare), keeps=2, lora_files=rare),
        instance("b", "dev", recent=(rare, often), keeps=2, lora_files=often),
        instance("c", "dev", free_slots=0, slots_used=2, recent=(often, often), keeps=2, lora_files=often),
    ]
    line = [waiting("one", lora_files=new)]
    assert choose(line, fleet, LATER_MS) == Placement("one", "b", warm=True), (
        "two jobs of two wanted what it lets go, four of three the other"
    )
    room = instance("d", "dev", recent=(rare,), keeps=2, lora_files=rare)
    assert choose(line, [*fleet, room], LATER_MS) == Placement("one", "d", warm=True), "a cache with room lets go of nothing"


def test_what_falls_out_later_is_missed_less() -> None:
    none, new, often, rare = (frozenset({f"{name}.safetensors"} if name else ()) for name in ("", "new", "often", "rare"))
    fleet = [
        instance("a", "dev", recent=(none, often, rare), keeps=3, lora_files=rare),
        instance("b", "dev", recent=(none, rare, often), keeps=3, lora_files=often),
        instance("c", "dev", free_slots=0, slots_used=2, recent=(often, often, often), keeps=3, lora_files=often),
    ]
    assert choose([waiting("one", lora_files=new)], fleet, LATER_MS) == Placement("one", "b", warm=True)


def test_who_has_its_loras_there_goes_first_where_a_base_model_is_loaded() -> None:
    styled, other = frozenset({"style.safetensors"}), frozenset({"other.safetensors"})
    bare, used = instance("a", "schnell"), instance("b", "schnell", recent=(styled, frozenset()), keeps=2)
    line = [waiting("first", lora_files=other), waiting("second", lora_files=styled)]
    assert choose(line, [bare, used], LATER_MS) == Placement("second", "b", warm=False)
    assert choose(line, [bare], LATER_MS) == Placement("first", "a", warm=False)
    assert choose(line, [instance("c"), used], LATER_MS) == Placement("first", "c", warm=False), "what is empty costs nobody anything"
    high = [waiting("first", lora_files=other, priority="high"), *line[1:]]
    assert choose(high, [bare, used], LATER_MS) == Placement("first", "a", warm=False)
    late = waiting("second", lora_files=styled, created_ms=LATER_MS)
    assert choose([line[0], late], [used], LATER_MS) == Placement("first", "b", warm=False), "it passes nobody who came much earlier"
    low = [waiting("first", lora_files=other, created_ms=LATER_MS), waiting("second", lora_files=styled, priority="low")]
    busy = instance("c", "dev", free_slots=0, slots_used=2)
    assert choose(low, [used, busy], LATER_MS) == Placement("first", "b", warm=False)
    full = [*line, *(waiting(f"more{n}", lora_files=other) for n in range(LOOK_AHEAD - len(line)))]
    assert choose(full, [bare, used], LATER_MS) == Placement("first", "a", warm=False), "a full window is cleared in order"


@pytest.mark.parametrize(
    ("argv", "jobs"),
    [
        (["main.py"], 1),
        (["main.py", "--cache-lru", "20", "--cpu"], 2),
        (["main.py", "--cache-lru=100"], 10),
        (["main.py", "--cache-lru", "5"], 1),
        (["main.py", "--cache-lru", "999999"], 32),
        (["main.py", "--cache-lru"], 1),
        (["main.py", "--cache-lru", "many"], 1),
        (["main.py", "--cache-lru", "9" * 5000], 1),
        (["main.py", "--cache-none"], 1),
        ([None, 7], 1),
        ("--cache-lru 20", 1),
        (None, 1),
    ],
)
def test_a_cache_holds_what_its_flags_say(argv: object, jobs: int) -> None:
    assert count_kept_jobs(argv) == jobs


def test_a_cold_start_is_said() -> None:
    assert choose([waiting("one")], [instance("a", "schnell")], LATER_MS) == Placement("one", "a", warm=False)


def test_an_unknown_catalogue_may_hold_anything() -> None:
    assert choose([waiting("one")], [instance("a", catalog=None)], LATER_MS) == Placement("one", "a", warm=False)


def test_a_pinned_job_goes_there_and_nowhere_else() -> None:
    fleet = [instance("a"), instance("b", "dev")]
    pinned = waiting("one", pinned="a", priority="high")
    assert choose([pinned], fleet, LATER_MS) == Placement("one", "a", warm=False)
    assert choose([pinned], fleet[1:], LATER_MS) is None
    assert choose([pinned, waiting("two", priority="high")], fleet[1:], LATER_MS) == Placement("two", "b", warm=True)


def test_a_job_nobody_can_run_does_not_block_the_line() -> None:
    line = [waiting("stuck", needs=Needs(classes=("Missing",))), waiting("next")]
    placed = choose(line, [instance("a", "dev")], LATER_MS)
    assert placed is not None
    assert placed.job_id == "next"


def test_where_memory_ran_out_is_avoided_unless_there_is_no_other() -> None:
    burnt = waiting("one", avoid=frozenset({"a"}))
    placed = choose([burnt], [instance("a", "dev"), instance("b")], LATER_MS)
    assert placed is not None
    assert placed.instance == "b"
    assert choose([burnt], [instance("a", "dev")], LATER_MS) == Placement("one", "a", warm=True)


_catalogs = st.sampled_from([DEV, SCHNELL, None])
_views = st.builds(
    lambda used, slots, base_model, catalog: (max(0, slots - used), used, base_model, catalog),
    st.integers(0, 2),
    st.integers(1, 2),
    st.sampled_from([None, "dev", "schnell"]),
    _catalogs,
)
_needs = st.sampled_from([NEEDS_DEV, Needs(), Needs(classes=("Missing",))])


@given(st.lists(_views, max_size=5), st.lists(st.tuples(st.sampled_from(["dev", "schnell"]), _needs), max_size=8), st.integers(0, LATER_MS))
def test_a_job_goes_only_where_there_is_room_and_all_it_needs(
    views: list[tuple[int, int, str | None, Catalog | None]], jobs: list[tuple[str, Needs]], now_ms: int
) -> None:
    fleet = {
        f"i{n}": instance(f"i{n}", base_model, free_slots=free, slots_used=used, catalog=catalog)
        for n, (free, used, base_model, catalog) in enumerate(views)
    }
    line = {f"j{n}": waiting(f"j{n}", base_model, needs=needs) for n, (base_model, needs) in enumerate(jobs)}
    placed = choose(list(line.values()), list(fleet.values()), now_ms)
    fits = {
        (job.job_id, view.id)
        for job in line.values()
        for view in fleet.values()
        if view.free_slots > 0 and (view.catalog is None or not missing(job.needs, view.catalog))
    }
    if placed is not None:
        assert (placed.job_id, placed.instance) in fits
        assert placed.warm == (fleet[placed.instance].base_model == line[placed.job_id].base_model)
    elif now_ms == LATER_MS:
        # Behind a running job goes only what is loaded there.
        due = [(job, view) for job, view in fits if not fleet[view].slots_used or fleet[view].base_model == line[job].base_model]
        assert not due, "no patience is left, and still something was not placed"
    assert placed == choose(list(line.values()), list(fleet.values()), now_ms), "the same question has the same answer"


def test_an_instance_that_ran_out_of_memory_is_used_when_no_other_could_run_it() -> None:
    bare: Catalog = {"Other": {}}
    views = [
        InstanceView("a", 2, 0, None, frozenset(), None),
        InstanceView("b", 2, 0, None, frozenset(), bare),
    ]
    job = Candidate("one", "dev", frozenset(), Needs(classes=("UNETLoader",)), avoid=frozenset({"a"}))
    placement = choose([job], views, 0)
    assert placement is not None
    assert placement.instance == "a"
