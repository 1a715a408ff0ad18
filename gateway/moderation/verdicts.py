"""Whether a text may be drawn and a picture be shown, where an operator has a judge for that. Before anything is queued or stored."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence

import aiohttp

from gateway.errors import Moderated, ModerationUnavailable
from gateway.jobs.model import JobSpec
from gateway.moderation.judges import MAX_PICTURE_BYTES, Case, Judge, JudgeFailed, Verdict, open_judge
from gateway.settings import Settings
from gateway.telemetry import Metrics

log = logging.getLogger(__name__)

# Items of a batch often say the same: a verdict on texts holds for a while.
REMEMBERED, REMEMBER_S = 2048, 60.0
# Texts of one question; captions of a data set are asked about in several.
MOST_CHARACTERS = 50_000
# A picture is there, and costs GPU time to draw again: its judge is asked more than once.
PAUSES_S = (0.5, 2.0)


class Moderation:
    """Raises Moderated, and ModerationUnavailable where the judge does not answer and the deployment is to be safe then."""

    def __init__(self, judge: Judge | None, *, name: str = "", fail_open: bool = False, metrics: Metrics | None = None) -> None:
        self._judge, self._name, self._fail_open, self._metrics = judge, name, fail_open, metrics
        self._known = OrderedDict[Case, tuple[float, Verdict]]()

    @property
    def judges_texts(self) -> bool:
        return self._judge is not None and "prompt" in self._judge.stages

    @property
    def judges_pictures(self) -> bool:
        """Whether nothing may be seen of a picture before it was judged."""
        return self._judge is not None and "picture" in self._judge.stages

    @property
    def cache_mark(self) -> str | None:
        """Part of what makes requests identical: a picture that this judge has not seen answers none."""
        return self._name if self.judges_pictures else None

    async def require_texts(self, texts: Iterable[str], *, caller: str, workflow: str, parameter: str) -> None:
        """Refuse the request that holds these, whichever of them it is."""
        if self._judge is None or not self.judges_texts:
            return
        for part in _pack(dict.fromkeys(text for text in texts if text.strip())):
            case = Case("prompt", caller, workflow, part)
            verdict = self._remember(case) or await self._ask(self._judge, case, ())
            if verdict is not None:
                self._require(case, verdict, {"parameter": parameter})

    async def require_picture(self, body: bytes, content_type: str, spec: JobSpec) -> None:
        """Refuse a picture that a job made."""
        if self._judge is None or not self.judges_pictures:
            return
        asked = (spec.parameters.get("prompt"), *spec.parameters.get("sample_prompts", ()))
        texts = tuple(text for text in asked if isinstance(text, str))
        case = Case("picture", spec.caller, spec.workflow, texts, spec.id, body, content_type)
        verdict = await self._ask(self._judge, case, PAUSES_S)
        if verdict is not None:
            self._require(case, verdict, {})

    def _remember(self, case: Case) -> Verdict | None:
        until, verdict = self._known.get(case, (0.0, None))
        return verdict if time.monotonic() < until else None

    async def _ask(self, judge: Judge, case: Case, pauses_s: Sequence[float]) -> Verdict | None:
        """None: it did not answer, and that counts as a yes."""
        for pause_s in (*pauses_s, None):
            try:
                if case.picture is not None and len(case.picture) > MAX_PICTURE_BYTES:
                    raise JudgeFailed(f"the picture is larger than {MAX_PICTURE_BYTES} bytes")
                verdict = await judge.judge(case)
            except JudgeFailed as error:
                log.warning("moderation failed", extra={"stage": case.stage, "error": str(error)})
                self._count(case, "failed")
                if pause_s is not None:
                    await asyncio.sleep(pause_s)
            else:
                self._note(case, verdict)
                return verdict
        if self._fail_open:
            return None
        raise ModerationUnavailable(f"The {case.stage} could not be judged.", details={"stage": case.stage})

    def _note(self, case: Case, verdict: Verdict) -> None:
        self._count(case, "allowed" if verdict.allowed else "refused")
        if case.picture is None:
            self._known[case] = time.monotonic() + REMEMBER_S, verdict
            if len(self._known) > REMEMBERED:
                self._known.popitem(last=False)

    def _require(self, case: Case, verdict: Verdict, place: dict[str, str]) -> None:
        if verdict.allowed:
            return
        # Neither the text nor the picture: logs are read by more people than requests.
        log.info("moderated", extra={"stage": case.stage, "caller": case.caller, "workflow": case.workflow, "why": verdict.categories})
        details = {**place, "stage": case.stage, "reason": verdict.reason, "categories": verdict.categories}
        raise Moderated(f"The {case.stage} is refused by this deployment's moderation.", details=details)

    def _count(self, case: Case, outcome: str) -> None:
        if self._metrics is not None:
            self._metrics.moderation.labels(case.stage, outcome).inc()


def open_moderation(settings: Settings, session: aiohttp.ClientSession, metrics: Metrics | None = None) -> Moderation:
    """As the settings say. Raises JudgeBroken."""
    fail_open = settings.moderation_on_failure == "open"
    return Moderation(open_judge(settings, session), name=settings.moderation, fail_open=fail_open, metrics=metrics)


def _pack(texts: Iterable[str]) -> Iterator[tuple[str, ...]]:
    """As many at a time as a question may hold; one that is longer is asked about alone."""
    part, size = list[str](), 0
    for text in texts:
        if part and size + len(text) > MOST_CHARACTERS:
            yield tuple(part)
            part, size = [], 0
        part.append(text)
        size += len(text)
    if part:
        yield tuple(part)
