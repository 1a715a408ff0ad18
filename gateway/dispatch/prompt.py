"""One prompt on one instance: submit it, find it again, wait for its end, stop it. History is the truth; the socket only makes it quick."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, TypeVar

from gateway.comfy.client import HistoryEntry
from gateway.comfy.messages import Executed, Executing, ExecutionStart, ExecutionSuccess, Message, Preview
from gateway.dispatch.instance import Instance
from gateway.dispatch.writer import LeaseLost
from gateway.errors import InstanceError, InstanceUnreachable, PromptRejected
from gateway.settings import Settings

T = TypeVar("T")

log = logging.getLogger(__name__)

STOP_POLL_S = 0.25


class GoneFromInstance(Exception):
    """The instance neither runs, keeps nor remembers the prompt."""


class DeadlinePassed(Exception):
    """The prompt was stopped because its time was up. `code` says which time."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Prompt:
    """Call `follow` once. `stop` may come at any time, from the same loop."""

    def __init__(
        self,
        prompt_id: str,
        graph: bytes,
        sinks: list[str],
        instance: Instance,
        settings: Settings,
        on_message: Callable[[Message | Preview], None],
    ) -> None:
        """`sinks` are the nodes that end the graph: those whose pictures are waited for."""
        self.id = prompt_id
        self._sinks = sinks
        self.instance = instance
        self.stop_wanted = False
        self._graph, self._settings, self._on_message = graph, settings, on_message
        self._news = asyncio.Event()  # the end marker came, or the wish to stop
        self._has_started = False
        self._has_ended = self._is_abandoned = False
        self._has_succeeded = False
        self._outputs: dict[str, dict[str, Any]] = {}  # by node, as heard
        self._client_id = ""
        self.submitted_s: float | None = None  # time.monotonic() when the instance had taken it
        self._last_sign = time.monotonic()

    def stop(self) -> None:
        self.stop_wanted = True
        self._news.set()

    def abandon(self) -> None:
        """Stop waiting: somebody else follows this prompt now."""
        self._is_abandoned = True
        self._news.set()

    async def follow(self, *, resumed: bool, deadline: float) -> HistoryEntry | None:
        """Submit unless the instance has it already, and wait for its end. None: stopped, nothing of it is left.

        `deadline` is a time.monotonic(). Raises GoneFromInstance, InstanceUnreachable, PromptRejected, DeadlinePassed, LeaseLost.
        """
        self.instance.socket.listen(self.id, self._hear)
        try:
            if not resumed:
                if self.stop_wanted:
                    return None
                try:
                    await self._submit()
                except PromptRejected as rejection:
                    if rejection.rest_is_queued:
                        await self._stop_rest(deadline)
                    raise
            elif not await self._is_known():
                if self.stop_wanted:
                    return None
                raise GoneFromInstance
            return await self._wait_for_end(deadline)
        finally:
            self.instance.socket.forget(self.id)
            self.instance.changeover.leave(self.id)

    def _hear(self, message: Message | Preview) -> None:
        self._last_sign = time.monotonic()
        self._on_message(message)
        if isinstance(message, ExecutionStart):
            self._has_started = True
            self.instance.changeover.leave(self.id)
        elif isinstance(message, Executed):
            self._outputs[message.data.node] = message.data.output or {}
            if self._outputs.keys() >= set(self._sinks):
                self.instance.changeover.begin()
        elif isinstance(message, ExecutionSuccess):
            self._has_succeeded = True
        if isinstance(message, Executing) and message.data.node is None:
            self._has_ended = True
            self._news.set()
            self.instance.changeover.begin()

    async def _submit(self) -> None:
        self._client_id = self.instance.socket.client_id
        try:
            await self.instance.client.submit(self.id, self._client_id, self._graph)
            self.submitted_s = time.monotonic()
            if not self._has_started:
                self.instance.changeover.stand_behind(self.id)
        except PromptRejected:
            raise
        except InstanceError:
            # It may have been taken all the same (a 500, a lost answer): only its absence permits another try.
            if not await self._is_known():
                raise GoneFromInstance from None

    async def _stop_rest(self, deadline: float) -> None:
        """A branch of the graph was refused, the others were queued: they must not cost a GPU its time."""
        self.stop_wanted = True
        with suppress(GoneFromInstance, InstanceUnreachable, DeadlinePassed):
            await self._wait_for_end(deadline)

    async def _is_known(self) -> bool:
        client = self.instance.client

        async def look() -> bool:
            return (await client.queue()).holds(self.id) or await client.history(self.id) is not None

        return await self._patiently(look)

    async def _patiently(self, look: Callable[[], Awaitable[T]]) -> T:
        """Ask until the instance answers, `instance_lost_s` at the most; then InstanceUnreachable."""
        deadline, pause_s = time.monotonic() + self._settings.instance_lost_s, 0.1
        while True:
            try:
                async with asyncio.timeout(max(0.05, deadline - time.monotonic())):
                    return await look()
            except (InstanceError, TimeoutError) as error:
                if time.monotonic() > deadline:
                    lost_s = self._settings.instance_lost_s
                    raise InstanceUnreachable(f"{self.instance.id} has not answered for {lost_s:g} s") from error
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 2, 1.0)

    async def _wait_for_end(self, deadline: float) -> HistoryEntry | None:
        """The first of: end marker, history. A stop or a deadline ends the prompt on the instance on the way."""
        passed: DeadlinePassed | None = None
        while True:
            if not self._has_ended:
                await self._wait_for_news(STOP_POLL_S if self.stop_wanted else self._settings.poll_s)
            self._news.clear()
            if self._is_abandoned:
                raise LeaseLost(self.id)
            if passed is None and not self._has_ended:
                passed = self._check_deadlines(deadline)
            if self.stop_wanted and not self._has_ended:
                await self.stop_on_instance()
            elif not self._has_ended and self._heard_lately():
                continue
            if (had_ended := self._has_ended) and self._heard_it_all():
                return HistoryEntry.heard(self._outputs)
            known, entry = await self._patiently(self._look)
            if passed is not None and (not known or (entry is not None and entry.was_interrupted)):
                raise passed
            if entry is not None:
                return entry
            if not known:
                if self.stop_wanted:
                    return None
                raise GoneFromInstance
            # The end marker came but history is not there: keep asking, without hurry. One that came meanwhile is looked into at once.
            self._has_ended = self._has_ended and not had_ended

    async def _wait_for_news(self, most_s: float) -> None:
        # A timer of the loop's is a fifth of asyncio.timeout, and each job waits here.
        timer = asyncio.get_running_loop().call_later(most_s, self._news.set)
        try:
            await self._news.wait()
        finally:
            timer.cancel()

    def _check_deadlines(self, deadline: float) -> DeadlinePassed | None:
        now = time.monotonic()
        passed = None
        if now > deadline:
            passed = DeadlinePassed("timeout", "The job took longer than its timeout_s allows.")
        elif self._hears_it() and now - self._last_sign > self._settings.stall_timeout_s:
            passed = DeadlinePassed("no_progress", f"The instance showed no progress for {self._settings.stall_timeout_s:g} s.")
        if passed is not None:
            self.stop_wanted = True
        return passed

    def _heard_lately(self) -> bool:
        """Its messages come: there is nothing to ask."""
        return self._hears_it() and time.monotonic() - self._last_sign < self._settings.poll_s

    def _hears_it(self) -> bool:
        socket = self.instance.socket
        return socket.is_connected and socket.client_id == self._client_id

    async def _look(self) -> tuple[bool, HistoryEntry | None]:
        """Whether the instance knows the prompt, and how it ended. Queue first: leaving it and entering history is one step."""
        client = self.instance.client
        if self._has_ended and self._heard_it_all():
            # It came while the instance was asked in vain.
            return True, HistoryEntry.heard(self._outputs)
        if self._has_ended:
            entry = await client.history(self.id)
            if entry is not None:
                return True, entry
        queue = await client.queue()
        if self.id in queue.pending:
            # Waiting its turn is no stall.
            self._last_sign = time.monotonic()
        if queue.holds(self.id):
            return True, None
        entry = await client.history(self.id)
        return entry is not None, entry

    def _heard_it_all(self) -> bool:
        """Success, its end, and the pictures of every node that ends the graph, on the one connection it was submitted under.

        Then history could only repeat it. Whatever was dropped or cut on the way is missing here, and history is asked.
        """
        return self._has_succeeded and self._hears_it() and all(self._outputs.get(node, {}).get("images") for node in self._sinks)

    async def stop_on_instance(self) -> None:
        """Out of the queue if it waits; interrupted if it is the one that runs, which is asked first: older ComfyUIs ignore the id."""
        client = self.instance.client
        try:
            queue = await client.queue()
            if self.id in queue.pending:
                await client.drop(self.id)
            elif self.id in queue.running:
                await client.interrupt(self.id)
        except InstanceError as error:
            log.info("stop not delivered", extra={"instance": self.instance.id, "error": error.message})
