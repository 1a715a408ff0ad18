"""The door to Redis when a connection has died under it, on both event loops that we run on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
import uvloop
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError

from gateway.redis_client import RedisClient, connect_reader, connect_redis


async def close_beneath(client: RedisClient) -> None:
    """Close the one idle connection's transport, as the peer's death does just before the next command."""
    await client.ping()
    (connection,) = client.connection_pool._available_connections
    connection._writer.transport.close()


async def ask_after_closing(client: RedisClient) -> list[object]:
    """What two commands say after that: an answer, or the class of redis-py's error."""
    said: list[object] = []
    try:
        await close_beneath(client)
        for _ in range(2):
            try:
                said.append(await client.ping())
            except RedisError as error:
                said.append(type(error))
        return said
    finally:
        await client.aclose()


@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def test_a_command_on_a_connection_that_closed_is_sent_again(redis_url: str, loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
    with asyncio.Runner(loop_factory=loop) as runner:
        assert runner.run(ask_after_closing(connect_redis(redis_url))) == [True, True]


@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def test_a_reader_learns_of_it_and_may_go_on(redis_url: str, loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
    with asyncio.Runner(loop_factory=loop) as runner:
        assert runner.run(ask_after_closing(connect_reader(redis_url))) == [RedisConnectionError, True]
