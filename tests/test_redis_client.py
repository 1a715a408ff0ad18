"""The door to Redis when a connection has died under it, on both event loops that we run on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
import uvloop
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from gateway.redis_client import TIMEOUT_S, RedisClient, connect_reader, connect_redis


async def close_beneath(client: RedisClient) -> None:
    """Close the shared connection's transport, as the peer's death does just before the next command."""
    await client.ping()
    client._line._transport.close()


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


async def ask_side_by_side(client: RedisClient) -> list[object]:
    """What two blocking reads say when the connection under them closes, and a command after that."""
    try:
        await client.ping()
        reads = [asyncio.create_task(client.xread({"absent": "$"}, block=5000)) for _ in range(2)]
        await asyncio.sleep(0.05)
        client._line._transport.close()
        said = await asyncio.gather(*reads, return_exceptions=True)
        return [*(type(one) for one in said), await client.ping()]
    finally:
        await client.aclose()


@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def test_all_who_wait_on_a_connection_learn_of_its_end(redis_url: str, loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
    with asyncio.Runner(loop_factory=loop) as runner:
        assert runner.run(ask_side_by_side(connect_reader(redis_url))) == [RedisConnectionError, RedisConnectionError, True]


async def test_answers_find_their_askers_after_one_was_cancelled_and_one_refused(redis_url: str) -> None:
    client = connect_redis(redis_url)
    try:
        cancelled = asyncio.create_task(client.echo("cancelled"))
        wrong = asyncio.create_task(client.execute_command("CONFIG GET"))
        right = asyncio.create_task(client.echo("right"))
        await asyncio.sleep(0)
        cancelled.cancel()
        with pytest.raises(ResponseError, match="wrong number of arguments"):
            await wrong
        with pytest.raises(TypeError):
            await client.echo(None)
        assert await right == b"right"
        assert await client.echo("last") == b"last"
    finally:
        await client.aclose()


async def test_silence_ends_the_connection_and_the_next_command_has_a_new_one(redis_url: str) -> None:
    client = connect_reader(redis_url, block_s=0.1 - TIMEOUT_S)
    try:
        with pytest.raises(RedisTimeoutError):
            await client.xread({"absent": "$"}, block=5000)
        assert await client.ping()
    finally:
        await client.aclose()
