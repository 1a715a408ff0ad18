"""Following a job over as many connections as it takes: where one is, which way the events come, when to give up.
It decides and opens nothing; the clients ask it what to do next."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from fluxgate.asking import Ask, kind_of, path_of
from fluxgate.errors import ApiError, FluxgateError, Silent, Unreachable
from fluxgate.retries import FIRST_PAUSE_S, LONGEST_PAUSE_S, is_passing
from fluxgate.wire import Event

# How events come. Some proxies and tunnels hold a GET's body back until it is whole, some any body: each way is for what
# stops the one before it.
Way = Literal["get", "post", "poll"]
WAYS: tuple[Way, ...] = ("get", "post", "poll")
# The gateway comments every 15 s on a quiet stream: three of them missing mean a dead connection.
STREAM_SILENCE_S = 45.0
# It says how the job stands at once: a way on which even that does not come is held back.
FIRST_EVENT_S = 5.0
# Below the least time after which tunnels cut a request that is not answered.
POLL_S = 20


@dataclass
class Following:
    """One follower of one job. `way` is what to begin with, and what was found to work in the end."""

    url: str
    job_id: str
    last_id: str = ""
    previews: bool = False
    give_up_s: float = 60.0
    way: Way = "get"
    first_event_s: float = FIRST_EVENT_S
    clock: Callable[[], float] = time.monotonic
    pause_s: float = field(default=0.0, init=False)
    has_ended: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self._next_pause_s = FIRST_PAUSE_S
        self._deadline = self.clock() + self.give_up_s
        self._is_proven = False  # an event came this way
        self._is_heard = self._saw_end = False  # on this connection

    def ask(self) -> Ask:
        """The next connection, behind the last event seen."""
        self._is_heard = self._saw_end = False
        path = path_of(kind_of(self.job_id), self.job_id, "events")
        if self.way == "poll":
            return Ask("GET", path, query={"wait": POLL_S, "after": self.last_id or "0"}, timeout_s=POLL_S + STREAM_SILENCE_S)
        headers = {"Accept": "text/event-stream", **({"Last-Event-ID": self.last_id} if self.last_id else {})}
        silence_s = STREAM_SILENCE_S if self._is_proven else self.first_event_s
        return Ask(self.way.upper(), path, query={"previews": "1"} if self.previews else {}, headers=headers, timeout_s=silence_s)

    def take(self, event: Event) -> bool:
        """Whether the event is for the caller; the others are between the gateway and us."""
        self._is_heard = self._is_proven = True
        self._next_pause_s, self._deadline = FIRST_PAUSE_S, self.clock() + self.give_up_s
        self.last_id = event.id or self.last_id
        self._saw_end = self._saw_end or event.is_end or event.kind == "ended"
        return event.kind not in ("reconnect", "ended")

    def is_last(self, event: Event) -> bool:
        """Whether nothing worth waiting for follows on this connection. A job that has ended is shown first, then its history."""
        return event.kind in ("reconnect", "ended") or (event.is_end and bool(event.id))

    def lose(self, error: FluxgateError | None) -> None:
        """The connection is over; `pause_s` says when to open the next. Raises what ended it when there is no sense in another."""
        if error is None and self._saw_end:
            self.has_ended = True
            return
        if isinstance(error, ApiError) and not is_passing(error):
            raise error
        self.pause_s = self._next_pause_s
        if isinstance(error, Silent):
            # Heard and then quiet: the gateway's comments keep coming on a longer breath.
            self.pause_s = 0.0
            if not self._is_heard:
                self.way, self._is_proven = WAYS[min(WAYS.index(self.way) + 1, len(WAYS) - 1)], False
        elif error is None and self._is_heard:
            self.pause_s = 0.0 if self.way == "poll" else self.pause_s
        if self.clock() + self.pause_s > self._deadline:
            raise error or Unreachable(self.url, f"the stream of {self.job_id} keeps ending early")
        if self.pause_s:
            self._next_pause_s = min(self._next_pause_s * 2, LONGEST_PAUSE_S)
