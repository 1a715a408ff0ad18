"""Which job goes to which instance next: a pure function over a snapshot. It knows no network, no clock and no Redis.

The rules and the numbers behind them stand in docs/decisions/006-placement.md; `python -m bench.fleet` measures them.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, chain, groupby
from operator import itemgetter

from gateway.dispatch.pace import name_work
from gateway.instances import Catalog
from gateway.jobs.model import Job, Needs

# Candidates that are looked at. When there are as many, more may wait behind them.
LOOK_AHEAD = 32
# A job is passed only by jobs that came into sight at most this long after it. At a third of it twice as many base models are loaded.
OVERTAKE_MS = 180_000
# The first in line waits this long, at most, for an instance with its base model; then the next GPU that falls idle is its own.
FIRST_MS = 60_000
# A job leaves an idle GPU cold this long, while its base model is at work elsewhere: as long as a load from disk takes.
HOLD_MS = 12_000
# A job that needs another LoRA than the one running leaves the slot behind it to better matches for as long as they may pass it.
HOLD_LORA_MS = OVERTAKE_MS
# For each LoRA that is not read again a job goes behind a run that is over this soon, rather than to an idle GPU.
PATIENCE_S = 8.0
# Of two LoRAs asked for alike, the one that a cache lets go of a job later counts for this much of the other.
FADE = 0.8


@dataclass(frozen=True, slots=True)
class Candidate:
    """A waiting job, as far as its place matters. Candidates come in line order, which is fair among callers."""

    job_id: str
    base_model: str
    lora_files: frozenset[str]
    needs: Needs
    created_ms: int = 0
    avoid: frozenset[str] = frozenset()  # instances that ran out of memory with it
    seen_ms: int | None = None  # when it first was among the candidates; None: when it was created
    first_ms: int | None = None  # since when it is the first in line
    priority: str = "normal"
    pinned: str | None = None  # the only instance it may go to
    work: str = ""  # kind of work, for how long it takes; placement does not look at it

    @classmethod
    def of(cls, job: Job) -> Candidate:
        """A job that was not seen in line before."""
        spec = job.spec
        return cls(
            job_id=job.id,
            base_model=spec.base_model,
            lora_files=frozenset(lora.file for lora in spec.loras),
            needs=spec.needs,
            work=name_work(spec),
            created_ms=spec.created_ms,
            avoid=frozenset(job.avoid),
            pinned=spec.pinned,
            priority=spec.priority,
        )

    @property
    def waiting_since_ms(self) -> int:
        return self.created_ms if self.seen_ms is None else self.seen_ms


@dataclass(frozen=True, slots=True)
class InstanceView:
    """An instance as placement sees it. `catalog` None: not known yet, so anything may run there.

    Base model and LoRAs are what the last job placed there will have loaded. `recent` are the LoRAs of the newest jobs, the last among
    them, where its cache holds the results of `keeps` jobs: to use them again takes no load.
    """

    id: str
    free_slots: int
    slots_used: int
    base_model: str | None
    lora_files: frozenset[str]
    catalog: Catalog | None
    takes_more: bool = True  # False: what it holds is its last for now, as when it drains
    recent: tuple[frozenset[str], ...] = ()
    keeps: int = 1
    share: int = 2  # slots it has for jobs of any length; those beyond are for work that is over at once

    rest_s: float = math.inf  # expected until what it holds is done

    @property
    def kept_files(self) -> frozenset[str]:
        return self.lora_files.union(*self.recent)

    def count_loads(self, lora_files: frozenset[str]) -> int:
        """Files of these that it would have to read."""
        return len(lora_files.difference(self.lora_files, *self.recent))


@dataclass(frozen=True, slots=True)
class Placement:
    job_id: str
    instance: str
    warm: bool


def missing(needs: Needs, catalog: Catalog, hidden: frozenset[str] = frozenset()) -> list[str]:
    """What a graph needs and the catalogue lacks, in words; empty when it can run. `hidden` files count as lacking."""
    lacks = [f"node class {name}" for name in needs.classes if name not in catalog]
    for class_type, input_name, value in needs.choices:
        choices = catalog.get(class_type, {}).get(input_name)
        if choices is not None and (value not in choices or value.replace("\\", "/").rpartition("/")[2] in hidden):
            lacks.append(f"{class_type}.{input_name} = {value}")
    return lacks


def date_line(candidates: Sequence[Candidate], now_ms: int) -> list[Candidate]:
    """The same line, every job dated that is seen for the first time, or for the first time as the first. Keep them for the next look."""
    dated = []
    for position, candidate in enumerate(candidates):
        if candidate.seen_ms is None:
            candidate = replace(candidate, seen_ms=now_ms)
        if position == 0 and candidate.first_ms is None:
            candidate = replace(candidate, first_ms=now_ms)
        dated.append(candidate)
    return dated


class _Verdicts:
    """Remembers which catalogue meets which needs: asked for every pair at every look, answered anew only for what is new.

    Catalogues are told apart by identity, so the known ones are held here until the next look brings others.
    """

    MOST_ROWS = 512

    def __init__(self) -> None:
        self._catalogs: dict[int, Catalog] = {}
        self._rows: OrderedDict[object, dict[int, bool]] = OrderedDict()

    def keep_only(self, catalogs: Iterable[Catalog]) -> None:
        current = {id(catalog): catalog for catalog in catalogs}
        if current.keys() != self._catalogs.keys():
            for row in self._rows.values():
                for gone in row.keys() - current.keys():
                    del row[gone]
        self._catalogs = current

    def row_of(self, needs: Needs) -> dict[int, bool]:
        key = needs.classes, needs.choices
        row = self._rows.setdefault(key, {})
        self._rows.move_to_end(key)
        if len(self._rows) > self.MOST_ROWS:
            self._rows.popitem(last=False)
        return row


_verdicts = _Verdicts()


class _Kind:
    """Candidates that are alike for placement, by the first of them in line. `since_ms` is the oldest's."""

    __slots__ = ("_row", "_spared", "base_model", "count", "first", "is_warm", "lora_files", "position", "since_ms")

    def __init__(self, first: Candidate, position: int, fleet: _Fleet) -> None:
        self.first, self.base_model, self.lora_files = first, first.base_model, first.lora_files
        self.position, self.count, self.since_ms = position, 0, first.waiting_since_ms
        self.is_warm: bool | None = None  # not asked yet
        self._row = _verdicts.row_of(first.needs)
        # An instance that ran out of memory is good enough when no other could run it.
        self._spared = frozenset[str]()
        if first.avoid and any(view.id not in first.avoid and self.may_run_on(view) for view in fleet.views):
            self._spared = first.avoid

    def may_run_on(self, view: InstanceView) -> bool:
        if view.id in self._spared or self.first.pinned not in (None, view.id):
            return False
        if view.catalog is None:
            return True
        verdict = self._row.get(id(view.catalog))
        if verdict is None:
            verdict = self._row[id(view.catalog)] = not missing(self.first.needs, view.catalog)
        return verdict


class _Fleet:
    """The instances by what placement asks for: with an idle GPU, or with a free slot behind a running job."""

    def __init__(self, views: Sequence[InstanceView]) -> None:
        self.views = views
        self.copies = Counter(view.base_model for view in views)
        self.sets = Counter((view.base_model, view.lora_files) for view in views)
        self.at_work = Counter(view.base_model for view in views if view.slots_used and view.takes_more)
        self.free = [view for view in views if view.free_slots > 0]
        self.idle = sorted((view for view in self.free if not view.slots_used), key=self.rate_loss)
        self.behind = sorted((view for view in self.free if view.slots_used), key=self.rate_loss)

    def has_warm(self, kind: _Kind) -> bool:
        """Whether all that it wants is loaded somewhere, if only at work."""
        if kind.is_warm is None:
            kind.is_warm = any(view.base_model == kind.base_model and not view.count_loads(kind.lora_files) for view in self.views)
        return kind.is_warm

    @cached_property
    def _asked(self) -> Counter[str]:
        """How often each LoRA was used by the jobs that the caches still hold: what was asked for lately will be asked for again."""
        return Counter(chain.from_iterable(chain.from_iterable(view.recent for view in self.views)))

    @cached_property
    def _holders(self) -> Counter[str]:
        return Counter(chain.from_iterable(view.kept_files for view in self.views))

    def rate_fading(self, kind: _Kind, view: InstanceView) -> float:
        """What the next jobs lose when this one goes there: LoRAs that are asked for often, held by few, and soon let go."""
        later: dict[str, int] = {}
        for age, files in enumerate(reversed(view.recent), 1):
            for file in files - kind.lora_files:
                later.setdefault(file, view.keeps - age)
        return math.fsum(FADE**jobs * self._asked[file] / self._holders[file] for file, jobs in later.items())

    def rate_loss(self, view: InstanceView) -> tuple[bool, int, str]:
        """What the fleet loses when this one loads another base model: nothing, one copy of many, or the last one."""
        return view.base_model is not None, -self.copies[view.base_model], view.id


class _Fence:
    """Who may pass whom. Only a place in line can be passed: what the line itself puts first, for fairness among callers, passes nobody."""

    def __init__(self, line: Sequence[tuple[Candidate, _Kind]], now_ms: int) -> None:
        self._line = line
        self._oldest_until = list(accumulate((candidate.waiting_since_ms for candidate, _ in line), min))
        head = line[0][0]
        self.overdue = line[0][1] if head.first_ms is not None and now_ms - head.first_ms >= FIRST_MS else None

    def lets(self, kind: _Kind, view: InstanceView) -> bool:
        """Whether the first of a kind may go there: it can run, and passes nobody there who came much earlier."""
        if not kind.may_run_on(view):
            return False
        limit_ms = kind.first.waiting_since_ms - OVERTAKE_MS
        if self._oldest_until[kind.position] >= limit_ms:
            return True
        ahead = self._line[: kind.position]
        return not any(candidate.waiting_since_ms < limit_ms and other.may_run_on(view) for candidate, other in ahead)


def choose(candidates: Sequence[Candidate], views: Sequence[InstanceView], now_ms: int) -> Placement | None:
    """The next job to place and where; None when nothing should move now. Ask again after placing, or after a second."""
    fleet = _Fleet(views)
    if not fleet.free:
        return None
    _verdicts.keep_only(view.catalog for view in views if view.catalog is not None)
    group: list[Candidate] = []
    for _, same in groupby(candidates, key=lambda candidate: candidate.priority):
        # The line brings higher priorities first; a lower one never makes a higher one wait, however old it is.
        group += same
        if placement := _choose_within(group, fleet, now_ms):
            return placement
    return None


def _choose_within(candidates: Sequence[Candidate], fleet: _Fleet, now_ms: int) -> Placement | None:
    kinds: dict[object, _Kind] = {}
    line: list[tuple[Candidate, _Kind]] = []
    for position, candidate in enumerate(candidates):
        needs = candidate.needs
        key = candidate.base_model, candidate.lora_files, needs.classes, needs.choices, candidate.avoid, candidate.pinned
        kind = kinds.get(key)
        if kind is None:
            kind = kinds[key] = _Kind(candidate, position, fleet)
        kind.count += 1
        kind.since_ms = min(kind.since_ms, candidate.waiting_since_ms)
        line.append((candidate, kind))
    fence, ordered = _Fence(line, now_ms), list(kinds.values())
    spare = _spare(fleet, fence.overdue)
    return (
        _place_overdue(fleet, fence.overdue)
        or _place_warm(ordered, fleet.idle, spare, fleet, fence, now_ms)
        or _place_cold(ordered, fleet, fence, now_ms)
        or _place_warm(ordered, spare, (), fleet, fence, now_ms)
    )


def _place(candidate: Candidate, view: InstanceView) -> Placement:
    return Placement(candidate.job_id, view.id, warm=view.base_model == candidate.base_model)


def _place_overdue(fleet: _Fleet, kind: _Kind | None) -> Placement | None:
    """First in line for long enough: to the first GPU that falls idle, whatever is loaded there, or behind its own base model."""
    if kind is None:
        return None
    views = [view for view in fleet.free if kind.may_run_on(view) and (not view.slots_used or view.base_model == kind.base_model)]
    if not views:
        return None
    best = min(views, key=lambda view: (view.slots_used, view.base_model != kind.base_model, _rate_waste(kind, view, fleet)))
    return _place(kind.first, best)


def _spare(fleet: _Fleet, overdue: _Kind | None) -> list[InstanceView]:
    """The slots to fill behind running jobs: all but one where the job that was first for long enough shall soon find an idle GPU."""
    spared = next((view for view in fleet.behind if overdue is not None and overdue.may_run_on(view)), None)
    return [view for view in fleet.behind if view is not spared]


def _place_warm(
    kinds: Sequence[_Kind], views: Sequence[InstanceView], soon: Sequence[InstanceView], fleet: _Fleet, fence: _Fence, now_ms: int
) -> Placement | None:
    """Where the base model is loaded: the fewest LoRAs to load; then LoRAs loaded nowhere, of which the most jobs wait; then the line.

    Or on one of those that are done `soon`, if that saves enough.
    """
    shelves: defaultdict[str | None, list[InstanceView]] = defaultdict(list)
    for view in views:
        shelves[view.base_model].append(view)
    ranked: list[tuple[int, bool, int, int]] = []
    for position, kind in enumerate(kinds):
        if shelf := shelves.get(kind.base_model):
            loads = min(view.count_loads(kind.lora_files) for view in shelf)
            ranked.append((loads, loads > 0 and fleet.has_warm(kind), -kind.count, position))
    for *_, position in sorted(ranked):
        kind = kinds[position]
        able = [view for view in shelves[kind.base_model] if _suits(kind, view, fleet, now_ms) and fence.lets(kind, view)]
        if able:
            best = min(able, key=lambda view: _rate_waste(kind, view, fleet))
            return _place(kind.first, _find_sooner(kind, best, soon, fleet, fence) or best)
    return None


def _find_sooner(kind: _Kind, best: InstanceView, soon: Sequence[InstanceView], fleet: _Fleet, fence: _Fence) -> InstanceView | None:
    """Behind a run that ends so soon that the job loses little by waiting, where LoRAs are loaded that `best` would have to read."""
    loads = best.count_loads(kind.lora_files)
    if not loads or kind.first.priority == "high":
        return None
    able = [
        view
        for view in soon
        if view.base_model == kind.base_model
        and view.slots_used < view.share
        and view.rest_s <= PATIENCE_S * (loads - view.count_loads(kind.lora_files))
        and fence.lets(kind, view)
    ]
    return min(able, key=lambda view: (view.rest_s, _rate_waste(kind, view, fleet)), default=None)


def _suits(kind: _Kind, view: InstanceView, fleet: _Fleet, now_ms: int) -> bool:
    """A slot behind a running job is in no hurry: a job that has LoRAs to load leaves it to one that has not, for a while.

    And none is worth more than an idle GPU: nothing holds more than its share while there is one that could run the job.
    """
    if not view.slots_used:
        return True
    if view.slots_used >= view.share and any(kind.may_run_on(idle) for idle in fleet.idle):
        return False
    return not view.count_loads(kind.lora_files) or now_ms - kind.since_ms >= HOLD_LORA_MS


def _rate_waste(kind: _Kind, view: InstanceView, fleet: _Fleet) -> tuple[int, float, int, int, str]:
    """LoRAs to load, what its cache lets go, LoRAs to change, and then rather where the same set is loaded elsewhere too."""
    return (
        view.count_loads(kind.lora_files),
        fleet.rate_fading(kind, view),
        len(view.lora_files ^ kind.lora_files),
        -fleet.sets[(view.base_model, view.lora_files)],
        view.id,
    )


def _place_cold(kinds: Sequence[_Kind], fleet: _Fleet, fence: _Fence, now_ms: int) -> Placement | None:
    """On an idle GPU only: behind a running job it would push out what the next jobs want, and gain nothing, as a load waits its turn."""
    if not fleet.idle:
        return None
    asked: Counter[str] = Counter()
    waiting: defaultdict[tuple[str, str], list[_Kind]] = defaultdict(list)
    for kind in kinds:
        asked[kind.base_model] += kind.count
        waiting[kind.base_model, kind.first.priority].append(kind)
    seen = asked.total()
    for kind in kinds:
        wanted, at_work = asked[kind.base_model], fleet.at_work[kind.base_model]
        # Of a line that is seen in part, its share counts: a large fleet has more at work than the window shows jobs.
        hopeful = wanted <= at_work and (seen < LOOK_AHEAD or wanted * len(fleet.views) <= at_work * seen)
        if hopeful and kind.first.priority != "high" and now_ms - kind.since_ms < HOLD_MS:
            continue
        # Whoever asks for the base model, the job goes first that has its LoRAs there. A full window is cleared in order instead.
        alike = waiting.pop((kind.base_model, kind.first.priority), []) if seen < LOOK_AHEAD else [kind]
        rated = [(_rate_cold(one, view, fleet), one.first, view) for one in alike for view in fleet.idle if fence.lets(one, view)]
        if rated:
            _, candidate, view = min(rated, key=itemgetter(0))
            return _place(candidate, view)
    return None


def _rate_cold(kind: _Kind, view: InstanceView, fleet: _Fleet) -> tuple[bool, int, bool, int, int, int, str]:
    """What is loaded, LoRAs to load, whether those are where their base model is, copies lost, how many wait, the line."""
    loads, (is_used, copies, name) = view.count_loads(kind.lora_files), fleet.rate_loss(view)
    return is_used, loads, loads > 0 and fleet.has_warm(kind), copies, -kind.count, kind.position, name
