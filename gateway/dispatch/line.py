"""Who waits, as this dispatcher sees it: the front of Redis's line as of a recent look, and what the feed told since."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace

from gateway.dispatch.fleet import LOOK_AHEAD, Candidate, date_line
from gateway.dispatch.instance import Instance
from gateway.jobs.model import Job, now_ms
from gateway.jobs.records import Made
from gateway.jobs.store import JobStore

REMEMBERED = 4096
# A look at Redis counts for so long. A line of at most two was seen whole: the feed keeps it so, and there is no order to get wrong.
LINE_S, WHOLE_LINE_S = 0.05, 0.9
# Of the jobs made here: the newest, and none whose graph is uncommonly large.
KEPT_MADE, KEPT_GRAPH_BYTES = 512, 64 << 10


class Line:
    """Candidates keep from look to look what is known of them alone: since when they are seen, and first."""

    def __init__(self, store: JobStore) -> None:
        self._store = store
        self._candidates: OrderedDict[str, Candidate] = OrderedDict()
        self._ids: list[str] = []  # as of the last look
        self._due_s = 0.0
        self._is_cut = False  # more wait than were seen
        self._came: list[str] = []  # since Redis was last asked: its answer may be older than they are
        self._claiming: set[str] = set()  # placed, and perhaps still in Redis's line
        self._made: OrderedDict[str, Made] = OrderedDict()  # by this process, and not heard of since

    @property
    def is_empty(self) -> bool:
        """As far as is known nobody waits."""
        return not self._ids and not self._is_cut

    @property
    def may_hold_any(self) -> bool:
        """Whether somebody waits, as far as is known. A claim that came to nothing may have left a job of which nothing else is known."""
        return bool(self._candidates) or not self._due_s

    @property
    def may_show_more(self) -> bool:
        """Of those that were seen some are placed: as many more can be looked at."""
        return self._is_cut and len(self._ids) < LOOK_AHEAD

    @property
    def candidates(self) -> Mapping[str, Candidate]:
        """All that are remembered, by job."""
        return self._candidates

    def look_again(self) -> None:
        """What was seen counts no more."""
        self._due_s = 0.0

    async def look(self, instances: Mapping[str, Instance]) -> list[Candidate]:
        """The next in line, as of a look at Redis that is recent enough. The same look tells the instances what they hold."""
        if time.monotonic() > self._due_s:
            window, self._came = LOOK_AHEAD + len(self._claiming), []
            # Before it is asked, so that who wants another look meanwhile gets it.
            self._due_s = time.monotonic() + LINE_S
            front, loads = await self._store.peek(window, list(instances))
            ids = [job_id for job_id in front if job_id not in self._claiming][:LOOK_AHEAD]
            self._is_cut = len(front) == window
            if len(ids) <= 2 and self._due_s:
                self._due_s += WHOLE_LINE_S - LINE_S
            self._ids = ids + [job_id for job_id in self._came if job_id not in ids and job_id in self._candidates]
            for name, load in loads.items():
                if name in instances:
                    instances[name].look(load)
            await self._learn_of([job_id for job_id in ids if job_id not in self._candidates])
        known = [job_id for job_id in self._ids if job_id in self._candidates]
        dated = date_line([self._candidates[job_id] for job_id in known[:LOOK_AHEAD]], now_ms())
        self._candidates.update((candidate.job_id, candidate) for candidate in dated)
        return dated

    async def _learn_of(self, unknown: list[str]) -> None:
        foreign = [job_id for job_id in unknown if job_id not in self._made]
        here = [self._made[job_id].job for job_id in unknown if job_id in self._made]
        for job in (*here, *(await self._store.load_many(foreign) if foreign else ())):
            self._remember(job)

    def _remember(self, job: Job) -> None:
        candidate, known = Candidate.of(job), self._candidates.get(job.id)
        self._candidates[job.id] = replace(candidate, seen_ms=known.seen_ms, first_ms=known.first_ms) if known else candidate
        while len(self._candidates) > REMEMBERED:
            self._candidates.popitem(last=False)

    def expect(self, made: Made) -> None:
        """A job that this process makes in this moment: neither the feed nor a claim need tell it what it is."""
        if len(made.graph) <= KEPT_GRAPH_BYTES:
            self._made[made.job.id] = made
            if len(self._made) > KEPT_MADE:
                self._made.popitem(last=False)

    def take_made(self, job_id: str) -> Made | None:
        """The job as it was made here."""
        return self._made.pop(job_id, None)

    def join(self, job_id: str, data: bytes) -> None:
        """A new job, told by its status event, stands behind those already seen, until the next look puts it where it belongs.

        One in a hurry brings that about. Raises ValidationError.
        """
        made = self._made.get(job_id)
        job = made.job if made is not None and job_id not in self._candidates else Job.model_validate_json(data)
        self._remember(job)
        if job.spec.priority == "high":
            self._due_s = 0.0
        elif job.id not in self._ids and job.id not in self._claiming and not self._is_cut:
            self._ids.append(job.id)
            self._came.append(job.id)
            if len(self._ids) > 2:
                self._due_s = min(self._due_s, time.monotonic() + LINE_S)

    def leave(self, job_id: str) -> None:
        """It waits no more, here or in any process."""
        self._candidates.pop(job_id, None)
        if job_id in self._ids:
            self._ids.remove(job_id)

    def begin_claim(self, job_id: str) -> None:
        """It is placed: not to be placed again while Redis may still show it."""
        self.leave(job_id)
        self._claiming.add(job_id)

    def end_claim(self, job_id: str) -> None:
        self._claiming.discard(job_id)
