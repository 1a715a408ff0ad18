"""A fleet in simulated time: the waiting line, instances of two slots, what loading costs. It knows no clock but its own.

Placement is the caller's: anything that maps (candidates, views, now) to a placement, the real `choose` among them. The costs below
are assumptions for a 12 GB model in fp8 and LoRAs of 150 MB; the ratios move with them, their order does not.
"""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from bench.fleet_load import Work
from gateway.dispatch.fleet import LOOK_AHEAD, Candidate, InstanceView, Placement, date_line
from gateway.jobs.model import Needs

SLOTS = 2
IDLE_S = 1.0  # the dispatcher looks again after this long without news
PLACE_S = 0.003  # one placement: a look, a claim, a submit; one dispatcher makes them one after the other
MODEL_FROM_DISK_S, MODEL_FROM_RAM_S = 12.0, 4.0
MODELS_IN_RAM = 2  # base models that fit the page cache of an instance's machine
LORA_S = 0.8  # per file

Policy = Callable[[Sequence[Candidate], Sequence[InstanceView], int], Placement | None]


@dataclass(slots=True)
class Record:
    """What became of one job. `wait_s`: accepted until its own steps begin, loading included."""

    work: Work
    wait_s: float = 0.0
    base_loads: int = 0
    lora_loads: int = 0
    begin_s: float = 0.0
    end_s: float = 0.0


class Line:
    """The queue as `peek.lua` shows it: callers take turns, ordered by the turn they were last served in."""

    def __init__(self) -> None:
        self._queues: dict[str, deque[Candidate]] = {}
        self._turns: dict[str, int] = {}
        self._turn = 0

    def add(self, caller: str, candidate: Candidate) -> None:
        if caller not in self._queues:
            self._queues[caller], self._turns[caller] = deque(), self._turn
        self._queues[caller].append(candidate)

    def look(self, limit: int) -> list[str]:
        order = sorted(self._queues, key=lambda caller: (self._turns[caller], caller))
        found: list[str] = []
        for depth in range(limit):
            row = [self._queues[caller][depth].job_id for caller in order if depth < len(self._queues[caller])]
            found += row[: limit - len(found)]
            if not row or len(found) >= limit:
                break
        return found

    def take(self, caller: str, job_id: str) -> None:
        queue = self._queues[caller]
        queue.remove(next(candidate for candidate in queue if candidate.job_id == job_id))
        self._turn += 1
        self._turns[caller] = self._turn
        if not queue:
            del self._queues[caller], self._turns[caller]


@dataclass(slots=True)
class SimInstance:
    """One ComfyUI: VRAM for one base model, and a cache that keeps what the last `keeps` prompts used; by default only the last one's."""

    id: str
    held: deque[Record] = field(default_factory=deque)
    base_model: str | None = None  # of the last job placed
    lora_files: frozenset[str] = frozenset()
    keeps: int = 1
    placed: tuple[frozenset[str], ...] = ()
    ran: int = 0
    ran_s: float = 0.0
    _base_model: str | None = None
    _last: tuple[frozenset[str], ...] = ()  # LoRAs of the prompts whose results it keeps, the newest last
    _in_ram: OrderedDict[str, None] = field(default_factory=OrderedDict)

    def view(self, now_s: float) -> InstanceView:
        return InstanceView(
            self.id,
            SLOTS - len(self.held),
            len(self.held),
            self.base_model,
            self.lora_files,
            None,
            recent=self.placed if self.keeps > 1 else (),
            keeps=self.keeps,
            rest_s=self._expect_rest_s(now_s),
        )

    def _expect_rest_s(self, now_s: float) -> float:
        """From the mean of what ran there, loads included: how long this very job takes nobody knows."""
        if not self.ran or not self.held:
            return math.inf
        begun_s = self.held[0].begin_s if self.held[0].end_s else now_s
        rest_s = self.ran_s / self.ran * len(self.held) - (now_s - begun_s)
        return rest_s if rest_s >= 0 else math.inf

    def begin(self, record: Record, now_s: float) -> None:
        """Load what the last prompt did not leave, then run."""
        work, load_s = record.work, 0.0
        if self._base_model != work.base_model:
            load_s += MODEL_FROM_RAM_S if work.base_model in self._in_ram else MODEL_FROM_DISK_S
            record.base_loads, self._base_model = 1, work.base_model
        record.lora_loads = len(work.lora_files.difference(*self._last))
        load_s += LORA_S * record.lora_loads
        self._last = (*self._last, work.lora_files)[-self.keeps :]
        self._in_ram[work.base_model] = None
        self._in_ram.move_to_end(work.base_model)
        while len(self._in_ram) > MODELS_IN_RAM:
            self._in_ram.popitem(last=False)
        record.wait_s = now_s + load_s - work.arrival_s
        record.begin_s, record.end_s = now_s, now_s + load_s + work.run_s


class Simulation:
    """Runs a load to its end. Deterministic: the same load and policy give the same records."""

    def __init__(self, works: Sequence[Work], instances: int, policy: Policy, keeps: int = 1) -> None:
        self._policy = policy
        self._instances = {f"i{n:02}": SimInstance(f"i{n:02}", keeps=keeps) for n in range(instances)}
        self._works = {work.id: work for work in works}
        self._line = Line()
        self._candidates: dict[str, Candidate] = {}
        self._ticks: set[float] = set()
        self._events: list[tuple[float, int, str, str]] = []
        self._numbered = 0
        self._placing_until_s = 0.0
        self.records: list[Record] = []
        for work in works:
            self._push(work.arrival_s, "arrival", work.id)

    def _push(self, at_s: float, kind: str, name: str = "") -> None:
        self._numbered += 1
        heapq.heappush(self._events, (at_s, self._numbered, kind, name))

    def run(self) -> list[Record]:
        while self._events:
            now_s, _, kind, name = heapq.heappop(self._events)
            if kind == "arrival":
                work = self._works[name]
                candidate = Candidate(name, work.base_model, work.lora_files, Needs(), created_ms=int(now_s * 1000))
                self._candidates[name] = candidate
                self._line.add(work.caller, candidate)
            elif kind == "end":
                self._end(self._instances[name], now_s)
            elif kind == "begin":
                self._begin(self._instances[name], now_s)
            else:
                self._ticks.discard(now_s)
            # Events of one moment are seen together.
            if not self._events or self._events[0][0] > now_s:
                self._place(now_s)
        return self.records

    def _end(self, instance: SimInstance, now_s: float) -> None:
        record = instance.held.popleft()
        instance.ran, instance.ran_s = instance.ran + 1, instance.ran_s + record.end_s - record.begin_s
        if instance.held:
            self._begin(instance, now_s)

    def _begin(self, instance: SimInstance, now_s: float) -> None:
        record = instance.held[0]
        if record.end_s == 0:
            instance.begin(record, now_s)
            self._push(record.end_s, "end", instance.id)

    def _look(self, now_s: float) -> list[Candidate]:
        line = date_line([self._candidates[job_id] for job_id in self._line.look(LOOK_AHEAD)], int(now_s * 1000))
        self._candidates |= {candidate.job_id: candidate for candidate in line}
        return line

    def _place(self, now_s: float) -> None:
        while any(len(instance.held) < SLOTS for instance in self._instances.values()) and (waiting := self._look(now_s)):
            placement = self._policy(waiting, [instance.view(now_s) for instance in self._instances.values()], int(now_s * 1000))
            if placement is None:
                at_s = now_s + IDLE_S
                if not self._ticks:
                    self._ticks.add(at_s)
                    self._push(at_s, "tick")
                return
            self._claim(placement, now_s)

    def _claim(self, placement: Placement, now_s: float) -> None:
        work, instance = self._works[placement.job_id], self._instances[placement.instance]
        self._line.take(work.caller, work.id)
        del self._candidates[work.id]
        record = Record(work)
        self.records.append(record)
        instance.held.append(record)
        instance.placed = (*instance.placed, work.lora_files)[-instance.keeps :]
        instance.base_model, instance.lora_files = work.base_model, work.lora_files
        self._placing_until_s = max(now_s, self._placing_until_s) + PLACE_S
        if len(instance.held) == 1:
            self._push(self._placing_until_s, "begin", instance.id)
