"""Calls of one script that are made in one moment travel as one: a dispatcher with hundreds of jobs has news of many at a time."""

from __future__ import annotations

import asyncio
from typing import Any

from gateway.redis_client import FOREIGN

# Redis does nothing else while a script runs: at 20 us a job a call stays in the low milliseconds.
AT_ONCE = 100


class Gathering:
    """For a script that takes any number of argument groups and answers with one value for each."""

    def __init__(self, script: Any) -> None:
        self._script = script
        self._waiting: list[tuple[list[Any], asyncio.Future[Any]]] = []
        self._calls: set[asyncio.Task[None]] = set()

    async def call(self, group: list[Any]) -> Any:
        """The script's answer for this group. Raises what the call raised, of Redis's own."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Any] = loop.create_future()
        if not self._waiting:
            loop.call_soon(self._send)
        self._waiting.append((group, answer))
        return await answer

    def _send(self) -> None:
        waiting, self._waiting = self._waiting, []
        for start in range(0, len(waiting), AT_ONCE):
            call = asyncio.create_task(self._call(waiting[start : start + AT_ONCE]))
            self._calls.add(call)
            call.add_done_callback(self._calls.discard)

    async def _call(self, batch: list[tuple[list[Any], asyncio.Future[Any]]]) -> None:
        """Whoever stopped waiting meanwhile is passed over; the write was on its way."""
        try:
            answers = await self._script(args=[part for group, _ in batch for part in group])
        except FOREIGN as error:
            for _, answer in batch:
                if not answer.done():
                    answer.set_exception(error)
            return
        for (_, answer), value in zip(batch, answers, strict=True):
            if not answer.done():
                answer.set_result(value)
