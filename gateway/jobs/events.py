"""The event streams in Redis: reading one job's past, and one reader a process that fans the live feed out to all who listen."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager

from gateway.errors import RedisUnavailable
from gateway.jobs.model import Event, EventKind
from gateway.redis_client import FOREIGN, RedisClient, heed_cancel, translate_redis

log = logging.getLogger(__name__)

Observer = Callable[[str, str, str, bytes], None]  # job id, kind, status, data

FEED = "fluxgate:feed"
BLOCK_MS = 2000
RETRY_S = 1.0
# A listener that falls this far behind is told so and reads the stream itself; nobody waits for it.
BACKLOG = 1000
PAGE = 1000


@translate_redis
async def read_events(redis: RedisClient, job_id: str, after: str = "0", limit: int = 1000) -> list[Event]:
    """The kept events of a job after the given id, oldest first, at most `limit`."""
    start = "-" if after in ("", "0") else f"({after}"
    entries = await redis.xrange(f"fluxgate:events:{job_id}", min=start, max="+", count=limit)
    return [Event(entry_id.decode(), fields[b"k"].decode(), fields[b"d"], fields[b"s"].decode()) for entry_id, fields in entries]


class Subscription:
    """What one listener has not read yet. `behind` is set when something was dropped: read the stream from your last id."""

    __slots__ = ("_latest_preview", "_ready", "_waiting", "behind", "previews")

    def __init__(self, previews: bool = False) -> None:
        self._waiting: deque[Event] = deque()
        self._latest_preview: Event | None = None
        self._ready = asyncio.Event()
        self.behind = False
        self.previews = previews

    def offer(self, event: Event) -> None:
        if event.kind == EventKind.PREVIEW:
            if not self.previews:
                return
            self._latest_preview = event
        elif len(self._waiting) >= BACKLOG:
            self.fall_behind()
        else:
            self._waiting.append(event)
        self._ready.set()

    def wake(self) -> None:
        self._ready.set()

    def fall_behind(self) -> None:
        self._waiting.clear()
        self.behind = True
        self._ready.set()

    async def wait(self, timeout_s: float) -> bool:
        """True when there is something to take, False when `timeout_s` passed first."""
        if self._ready.is_set():
            return True
        try:
            async with asyncio.timeout(timeout_s):
                await self._ready.wait()
        except TimeoutError:
            return False
        return True

    def take(self) -> list[Event]:
        """Everything that waits, the newest preview last."""
        self._ready.clear()
        events = list(self._waiting)
        self._waiting.clear()
        if self._latest_preview is not None:
            events.append(self._latest_preview)
            self._latest_preview = None
        return events


class EventFeed:
    """The one reader of the live feed in this process."""

    def __init__(self, redis: RedisClient) -> None:
        self._redis = redis
        self._subscriptions: dict[str, set[Subscription]] = {}
        self._observers: list[Observer] = []
        self._position = "$"
        self.closed = False

    def observe(self, observer: Observer) -> None:
        """`observer(job_id, kind, status, data)` is called for every event of every job; it must not block."""
        self._observers.append(observer)

    @contextmanager
    def subscribe(self, job_id: str, *, previews: bool = False) -> Iterator[Subscription]:
        """Listen to one job from now on."""
        subscription = Subscription(previews)
        self._subscriptions.setdefault(job_id, set()).add(subscription)
        try:
            yield subscription
        finally:
            listeners = self._subscriptions[job_id]
            listeners.discard(subscription)
            if not listeners:
                del self._subscriptions[job_id]

    @translate_redis
    async def open(self) -> None:
        """Fix the place to read from, so that nothing written after this call is missed. Raises RedisUnavailable."""
        newest = await self._redis.xrevrange(FEED, count=1)
        self._position = newest[0][0].decode() if newest else "0"

    def close(self) -> None:
        """This process is going away: every `follow` ends, so that its client can come back to another one."""
        self.closed = True
        for listeners in self._subscriptions.values():
            for listener in listeners:
                listener.wake()

    async def run(self) -> None:
        """Read for ever. When Redis was away every listener is told to catch up from its own stream."""
        pause_s = 0.05
        while True:
            try:
                answer = await heed_cancel(self._redis.xread({FEED: self._position}, count=1000, block=BLOCK_MS))
                pause_s = 0.05
            except FOREIGN as error:
                log.warning("feed interrupted", extra={"error": str(error)})
                self._tell_all_behind()
                await asyncio.sleep(pause_s)
                pause_s = min(pause_s * 2, 2.0)
                continue
            for _, entries in answer or []:
                self._deliver(entries)

    def _deliver(self, entries: list[tuple[bytes, dict[bytes, bytes]]]) -> None:
        for entry_id, fields in entries:
            job_id, kind = fields[b"j"].decode(), fields[b"k"].decode()
            # `wake` is between dispatchers only: a job that followed its twin stands in line itself now.
            for observer in self._observers:
                observer(job_id, kind, fields[b"s"].decode(), fields[b"d"])
            listeners = self._subscriptions.get(job_id)
            if listeners and kind != "wake":
                event = Event(entry_id.decode(), kind, fields[b"d"], fields[b"s"].decode())
                for listener in listeners:
                    listener.offer(event)
        self._position = entries[-1][0].decode()

    def _tell_all_behind(self) -> None:
        for listeners in self._subscriptions.values():
            for listener in listeners:
                listener.fall_behind()

    async def follow(self, job_id: str, after: str = "0", *, previews: bool = False, idle_s: float = 15.0) -> AsyncIterator[Event | None]:
        """Every kept event after `after`, then the live ones, each once and in order; None whenever `idle_s` passed in silence.

        Ends by itself only when the feed is closed: the listener knows which event is the last one. While Redis is away it waits.
        """
        with self.subscribe(job_id, previews=previews) as subscription:
            last = after
            subscription.behind = True
            while not self.closed:
                if subscription.behind:
                    subscription.behind = False
                    try:
                        more = True
                        while more:
                            events = await read_events(self._redis, job_id, last, limit=PAGE)
                            more = len(events) == PAGE
                            for event in events:
                                last = event.id
                                yield event
                    except RedisUnavailable:
                        subscription.behind = True
                        await asyncio.sleep(RETRY_S)
                        yield None
                        continue
                for event in subscription.take():
                    if event.kind == EventKind.PREVIEW:
                        yield event
                    elif not subscription.behind and event.is_after(last):
                        last = event.id
                        yield event
                if not subscription.behind and not self.closed and not await subscription.wait(idle_s):
                    yield None


class Throttle:
    """Progress for one client: a burst passes whole, a flood is thinned to `rate_per_s`, the newest always being the one kept."""

    def __init__(self, rate_per_s: float = 10.0, burst: int = 100, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate, self._burst, self._clock = rate_per_s, burst, clock
        self._tokens, self._filled_at = float(burst), clock()
        self._held: Event | None = None

    def pass_on(self, event: Event | None) -> list[Event]:
        """What to send now that `event` came; None asks for what was held back."""
        if event is not None and event.kind == EventKind.PROGRESS:
            now = self._clock()
            self._tokens = min(self._burst, self._tokens + (now - self._filled_at) * self._rate)
            self._filled_at = now
            if self._tokens < 1:
                self._held = event
                return []
            self._tokens -= 1
            self._held = None
            return [event]
        held, self._held = self._held, None
        return [one for one in (held, event) if one is not None]
