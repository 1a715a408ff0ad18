"""Judges by themselves: a list against every disguise, an endpoint that misbehaves, a function, and what counts when none answers."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from pydantic import SecretStr

from gateway.errors import Moderated, ModerationUnavailable
from gateway.moderation import judges
from gateway.moderation.blocklist import BrokenEntry, read_blocklist
from gateway.moderation.judges import BlocklistJudge, FunctionJudge, HttpJudge, JudgeBroken, open_judge
from gateway.moderation.verdicts import Moderation, open_moderation
from gateway.settings import Settings
from gateway.telemetry import Metrics
from tests.moderator import WORD, Moderator, running_moderator

LIST = read_blocklist(["# not this", "", "Forbidden", "two  Words", r"/flow?er\d+/", "ass", "запретное"])


@pytest.mark.parametrize(
    "text",
    [
        "a forbidden thing",
        "FORBIDDEN!",
        "fоrbіddеn",
        "f\u200borbid\u00adden",
        "fórbïdden",
        "ｆｏｒｂｉｄｄｅｎ",
        "f.o.r.b.i.d.d.e.n",
        "for_bid-den",
        "a f o r b i d d e n cat",
        "f0rb1dd3n",
        "forbiddddden",
        "two, words",
        "two\nWORDS",
        "a Flower12",
        "$a$$ ass",
        "ЗАПРЕТНОЕ",
    ],
)
def test_a_word_is_known_in_disguise(text: str) -> None:
    assert LIST.blocks(text)


@pytest.mark.parametrize(
    "text", ["unforbidden", "assess the class", "as safe as saints", "two red words", "flowers 12", "not this", "", "a bass, f o r now"]
)
def test_what_only_resembles_it_is_let_pass(text: str) -> None:
    assert not LIST.blocks(text)


def test_a_pattern_that_is_none_is_named_by_its_line() -> None:
    with pytest.raises(BrokenEntry, match="line 2 is no regular expression"):
        read_blocklist(["fine", "/(/"])


@pytest.fixture(scope="module")
def moderator() -> Iterator[Moderator]:
    with running_moderator() as running:
        yield running


def require(moderation: Moderation, *texts: str) -> None:
    asyncio.run(moderation.require_texts(texts, caller="ann", workflow="flux", parameter="prompt"))


async def _require_by_http(url: str, texts: list[str], fail_open: bool, secret: str | None) -> None:
    async with aiohttp.ClientSession() as session:
        judge = HttpJudge(url, SecretStr(secret) if secret else None, 0.5, session)
        moderation = Moderation(judge, fail_open=fail_open)
        for _ in range(2):
            await moderation.require_texts(texts, caller="ann", workflow="flux", parameter="prompt")


def ask(moderator: Moderator, *texts: str, fail_open: bool = False, secret: str | None = None) -> None:
    asyncio.run(_require_by_http(moderator.url, list(texts), fail_open, secret))


def test_an_endpoint_is_told_what_it_needs_and_asked_once(moderator: Moderator) -> None:
    ask(moderator, "a cat", "a cat", " ", "a dog", secret="sixteen letters and more")
    assert moderator.asked[-1] == {"stage": "prompt", "caller": "ann", "workflow": "flux", "job": None, "texts": ["a cat", "a dog"]}
    assert moderator.headers[-1]["Authorization"] == "Bearer sixteen letters and more"
    assert len(moderator.asked) == 1, "the same is not asked twice in a minute"
    with pytest.raises(Moderated) as refused:
        ask(moderator, f"a {WORD} cat")
    assert refused.value.details == {"parameter": "prompt", "stage": "prompt", "reason": "that word", "categories": ["words"]}
    assert (refused.value.status, refused.value.code) == (422, "moderated")
    assert WORD not in str(refused.value.body())


@pytest.mark.parametrize(
    "answer",
    [
        (500, b"{}", 0.0),
        (201, b'{"allowed": true}', 0.0),
        (302, b'{"allowed": true}', 0.0),
        (200, b"yes", 0.0),
        (200, b"{}", 0.0),
        (200, b'{"allowed": 1}', 0.0),
        (200, b'{"allowed": "true"}', 0.0),
        (200, b'{"allowed": true, "reason": "' + b"x" * 100_000 + b'"}', 0.0),
        (200, b'{"allowed": true}', 1.0),
    ],
    ids=str,
)
def test_what_is_no_verdict_refuses_unless_failures_are_open(moderator: Moderator, answer: tuple[int, bytes, float]) -> None:
    moderator.answers[:] = [answer]
    with pytest.raises(ModerationUnavailable) as failed:
        ask(moderator, "a cat")
    assert (failed.value.status, failed.value.code) == (503, "moderation_unavailable")
    moderator.answers[:] = [answer, answer]
    ask(moderator, "a cat", fail_open=True)
    assert moderator.answers == [], "a failure is not remembered as a yes"


def test_an_endpoint_that_is_not_there_refuses() -> None:
    with pytest.raises(ModerationUnavailable):
        ask(Moderator("http://127.0.0.1:1/"), "a cat")


def test_many_texts_are_asked_about_in_parts(moderator: Moderator) -> None:
    before = len(moderator.asked)
    ask(moderator, *(f"{number} " + "word " * 2000 for number in range(12)))
    parts = [case["texts"] for case in moderator.asked[before:]]
    assert [len(part) for part in parts] == [4, 4, 4]


def explode(case: dict[str, Any]) -> dict[str, Any]:
    raise RuntimeError("the operator's own")


async def judge_later(case: dict[str, Any]) -> dict[str, Any]:
    await asyncio.sleep(0)
    return {"allowed": WORD not in case["texts"][0]}


async def never(case: dict[str, Any]) -> None:
    await asyncio.sleep(60)


def test_a_function_may_wait_or_work_and_one_that_breaks_refuses() -> None:
    for name in ("tests.moderator:judge", "tests.test_moderation:judge_later"):
        moderation = Moderation(open_judge(Settings(moderation=name), None))
        require(moderation, "a cat")
        with pytest.raises(Moderated):
            require(moderation, WORD)
    for function in (explode, never, str):
        with pytest.raises(ModerationUnavailable):
            require(Moderation(FunctionJudge(function, 0.2)), "a cat")


def test_an_entry_point_is_found_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("ours", "tests.moderator:judge", judges.ENTRY_POINTS)
    monkeypatch.setattr(judges, "entry_points", lambda **asked: [point] if asked == {"group": judges.ENTRY_POINTS, "name": "ours"} else [])
    with pytest.raises(Moderated):
        require(Moderation(open_judge(Settings(moderation="ours"), None)), WORD)
    with pytest.raises(JudgeBroken, match="MODERATION=others cannot be imported"):
        open_judge(Settings(moderation="others"), None)


def test_a_list_is_read_anew_when_it_changes_and_stands_while_it_is_broken(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_text("cat\n")
    moderation = Moderation(BlocklistJudge(path))
    assert not moderation.judges_pictures
    with pytest.raises(Moderated):
        require(moderation, "a cat")
    for text in ("dog\n", "/(/\n"):
        path.write_text(text)
        os.utime(path, ns=(1, len(text)))
        with pytest.raises(Moderated):
            require(moderation, f"a dog after {text}")
    require(moderation, "a bird")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"moderation": "blocklist"}, "needs MODERATION_BLOCKLIST"),
        ({"moderation": "blocklist", "moderation_blocklist": "/nowhere"}, "cannot be read"),
        ({"moderation": "tests.nowhere:judge"}, "cannot be imported: ModuleNotFoundError"),
        ({"moderation": "tests.moderator:nobody"}, "cannot be imported: AttributeError"),
        ({"moderation": "tests.moderator:WORD"}, "is no function"),
    ],
)
def test_a_judge_that_cannot_be_asked_is_refused_at_start(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(JudgeBroken, match=said):
        open_judge(Settings.model_validate(settings), None)


@pytest.mark.parametrize("judge", ["ftp://x", "a b", "/etc/passwd", "a:b:c"])
def test_what_names_no_judge_is_refused_at_start(judge: str) -> None:
    with pytest.raises(ValueError, match="write blocklist, an http"):
        Settings(moderation=judge)


def test_judgements_are_counted(moderator: Moderator) -> None:
    metrics = Metrics()

    async def use() -> None:
        async with aiohttp.ClientSession() as session:
            moderation = open_moderation(Settings(moderation=moderator.url), session, metrics)
            await moderation.require_texts(["a cat"], caller="ann", workflow="flux", parameter="prompt")

    asyncio.run(use())
    assert metrics.registry.get_sample_value("fluxgate_moderation_total", {"stage": "prompt", "outcome": "allowed"}) == 1
