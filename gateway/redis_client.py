"""Redis as this project uses it: answers are bytes, and its exceptions leave as RedisUnavailable."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from contextlib import suppress
from functools import wraps
from typing import Any, NamedTuple, ParamSpec, TypeAlias, TypeVar, cast

import hiredis
from redis import Redis as SyncRedis
from redis._parsers import BaseParser
from redis.asyncio import ConnectionPool, Redis
from redis.asyncio.client import Pipeline
from redis.asyncio.retry import Retry  # redis.retry's never awaits, so it never sees an error to retry
from redis.backoff import ConstantBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoScriptError, RedisError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError
from rq import Queue, Worker

from gateway.errors import RedisUnavailable

P = ParamSpec("P")
R = TypeVar("R")

# redis-py types each answer as the union of all it could be under other settings; ours are plain bytes.
RedisClient: TypeAlias = Any
FOREIGN = (RedisError, OSError)
TIMEOUT_S = 5.0
# Commands share one connection; pipelines and transactions borrow one of their own. A bound only against a leak.
CONNECTIONS = 200
RETRY_PAUSE_S = 0.05
TRAINING_QUEUE, IMPORT_QUEUE = "training", "imports"
# What a task's process is sent when its worker is told to stop. RQ itself would wait for the task's end, which may be hours away.
HAND_OVER = signal.SIGUSR1


class _TellsOfClosing:
    """A connection whose transport closed under it says so as redis-py's own error, which is retried, translated and survived.

    uvloop raises RuntimeError for a write then, and redis-py lets it through: a request got 500, a loop would have ended its process.
    """

    async def send_packed_command(self, *args: Any, **kwargs: Any) -> None:
        try:
            await super().send_packed_command(*args, **kwargs)  # type: ignore[misc]
        except RuntimeError as error:
            if "closed" not in str(error):
                raise
            await self.disconnect(nowait=True)  # type: ignore[attr-defined]
            raise RedisConnectionError(str(error)) from error


def _open_pool(url: str, **options: Any) -> ConnectionPool:
    pool = ConnectionPool.from_url(url, **options)
    # The URL's scheme has chosen plain, TLS or unix by now.
    pool.connection_class = type("Connection", (_TellsOfClosing, pool.connection_class), {})
    return pool


class _Line(asyncio.Protocol):
    """A connection that all tasks share: commands go down it as they come, and the answers return in their order.

    redis-py lends a connection to one call at a time, for 45-80 µs of CPU a call; here it is 12-40, and calls of one moment share
    a packet. A command that blocks holds up all others.
    """

    _MORE = object()  # the rest of an answer has not come yet

    def __init__(self, connection: Any, timeout_s: float) -> None:
        """Take over a connection of redis-py's that has said hello: it knows of URLs, TLS and passwords."""
        self._connection, self._timeout_s = connection, timeout_s
        self._transport = connection._writer.transport
        self._former = self._transport.get_protocol()
        self._parser = hiredis.Reader(replyError=BaseParser.parse_error, notEnoughData=self._MORE)
        self._waiting: deque[tuple[float, asyncio.Future[Any]]] = deque()
        self._outgoing: list[bytes] = []
        self._clock: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()
        self._transport.set_protocol(self)

    @property
    def is_open(self) -> bool:
        return not self._transport.is_closing()

    def ask(self, *command: Any) -> asyncio.Future[Any]:
        """The answer to come; one that is an error is handed over like any other."""
        packed = hiredis.pack_command(command)
        if not self._outgoing:
            self._loop.call_soon(self._send)
        self._outgoing.append(packed)
        future = self._loop.create_future()
        self._waiting.append((self._loop.time() + self._timeout_s, future))
        if self._clock is None:
            self._clock = self._loop.call_later(self._timeout_s, self._check_deadline)
        return future

    def _send(self) -> None:
        packet, self._outgoing = b"".join(self._outgoing), []
        if self.is_open:
            self._transport.write(packet)

    def data_received(self, data: bytes) -> None:
        self._parser.feed(data)
        while (answer := self._parser.gets()) is not self._MORE:
            if isinstance(answer, hiredis.PushNotification):
                continue
            _, future = self._waiting.popleft()
            if not future.done():
                future.set_result(answer)

    def connection_lost(self, error: Exception | None) -> None:
        self._end(RedisConnectionError, f"Connection lost: {error or 'closed by Redis'}")
        self._former.connection_lost(error)

    def _check_deadline(self) -> None:
        """One timer for the oldest call; most find it answered long ago."""
        self._clock = None
        if not self._waiting:
            return
        left_s = self._waiting[0][0] - self._loop.time()
        if left_s > 0:
            self._clock = self._loop.call_later(left_s, self._check_deadline)
        else:
            # What comes now could not be told apart from answers given up.
            self._end(RedisTimeoutError, f"No answer for {self._timeout_s:g} s")

    def _end(self, kind: type[RedisError], reason: str) -> None:
        self._transport.abort()
        waiting, self._waiting = self._waiting, deque()
        for _, future in waiting:
            if not future.done():
                future.set_exception(kind(reason))

    async def close(self) -> None:
        if self._clock is not None:
            self._clock.cancel()
        await self._connection.disconnect()


class _Answer(NamedTuple):
    """What redis-py reads an answer from."""

    said: Any

    async def read_response(self) -> Any:
        if isinstance(self.said, Exception):
            raise self.said
        return self.said


class _Pipeline(Pipeline):
    """redis-py reads its answers, and so may swallow a cancellation."""

    async def execute(self, raise_on_error: bool = True) -> list[Any]:
        return list(await heed_cancel(super().execute(raise_on_error)))


class _SharedClient(Redis):
    """redis-py's client, its single commands sent down one line. Each is tried `tries` times while connections break."""

    def __init__(self, pool: ConnectionPool, *, tries: int, timeout_s: float) -> None:
        super().__init__(connection_pool=pool)
        self.auto_close_connection_pool = True
        self._tries, self._timeout_s = tries, timeout_s
        self._line: _Line | None = None
        self._opening = asyncio.Lock()

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        name = args[0]
        command = args if " " not in name else (*name.split(), *args[1:])
        try:
            answer = _Answer(await self.ask(*command))
        except ResponseError as error:
            answer = _Answer(error)
        return await self.parse_response(cast(Any, answer), name, **options)

    async def ask(self, *command: Any) -> Any:
        """What Redis answers, as it comes. Raises RedisError."""
        for remaining in range(self._tries - 1, -1, -1):
            try:
                line = self._line if self._line is not None and self._line.is_open else await self._open_line()
                answer = await line.ask(*command)
                if isinstance(answer, Exception):
                    raise answer
                return answer
            except (RedisConnectionError, RedisTimeoutError):
                if remaining == 0:
                    raise
            await asyncio.sleep(RETRY_PAUSE_S)
        raise AssertionError("unreachable: the last try returns or raises")

    def pipeline(self, transaction: bool = True, shard_hint: str | None = None) -> Pipeline:
        return _Pipeline(self.connection_pool, self.response_callbacks, transaction, shard_hint)

    async def _open_line(self) -> _Line:
        """The line, opened by the first of those who miss it."""
        async with self._opening:
            if self._line is None or not self._line.is_open:
                if self._line is not None:
                    await self._line.close()
                await heed_cancel(self._connect())
            return cast(_Line, self._line)

    async def _connect(self) -> None:
        connection = cast(Any, self.connection_pool).make_connection()
        await connection.connect()
        self._line = _Line(connection, self._timeout_s)

    async def aclose(self, close_connection_pool: bool | None = None) -> None:
        if self._line is not None:
            await self._line.close()
        await super().aclose(close_connection_pool)


class Script:
    """A Lua script without keys, called by its hash: for those that every job runs, as redis-py's own goes through six more calls.

    It is no replacement for `register_script`, whose form redis-py's locks rely on.
    """

    def __init__(self, redis: RedisClient, source: str) -> None:
        """`redis` is one of `connect_redis`."""
        self._redis, self._source = redis, source
        self._sha = hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest()

    async def __call__(self, args: Iterable[Any] = ()) -> Any:
        """What the script returns. Raises RedisError."""
        try:
            return await self._redis.ask("EVALSHA", self._sha, 0, *args)
        except NoScriptError:
            return await self._redis.ask("EVAL", self._source, 0, *args)


def connect_redis(url: str) -> RedisClient:
    """A client for commands. One quick retry heals a connection that died while idle; every script bears being sent twice."""
    retry = Retry(ConstantBackoff(RETRY_PAUSE_S), 1)
    pool = _open_pool(url, max_connections=CONNECTIONS, socket_timeout=TIMEOUT_S, retry=retry)
    return _SharedClient(pool, tries=2, timeout_s=TIMEOUT_S)


def connect_reader(url: str, block_s: float = 2.0) -> RedisClient:
    """A client for one task that reads and blocks for `block_s`: its socket may stay silent for that long, but not for ever."""
    pool = _open_pool(url, socket_timeout=block_s + TIMEOUT_S, socket_connect_timeout=TIMEOUT_S)
    return _SharedClient(pool, tries=1, timeout_s=block_s + TIMEOUT_S)


async def heed_cancel(call: Awaitable[R]) -> R:
    """Await a call of redis-py's; a cancellation that came meanwhile is never lost.

    With a socket timeout redis-py 8.1 was seen to swallow one that arrives together with the answer: loops then ran on for ever.
    """
    task = asyncio.current_task()
    before = task.cancelling() if task else 0
    result = await call
    if task is not None and task.cancelling() > before:
        raise asyncio.CancelledError
    return result


def translate_redis(function: Callable[P, Coroutine[Any, Any, R]]) -> Callable[P, Coroutine[Any, Any, R]]:
    """Redis's own exceptions leave as RedisUnavailable, chained."""

    @wraps(function)
    async def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return await function(*args, **kwargs)
        except FOREIGN as error:
            raise RedisUnavailable(f"Redis did not answer: {error}") from error

    return wrapped


def read_memory(info: Mapping[str, Any]) -> tuple[int, int]:
    """(bytes used, bytes there are) by Redis's own word; 0 where a managed Redis does not say."""
    limit = int(info.get("maxmemory", 0)) or int(info.get("total_system_memory", 0))
    return int(info.get("used_memory", 0)), limit


async def read_index(redis: RedisClient, index: str, before: tuple[int, str] | None, limit: int) -> list[tuple[int, str]]:
    """The newest members of a sorted set older than `before` = (score, member), as such pairs."""
    highest, offset, found = "+inf" if before is None else before[0], 0, list[tuple[int, str]]()
    # Members of one score: those already seen come again and are passed over.
    while len(found) < limit:
        entries = await redis.zrevrangebyscore(index, highest, "-inf", offset, limit, withscores=True)
        pairs = [(int(score), member.decode()) for member, score in entries]
        found += [pair for pair in pairs if before is None or pair < before]
        offset += len(entries)
        if len(entries) < limit:
            break
    return found[:limit]


def enqueue_task(url: str, queue_name: str, task: str, job_id: str, timeout_s: int) -> None:
    """Put a call of `task(job_id)` into RQ's queue unless it waits there already. Blocks; raises RedisUnavailable."""
    try:
        with SyncRedis.from_url(url, socket_timeout=TIMEOUT_S, socket_connect_timeout=TIMEOUT_S) as connection:
            queue = Queue(queue_name, connection=connection)
            if job_id not in queue.job_ids:
                queue.enqueue(task, job_id, job_id=job_id, job_timeout=timeout_s, result_ttl=3600, failure_ttl=3600)
    except FOREIGN as error:
        raise RedisUnavailable(f"Redis did not answer: {error}") from error


class _Worker(Worker):
    """Tells the task's process when it is told to stop, and then waits for it as RQ does."""

    def handle_warm_shutdown_request(self) -> None:
        if self.horse_pid:
            with suppress(ProcessLookupError):
                os.kill(self.horse_pid, HAND_OVER)


def work_on(url: str, queue_name: str) -> None:
    """RQ's worker on one queue, until it is told to stop: each task in a process of its own."""
    # A task that does not listen yet is not killed by it.
    signal.signal(HAND_OVER, signal.SIG_IGN)
    with SyncRedis.from_url(url) as connection:
        _Worker([Queue(queue_name, connection=connection)], connection=connection).work(logging_level="WARNING")
