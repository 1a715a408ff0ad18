"""How quick an instance is: how long each kind of work takes there, and how long it is until the next prompt can be there. Pure."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable

from gateway.jobs.model import Job, JobSpec
from gateway.pricing import Measurement, measure_work

REMEMBERED = 256
NEWEST = 0.25  # weight of the newest value
# Both times vary, and what runs has partly run: what is held must last for two refills.
REFILLS = 2.0
# The parameters that decide how long a picture takes; every workflow of ours calls them so.
_SIZES = ("width", "height", "steps", "num_images")


def name_work(spec: JobSpec) -> str:
    """Jobs of one name take about the same time on one instance; "" for a caller's own graph, of which nothing is known."""
    if spec.raw:
        return ""
    loras = sorted(lora.file for lora in spec.loras)
    return repr((spec.workflow, spec.workflow_version, spec.base_model, loras, [spec.parameters.get(name) for name in _SIZES]))


def measure(job: Job, execution_ms: int) -> Measurement:
    """What a job that ran says about those to come, for estimates."""
    load_ms, device = job.metrics.load_ms or 0, job.made_on.device if job.made_on else None
    return Measurement(measure_work(job.spec.parameters), device, max(0, execution_ms - load_ms), None if job.warm else load_ms)


class Pace:
    """Smoothed measurements of one instance, in seconds."""

    def __init__(self) -> None:
        self._run_s: OrderedDict[str, float] = OrderedDict()
        self._refill_s = 0.0

    def record_run(self, work: str, run_s: float) -> None:
        """A prompt of this kind took so long from its start to its end."""
        if not work:
            return
        self._run_s[work] = _smooth(self._run_s.pop(work, run_s), run_s)
        if len(self._run_s) > REMEMBERED:
            self._run_s.popitem(last=False)

    def record_refill(self, refill_s: float) -> None:
        """From the choice of a job until the instance had its prompt."""
        self._refill_s = _smooth(self._refill_s or refill_s, refill_s)

    def runs_dry(self, held: Iterable[str]) -> bool:
        """Whether prompts of these kinds would be done before the next one could be there. What was never measured takes for ever."""
        return sum(self._run_s.get(work, math.inf) for work in held) < self._refill_s * REFILLS


def _smooth(known: float, newest: float) -> float:
    return known + (newest - known) * NEWEST
