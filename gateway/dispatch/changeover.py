"""The moment between two prompts of one instance. ComfyUI answers requests and begins the next prompt in one Python: what can wait, does.

It only makes room. Nothing depends on it, and nothing waits for longer than HOLD_S.
"""

from __future__ import annotations

import asyncio

# From a prompt's last output to the next one's start ComfyUI takes 1 to 5 ms, when it does not collect garbage.
HOLD_S = 0.02


class Changeover:
    """Told by the prompts of one process; all of it is called from one loop."""

    def __init__(self) -> None:
        self._behind: set[str] = set()  # prompts that are there and have not begun
        self._passed = asyncio.Event()
        self._passed.set()
        self._limit: asyncio.TimerHandle | None = None

    def stand_behind(self, prompt_id: str) -> None:
        """It is in the instance's queue."""
        self._behind.add(prompt_id)

    def leave(self, prompt_id: str) -> None:
        """It has begun, or will not: whoever waited for that goes on."""
        if prompt_id in self._behind:
            self._behind.remove(prompt_id)
            self._end()

    def begin(self) -> None:
        """A prompt ends. Where none stands behind it there is nothing to make room for."""
        if self._behind:
            self._end()
            self._passed.clear()
            self._limit = asyncio.get_running_loop().call_later(HOLD_S, self._end)

    def _end(self) -> None:
        self._passed.set()
        if self._limit is not None:
            self._limit.cancel()
            self._limit = None

    async def passed(self) -> None:
        """At once, unless a prompt is about to begin."""
        if not self._passed.is_set():
            await self._passed.wait()
