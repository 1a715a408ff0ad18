"""The waiting line as a dispatcher sees it: what comes while Redis is asked is not lost with the older answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from gateway.dispatch.line import Line
from gateway.jobs.model import Job
from gateway.jobs.records import Load
from gateway.jobs.store import JobStore
from gateway.redis_client import RedisClient
from tests.job_specs import create, make_spec, take

pytest_plugins = ["tests.store_fixtures"]


class LateStore(JobStore):
    """Its looks at the line take effect in Redis before `meanwhile` happens, and are answered after it."""

    meanwhile: Callable[[], None] | None = None

    async def peek(self, limit: int, instances: Sequence[str] = ()) -> tuple[list[str], dict[str, Load]]:
        answer = await super().peek(limit, instances)
        if self.meanwhile is not None:
            self.meanwhile()
            self.meanwhile = None
        return answer


@pytest.fixture
def late(redis_client: RedisClient) -> LateStore:
    return LateStore(redis_client, ttl_s=1000)


async def _see(line: Line) -> list[str]:
    return [candidate.job_id for candidate in await line.look({})]


@pytest.mark.parametrize("priority", ["normal", "high"])
async def test_a_job_that_comes_while_redis_is_asked_is_seen(late: LateStore, priority: str) -> None:
    await create(late, "first")
    line, second = Line(late), Job(spec=make_spec("second", priority=priority))
    late.meanwhile = lambda: line.join(second.id, second.model_dump_json().encode())
    seen = await _see(line)
    await create(late, "second", priority=priority)
    assert "second" in (seen if priority == "normal" else await _see(line))


async def test_a_job_that_came_and_went_while_redis_is_asked_is_not(late: LateStore) -> None:
    line, gone = Line(late), Job(spec=make_spec("gone"))

    def come_and_go() -> None:
        line.join(gone.id, gone.model_dump_json().encode())
        line.leave("gone")

    late.meanwhile = come_and_go
    assert await _see(line) == []


async def test_another_look_that_is_wanted_while_redis_is_asked_is_taken(late: LateStore) -> None:
    line = Line(late)
    late.meanwhile = line.look_again
    assert await _see(line) == []
    assert line.may_hold_any, "what there is now is not known"
    await create(late, "one")
    assert await _see(line) == ["one"]
    assert line.may_hold_any
    line.begin_claim("one")
    await take(late, "one")
    assert not line.may_hold_any
