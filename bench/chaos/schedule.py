"""What happens to whom and when: drawn from a seed, so that the same seed gives the same schedule. It touches no process."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Act = Literal["kill", "stop", "pause"]  # SIGKILL and start again, SIGTERM and start again, SIGSTOP and SIGCONT


@dataclass(frozen=True, slots=True)
class Fault:
    """At `at_s` after the beginning, `part` is hit and stays away for `away_s`."""

    at_s: float
    act: Act
    part: str
    away_s: float


@dataclass(frozen=True, slots=True)
class Request:
    """One job that a client asks for, with everything it decides by chance."""

    number: int
    at_s: float
    body: dict[str, int | str]
    gateway: int
    cancel_after_s: float | None
    leave_after: int | None  # events after which its stream's reader goes away and comes back


# Per kind: how often it is hit, and for how long at most it stays killed or paused (seconds). A lease lasts 2 s here, so some
# pauses outlive it and some do not.
KINDS: dict[str, tuple[int, float, float]] = {
    "engine": (6, 2.0, 4.0),
    "gateway": (4, 1.5, 3.0),
    "dispatcher": (6, 2.0, 5.0),
    "redis": (3, 1.5, 4.0),
    "s3": (2, 2.0, 3.0),
}
ACTS: tuple[Act, ...] = ("kill", "kill", "pause", "stop")


def draw_faults(seed: int, parts: Sequence[str], duration_s: float, pause_s: tuple[float, float]) -> list[Fault]:
    """Faults of all kinds over `duration_s`, each kind at least once killed and once paused if there is time for that."""
    draw = random.Random(f"faults {seed}")
    kinds = sorted({part.partition("-")[0] for part in parts})
    due: list[tuple[str, Act]] = [(kind, act) for kind in kinds for act in ("kill", "pause")] + [("redis", "stop")]
    draw.shuffle(due)
    faults, at_s, free_at = list[Fault](), draw.uniform(*pause_s), dict[str, float]()
    while at_s < duration_s:
        kind, act = due[-1] if due else (draw.choices(kinds, [KINDS[kind][0] for kind in kinds])[0], draw.choice(ACTS))
        # A part that is away, or just back, is left alone.
        free = [part for part in parts if part.partition("-")[0] == kind and free_at.get(part, 0.0) <= at_s]
        if free:
            part, away_s = draw.choice(free), round(draw.uniform(0.2, KINDS[kind][2 if act == "pause" else 1]), 2)
            faults.append(Fault(round(at_s, 2), act, part, away_s))
            free_at[part] = at_s + away_s + 1.0
            del due[-1:]
        at_s += draw.uniform(*pause_s)
    return faults


def draw_requests(seed: int, jobs: int, duration_s: float, gateways: int) -> list[Request]:
    """`jobs` requests spread over `duration_s`. Every colour is used once, but for a few requests that repeat an earlier one."""
    draw = random.Random(f"requests {seed}")
    colors = draw.sample(range(1 << 24), jobs)
    requests = list[Request]()
    for number, at_s in enumerate(sorted(draw.uniform(0, duration_s) for _ in range(jobs))):
        body: dict[str, int | str] = {
            "workflow": "chaos",
            "color": colors[number],
            "size": draw.choice((16, 32, 64)),
            "num_images": draw.choice((1, 1, 1, 2)),
            "ticks": draw.randint(2, 6),
            "tick_ms": draw.randint(30, 60),
        }
        if requests and draw.random() < 0.05:
            body = requests[-draw.randint(1, min(5, len(requests)))].body
        cancel_after_s = draw.uniform(0, 1.5) if draw.random() < 0.04 else None
        leave_after = draw.randint(1, 6) if draw.random() < 0.3 else None
        requests.append(Request(number, round(at_s, 3), body, draw.randrange(gateways), cancel_after_s, leave_after))
    return requests
