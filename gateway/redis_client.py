"""Redis as this project uses it: answers are bytes, and its exceptions leave as RedisUnavailable."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from functools import wraps
from typing import Any, ParamSpec, TypeAlias, TypeVar

from redis import Redis as SyncRedis
from redis.asyncio import ConnectionPool, Redis
from redis.asyncio.retry import Retry  # redis.retry's never awaits, so it never sees an error to retry
from redis.backoff import ConstantBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError
from rq import Queue, Worker

from gateway.errors import RedisUnavailable

P = ParamSpec("P")
R = TypeVar("R")

# redis-py types each answer as the union of all it could be under other settings; ours are plain bytes.
RedisClient: TypeAlias = Any
FOREIGN = (RedisError, OSError)
TIMEOUT_S = 5.0
# As many as there are calls at one time; a bound only against a leak.
CONNECTIONS = 2000
TRAINING_QUEUE, IMPORT_QUEUE = "training", "imports"


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


def connect_redis(url: str) -> RedisClient:
    """A client for commands. One quick retry heals a connection that died while idle; every script bears being sent twice."""
    retry = Retry(ConstantBackoff(0.05), 1)
    return Redis.from_pool(_open_pool(url, max_connections=CONNECTIONS, socket_timeout=TIMEOUT_S, retry=retry))


def connect_reader(url: str, block_s: float = 2.0) -> RedisClient:
    """A client for reads that block for `block_s`: its socket may stay silent for that long, but not for ever."""
    return Redis.from_pool(_open_pool(url, socket_timeout=block_s + TIMEOUT_S, socket_connect_timeout=TIMEOUT_S))


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
            return await heed_cancel(function(*args, **kwargs))
        except FOREIGN as error:
            raise RedisUnavailable(f"Redis did not answer: {error}") from error

    return wrapped


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


def work_on(url: str, queue_name: str) -> None:
    """RQ's worker on one queue, until it is told to stop: each task in a process of its own."""
    with SyncRedis.from_url(url) as connection:
        Worker([Queue(queue_name, connection=connection)], connection=connection).work(logging_level="WARNING")
