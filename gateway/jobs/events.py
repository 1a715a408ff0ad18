"""The event streams in Redis: reading one job's past, and one reader a process that fans the live feed out to all who listen."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing, contextmanager, suppress

from gateway.errors import RedisUnavailable
from gateway.jobs.model import TERMINAL, Event, EventKind
from gateway.redis_client import FOREIGN, RedisClient, translate_redis

log = logging.getLogger(__name__)

Observer = Callable[[str, str, str, bytes], None]  # job id, kind, status, data

FEED = "fluxgate:feed"
FEED_LENGTH = 50_000  # as in lua/_prelude.lua
# Said between processes alone: a job that followed its twin stands in line itself now; somebody looks at a job's previews.
WAKE, PREVIEWS_ASKED = "wake", "previews_asked"
ASK_AGAIN_S = 10.0
BLOCK_MS = 2000
RETRY_S = 1.0
# A listener that falls this far behind is told so and reads the stream itself; nobody waits for it.
BACKLOG = 1000
PAGE = 1000
# Ends that are told before whoever made the job listens: all of a moment, and many more.
REMEMBERED = 1000


@translate_redis
async def read_events(redis: RedisClient, job_id: str, after: str = "0", limit: int = 1000) -> list[Event]:
    """The kept events of a job after the given id, oldest first, at most `limit`."""
    start = "-" if after in ("", "0") else f"({after}"
    entries = await redis.xrange(f"fluxgate:events:{job_id}", min=start, max="+", count=limit)
    return [Event(entry_id.decode(), fields[b"k"].decode(), fields[b"d"], fields[b"s"].decode()) for entry_id, fields in entries]


@translate_redis
async def newest_event_id(redis: RedisClient, job_id: str) -> str:
    """Where a job's stream ends now, to go on from; "0" when it has none."""
    newest = await redis.xrevrange(f"fluxgate:events:{job_id}", count=1)
    return newest[0][0].decode() if newest else "0"


class Subscription:
    """What one listener has not read yet. `behind` is set when something was dropped: read the stream from your last id.

    There may be thousands: nothing is kept for one that has read everything, and waiting costs one future and one timer.
    """

    __slots__ = ("_latest_preview", "_waiter", "_waiting", "behind", "previews")

    def __init__(self, previews: bool = False) -> None:
        self._waiting: list[Event] = []
        self._latest_preview: Event | None = None
        self._waiter: asyncio.Future[None] | None = None
        self.behind = False
        self.previews = previews

    def offer(self, event: Event) -> None:
        if event.kind == EventKind.PREVIEW:
            if not self.previews:
                return
            self._latest_preview = event
        elif len(self._waiting) >= BACKLOG:
            self._waiting = []
            self.behind = True
        else:
            self._waiting.append(event)
        self.wake()

    def wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def fall_behind(self) -> None:
        self._waiting = []
        self.behind = True
        self.wake()

    async def wait(self, timeout_s: float) -> bool:
        """True when there is something to take, False when `timeout_s` passed first."""
        if self._has_news():
            return True
        loop = asyncio.get_running_loop()
        self._waiter = loop.create_future()
        timer = loop.call_later(timeout_s, self.wake)
        try:
            await self._waiter
        finally:
            timer.cancel()
            self._waiter = None
        return self._has_news()

    def _has_news(self) -> bool:
        return bool(self._waiting) or self.behind or self._latest_preview is not None

    def take(self) -> list[Event]:
        """Everything that waits, the newest preview last."""
        events, self._waiting = self._waiting, []
        if self._latest_preview is not None:
            events.append(self._latest_preview)
            self._latest_preview = None
        return events


class EventFeed:
    """The one reader of the live feed in this process."""

    def __init__(self, redis: RedisClient, reader: RedisClient) -> None:
        """`reader` is the feed's alone: whoever asks anything else on it waits for as long as the feed is silent."""
        self._redis, self._reader = redis, reader
        self._subscriptions: dict[str, set[Subscription]] = {}
        self._observers: list[Observer] = []
        self._ended: OrderedDict[str, None] = OrderedDict()
        self._position = "$"
        self._ask_due = 0.0
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

    def has_told_end(self, job_id: str) -> bool:
        """Whether this is one of the newest jobs to have ended: who subscribes now has missed that."""
        return job_id in self._ended

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
                await self._ask_again()
                # As Redis writes it: redis-py would make a dict of each entry first.
                answer = await self._reader.ask("XREAD", "COUNT", 1000, "BLOCK", BLOCK_MS, "STREAMS", FEED, self._position)
                pause_s = 0.05
            except FOREIGN as error:
                log.warning("feed interrupted", extra={"error": str(error)})
                self._tell_all_behind()
                await asyncio.sleep(pause_s)
                pause_s = min(pause_s * 2, 2.0)
                continue
            for _, entries in answer.items() if isinstance(answer, dict) else answer or ():
                self._deliver(entries)

    async def ask_for_previews(self, *job_ids: str) -> None:
        """Dispatchers send previews of these jobs for a while. Asked again for as long as somebody is subscribed to them."""
        for job_id in job_ids:
            fields = {"j": job_id, "k": PREVIEWS_ASKED, "s": "", "d": ""}
            await self._redis.xadd(FEED, fields, maxlen=FEED_LENGTH, approximate=True)

    async def _ask_again(self) -> None:
        if time.monotonic() >= self._ask_due:
            self._ask_due = time.monotonic() + ASK_AGAIN_S
            await self.ask_for_previews(*(job_id for job_id, all_ in self._subscriptions.items() if any(one.previews for one in all_)))

    def _deliver(self, entries: list[tuple[bytes, list[bytes]]]) -> None:
        for entry_id, (_, raw_id, _, raw_kind, _, raw_status, _, data) in entries:
            job_id, kind, status = raw_id.decode(), raw_kind.decode(), raw_status.decode()
            for observer in self._observers:
                observer(job_id, kind, status, data)
            if kind == EventKind.STATUS and status in TERMINAL:
                self._remember_end(job_id)
            listeners = self._subscriptions.get(job_id)
            if listeners and kind not in (WAKE, PREVIEWS_ASKED):
                event = Event(entry_id.decode(), kind, data, status)
                for listener in listeners:
                    listener.offer(event)
        self._position = entries[-1][0].decode()

    def _remember_end(self, job_id: str) -> None:
        self._ended[job_id] = None
        if len(self._ended) > REMEMBERED:
            self._ended.popitem(last=False)

    def _tell_all_behind(self) -> None:
        for listeners in self._subscriptions.values():
            for listener in listeners:
                listener.fall_behind()

    async def follow(
        self, job_id: str, after: str = "0", *, previews: bool = False, idle_s: float = 15.0
    ) -> AsyncGenerator[Event | None, None]:
        """Every kept event after `after`, then the live ones, each once and in order; None whenever `idle_s` passed in silence.

        Ends by itself only when the feed is closed: the listener knows which event is the last one. While Redis is away it waits.
        """
        async with aclosing(self.follow_batches(job_id, after, previews=previews, idle_s=idle_s)) as batches:
            async for batch in batches:
                for event in batch or (None,):
                    yield event

    async def follow_batches(
        self, job_id: str, after: str = "0", *, previews: bool = False, idle_s: float = 15.0, throttle: Throttle | None = None
    ) -> AsyncGenerator[list[Event], None]:
        """The same, with all that has come at once; an empty list is silence. A throttle thins progress, also of what is read again."""
        throttle = throttle or Throttle(rate_per_s=math.inf)
        with self.subscribe(job_id, previews=previews) as subscription:
            last, subscription.behind, is_joining = after, True, True
            if previews:
                with suppress(*FOREIGN):
                    await self.ask_for_previews(job_id)
            while not self.closed:
                if subscription.behind:
                    subscription.behind = False
                    try:
                        came, is_joining = await read_events(self._redis, job_id, last, limit=PAGE), True
                    except RedisUnavailable:
                        subscription.behind = True
                        await asyncio.sleep(RETRY_S)
                        yield []
                        continue
                    # More may lie there. What comes live meanwhile is told apart by its id.
                    subscription.behind |= len(came) == PAGE
                    last = came[-1].id if came else last
                else:
                    came = subscription.take()
                    if is_joining:
                        came = [event for event in came if event.kind == EventKind.PREVIEW or event.is_after(last)]
                    if kept := [event for event in came if event.kind != EventKind.PREVIEW]:
                        # The feed has an order: after one that is new all are.
                        last, is_joining = kept[-1].id, False
                if batch := throttle.thin(came):
                    yield batch
                pause_s = throttle.due_s
                if not await subscription.wait(idle_s if pause_s is None else pause_s) and pause_s is None and not self.closed:
                    yield []


async def next_events(redis: RedisClient, feed: EventFeed, job_id: str, after: str, wait_s: float) -> list[Event]:
    """The kept events after `after`: at once when there are some, else those that come first within `wait_s`; at most a page."""
    events = await read_events(redis, job_id, after, limit=PAGE)
    if events or not wait_s:
        return events
    async with aclosing(feed.follow(job_id, after, idle_s=wait_s)) as coming:
        async for event in coming:
            # Whatever came with it is read together with it.
            return await read_events(redis, job_id, after, limit=PAGE) if event else []
    return []


class Throttle:
    """Progress for one client: a burst passes whole, a flood is thinned to `rate_per_s`, the newest always being the one kept."""

    __slots__ = ("_burst", "_clock", "_filled_at", "_held", "_rate", "_tokens")

    def __init__(self, rate_per_s: float = 10.0, burst: int = 100, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate, self._burst, self._clock = rate_per_s, burst, clock
        self._tokens, self._filled_at = float(burst), clock()
        self._held: Event | None = None

    @property
    def due_s(self) -> float | None:
        """Seconds until what is held back may go; None when nothing is."""
        return None if self._held is None else max(0.001, (1 - self._tokens) / self._rate)

    def thin(self, events: list[Event]) -> list[Event]:
        """What to send now that these came, in order. None of them: what was held back, if it may go."""
        passed: list[Event] = []
        for event in events:
            if event.kind != EventKind.PROGRESS:
                # What is no progress stands behind the newest step that came before it.
                passed += [event] if self._held is None else [self._held, event]
                self._held = None
            elif self._take_token():
                passed.append(event)
                self._held = None
            else:
                self._held = event
        if self._held is not None and self._take_token():
            passed.append(self._held)
            self._held = None
        return passed

    def _take_token(self) -> bool:
        if self._rate == math.inf:
            return True
        now = self._clock()
        self._tokens = min(self._burst, self._tokens + (now - self._filled_at) * self._rate)
        self._filled_at = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True
