"""Why a waiting generation is on no instance yet, where that is not the line's doing. It reads what the dispatchers have published."""

from __future__ import annotations

from typing import Literal, NamedTuple

from gateway.dispatch.fleet import missing
from gateway.instances import InstanceRegistry
from gateway.jobs.model import Job

Reason = Literal["training", "draining", "resting", "down", "missing", "no_instance"]

# By the state that keeps an instance from the job; the most hopeful first.
_WORDS: dict[Reason, str] = {
    "training": "A training has the GPU of {names}; the job starts when the GPU is given back.",
    "resting": "{names} failed several times in a row and rests before it is tried again.",
    "draining": "{names} takes nothing new until an operator lets it.",
    "down": "{names} cannot be reached.",
}


class Obstacle(NamedTuple):
    """What a job waits for; `instances` are those that could run it otherwise."""

    reason: Reason
    message: str
    instances: list[str]


async def find_obstacle(job: Job, registry: InstanceRegistry) -> Obstacle | None:
    """None when an instance that is up could run it: then it is only a matter of its turn."""
    states, lacks = dict[str, list[str]](), list[list[str]]()
    for facts in await registry.recent():
        catalog = await registry.catalog(facts)
        if catalog is not None and (lack := missing(job.spec.needs, catalog)):
            lacks.append(lack)
        elif facts.state == "up":
            return None
        else:
            states.setdefault(facts.state, []).append(facts.id)
    for reason, words in _WORDS.items():
        if names := states.get(reason):
            return Obstacle(reason, words.format(names=", ".join(names)), names)
    if lacks:
        fewest = min(lacks, key=len)
        return Obstacle("missing", f"No instance can run it: {', '.join(fewest[:5])} is missing.", [])
    return Obstacle("no_instance", "No instance is known.", [])
