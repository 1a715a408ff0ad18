"""The load that the placement simulator replays: who asks for what and when, and how long it runs. Seeded; it knows no instance."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

BASE_MODELS = 3
LORAS = 40
CALLERS = 8
SHORTEST_RUN_S, LONGEST_RUN_S = 3.0, 20.0
MEAN_BURST = 8
WITH_LORA_SHARE = 0.85

Arrivals = Literal["poisson", "bursty", "backlog"]


@dataclass(frozen=True, slots=True)
class Work:
    """A job before it is placed. `run_s` is what it takes with everything loaded."""

    id: str
    caller: str
    base_model: str
    lora_files: frozenset[str]
    run_s: float
    arrival_s: float


def _zipf(count: int) -> list[float]:
    return list(accumulate(1 / rank for rank in range(1, count + 1)))


class Load:
    """Draws jobs. Popularity is Zipf with exponent 1: of base models, of a base model's LoRAs, and of callers."""

    def __init__(self, seed: int, run_s: tuple[float, float] = (SHORTEST_RUN_S, LONGEST_RUN_S), *, alike: bool = False) -> None:
        """`alike`: every job takes the same base model and no LoRA."""
        self._random = random.Random(seed)
        self._run_s = run_s
        self._base_models = 1 if alike else BASE_MODELS
        self._made = 0
        # A LoRA fits one base model. The 40 ranks are dealt so that each base model has popular and rare ones.
        self._loras: list[list[str]] = [[] for _ in range(BASE_MODELS)]
        for rank in range(0 if alike else LORAS):
            self._loras[self._pick(BASE_MODELS)].append(f"lora{rank:02}")

    @property
    def mean_run_s(self) -> float:
        return sum(self._run_s) / 2

    def _pick(self, count: int) -> int:
        return self._random.choices(range(count), cum_weights=_zipf(count))[0]

    def _draw(self, arrival_s: float, caller: int) -> Work:
        base = self._pick(self._base_models)
        known = self._loras[base]
        has_lora = bool(known) and self._random.random() < WITH_LORA_SHARE
        files = frozenset([known[self._pick(len(known))]] if has_lora else [])
        self._made += 1
        return Work(f"j{self._made:06}", f"caller{caller}", f"base{base}", files, self._random.uniform(*self._run_s), arrival_s)

    def make(self, count: int, jobs_per_s: float, arrivals: Arrivals) -> list[Work]:
        """`count` jobs. A burst is one caller's, and each of its jobs is drawn by itself: alike jobs would flatter affinity."""
        works: list[Work] = []
        now_s = 0.0
        while len(works) < count:
            size = 1 if arrivals == "poisson" else 1 + int(self._random.expovariate(1 / (MEAN_BURST - 0.5)))
            if arrivals != "backlog":
                mean_size = 1 if arrivals == "poisson" else MEAN_BURST
                now_s += self._random.expovariate(jobs_per_s / mean_size)
            caller = self._pick(CALLERS)
            works += [self._draw(now_s, caller) for _ in range(min(size, count - len(works)))]
        return works
