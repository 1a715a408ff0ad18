"""A short storm over a whole deployment, as `python -m bench.chaos` makes long ones; and each promise broken once, to see the verdict."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from bench.chaos.clients import Sighting
from bench.chaos.schedule import Request, draw_faults, draw_requests
from bench.chaos.storm import run_storm
from bench.chaos.verdict import Record, Verdict, judge_acceptance, judge_ends, judge_runs, judge_streams

PARTS = [*(f"engine-{n}" for n in range(4)), "gateway-0", "gateway-1", "dispatcher-0", "dispatcher-1", "redis", "s3"]
JOBS = 60


async def test_nothing_is_lost_in_a_short_storm(tmp_path: Path) -> None:
    found = await run_storm(tmp_path, seed=1, jobs=JOBS, jobs_per_s=3.0, fault_pause_s=(0.5, 1.5))
    assert not found.wrongs
    assert (found.counts["requests"], found.counts["accepted"]) == (JOBS, JOBS)
    assert found.counts["succeeded"] >= JOBS // 2
    hit = {name.rpartition(" ")[2] for name in found.counts if name.startswith("faults: kill")}
    assert hit == {"engine", "gateway", "dispatcher", "redis", "s3"}


def test_a_seed_gives_the_same_storm_every_time() -> None:
    def draw(seed: int) -> tuple[object, object]:
        return draw_faults(seed, PARTS, 60.0, (0.5, 1.5)), draw_requests(seed, 100, 60.0, 2)

    assert draw(3) == draw(3)
    assert draw(3) != draw(4)


REQUEST = Request(0, 0.0, {"workflow": "chaos", "size": 16, "color": 1, "num_images": 1}, 0, None, None)
STREAM = [("1-0", "status", {"status": "queued"}), ("2-0", "progress", {}), ("3-0", "status", {"status": "succeeded"})]


def make_record(**changes: str) -> Record:
    return Record("job", {"status": "succeeded", "attempts": "1", "prompt_id": "p", **changes}, list(STREAM))


def make_sighting(*ids: str) -> Sighting:
    return Sighting(REQUEST, "job", [(event_id, "progress", "") for event_id in ids or ("1-0", "2-0", "3-0")], tries=1, visits=1)


def judge(sightings: list[Sighting], records: list[Record], journal: Path) -> list[str]:
    found, known = Verdict(), {record.job_id: record for record in records}
    judge_acceptance(found, sightings, known)
    judge_ends(found, known)
    judge_streams(found, sightings, known)
    judge_runs(found, [journal], known)
    return found.wrongs


GOOD_JOURNAL = "start p job\nsuccess p job\n"
END, QUEUED = STREAM[2], STREAM[0]
SINS: dict[str, tuple[Callable[[], tuple[list[Sighting], list[Record]]], str, str]] = {
    "lost": (lambda: ([make_sighting()], []), "", "not there any more"),
    "nobody's": (lambda: ([], [make_record()]), GOOD_JOURNAL, "nobody was told"),
    "without an end": (lambda: ([make_sighting()], [make_record(status="running")]), GOOD_JOURNAL, "is running"),
    "ended by a bug": (
        lambda: ([make_sighting()], [make_record(status="failed", error='{"code": "internal_error", "message": ""}')]),
        GOOD_JOURNAL,
        "internal_error",
    ),
    "two ends": (
        lambda: ([make_sighting()], [Record("job", make_record().fields, [QUEUED, END, ("4-0", *END[1:])])]),
        GOOD_JOURNAL,
        "ends",
    ),
    "stored out of order": (
        lambda: ([make_sighting()], [Record("job", make_record().fields, [STREAM[1], QUEUED, END])]),
        GOOD_JOURNAL,
        "out of order",
    ),
    "seen twice": (lambda: ([make_sighting("1-0", "2-0", "2-0", "3-0")], [make_record()]), GOOD_JOURNAL, "twice"),
    "seen out of order": (lambda: ([make_sighting("2-0", "1-0", "3-0")], [make_record()]), GOOD_JOURNAL, "out of order"),
    "never seen": (lambda: ([make_sighting("1-0", "3-0")], [make_record()]), GOOD_JOURNAL, "missed"),
    "begun twice": (lambda: ([make_sighting()], [make_record()]), "start p job\n" + GOOD_JOURNAL, "began 2 times"),
    "never made": (lambda: ([make_sighting()], [make_record()]), "start p job\n", "succeeded without prompt"),
    "run for nobody": (lambda: ([make_sighting()], [make_record()]), GOOD_JOURNAL + "start q other\n", "is no job"),
}


def test_the_verdict_on_a_good_job_is_good(tmp_path: Path) -> None:
    (tmp_path / "journal").write_text(GOOD_JOURNAL)
    assert judge([make_sighting()], [make_record()], tmp_path / "journal") == []


@pytest.mark.parametrize("name", SINS)
def test_the_verdict_finds_each_sin(name: str, tmp_path: Path) -> None:
    make, journal, wrong = SINS[name]
    (tmp_path / "journal").write_text(journal)
    wrongs = judge(*make(), tmp_path / "journal")
    assert any(wrong in found for found in wrongs), wrongs
