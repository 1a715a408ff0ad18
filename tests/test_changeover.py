"""Between two prompts what can wait does, but never for long, and never where nothing is about to begin."""

from __future__ import annotations

import asyncio

import pytest

from gateway.dispatch import changeover
from gateway.dispatch.changeover import Changeover


async def _is_held(moment: Changeover) -> bool:
    waiting = asyncio.create_task(moment.passed())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    held = not waiting.done()
    waiting.cancel()
    return held


async def test_nothing_waits_where_nothing_stands_behind() -> None:
    moment = Changeover()
    moment.begin()
    assert not await _is_held(moment)
    moment.stand_behind("next")
    assert not await _is_held(moment), "no prompt ends yet"
    moment.leave("next")
    moment.begin()
    assert not await _is_held(moment), "the next one has begun long ago"


async def test_what_can_wait_waits_until_the_next_prompt_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(changeover, "HOLD_S", 3600.0)
    moment = Changeover()
    moment.stand_behind("next")
    moment.stand_behind("after that")
    moment.begin()
    waiting = asyncio.create_task(moment.passed())
    moment.begin()
    moment.leave("somebody else's")
    assert await _is_held(moment)
    moment.leave("next")
    async with asyncio.timeout(10):
        await waiting
    assert not await _is_held(moment)
    moment.begin()
    assert await _is_held(moment), "another one stands behind"


async def test_a_start_that_is_not_heard_is_not_waited_for() -> None:
    moment = Changeover()
    moment.stand_behind("next")
    moment.begin()
    assert await _is_held(moment)
    async with asyncio.timeout(10):
        await moment.passed()
