"""How quick an instance is: how long each kind of work takes there, and how long it is until the next prompt can be there. Pure."""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Collection
from typing import NamedTuple

from gateway.jobs.model import Job, JobSpec
from gateway.pricing import Measurement, measure_work

REMEMBERED = 256
NEWEST = 0.25  # weight of the newest value
# Both times vary, and what runs has partly run: what is held must last for two refills.
REFILLS = 2.0
# These never decide how long a picture takes. Everything else may: frames, seconds, a choice of sampler, a picture to work on.
_WITHOUT_WEIGHT = frozenset({"seed", "prompt", "negative_prompt"})


def name_work(spec: JobSpec) -> str:
    """Jobs of one name take about the same time on one instance; "" for a caller's own graph, of which nothing is known.

    A parameter that changes nothing makes a kind of its own all the same: that costs a quick job some of its pace, the opposite would
    put jobs of minutes where jobs of milliseconds are expected.
    """
    if spec.raw:
        return ""
    loras = sorted(lora.file for lora in spec.loras)
    weighty = sorted((name, value) for name, value in spec.parameters.items() if name not in _WITHOUT_WEIGHT)
    kind = repr((spec.workflow, spec.workflow_version, spec.base_model, loras, weighty))
    return hashlib.blake2b(kind.encode(), digest_size=16).hexdigest()


def measure(job: Job, execution_ms: int) -> Measurement:
    """What a job that ran says about those to come, for estimates."""
    load_ms, device = job.metrics.load_ms or 0, job.made_on.device if job.made_on else None
    return Measurement(measure_work(job.spec.parameters), device, max(0, execution_ms - load_ms), None if job.warm else load_ms)


class _Runs(NamedTuple):
    """Of one kind: how long they take, and how many in a row were over before a refill could come."""

    run_s: float
    quick_in_a_row: int


class Pace:
    """Smoothed measurements of one instance, in seconds."""

    def __init__(self) -> None:
        self._runs: OrderedDict[str, _Runs] = OrderedDict()
        self._refill_s = 0.0

    def record_run(self, work: str, run_s: float) -> None:
        """A prompt of this kind took so long from its start to its end."""
        if not work:
            return
        known = self._runs.pop(work, _Runs(run_s, 0))
        quick_in_a_row = known.quick_in_a_row + 1 if run_s < self._refill_s * REFILLS else 0
        self._runs[work] = _Runs(_smooth(known.run_s, run_s), quick_in_a_row)
        if len(self._runs) > REMEMBERED:
            self._runs.popitem(last=False)

    def record_refill(self, refill_s: float) -> None:
        """From the choice of a job until the instance had its prompt."""
        self._refill_s = _smooth(self._refill_s or refill_s, refill_s)

    def expect_rest_s(self, held: Collection[str], running_s: float) -> float:
        """Until prompts of these kinds are done, the first of which has run for so long. What takes longer than expected takes for ever."""
        lasts_s = sum(self._runs[work].run_s if work in self._runs else math.inf for work in held)
        return lasts_s - running_s if running_s <= lasts_s else math.inf

    def spare_prompts(self, held: Collection[str], oldest_s: float) -> int:
        """How many more than its share it may hold, while prompts of these kinds would be done before the next one could be there.

        As many as runs of each kind were quick, one after the other: what is believed of a kind is paid for by one run at a time. None
        when the oldest of those held has been there for `oldest_s`, longer than quick ones would. What was never measured takes for ever.
        """
        lasts_s = sum(self._runs[work].run_s if work in self._runs else math.inf for work in held)
        if lasts_s >= self._refill_s * REFILLS or oldest_s >= self._refill_s * REFILLS * 2:
            return 0
        return min((self._runs[work].quick_in_a_row for work in held), default=0)


def _smooth(known: float, newest: float) -> float:
    return known + (newest - known) * NEWEST
