"""The version of the state: written at the first start, migrated by one process, and refused where it is newer than the program."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gateway.redis_client import RedisClient, connect_redis
from gateway.state_version import MIGRATIONS, STATE_VERSION, StateRefused, prepare_state, prepare_state_at, read_version
from local.up import StartRefused, run, stamp_state

NEWER = STATE_VERSION + 41


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[RedisClient]:
    client = connect_redis(redis_url)
    yield client
    # Others start gateways on this Redis.
    await client.flushall()
    await client.aclose(close_connection_pool=True)


async def test_a_first_start_writes_the_version_down(redis: RedisClient, redis_url: str) -> None:
    await prepare_state_at(redis_url)
    assert await read_version(redis) == STATE_VERSION
    assert await redis.keys("*") == [b"fluxgate:state_version"], "the lock is let go"


async def test_state_from_before_the_number_is_taken_over(redis: RedisClient) -> None:
    """LoRAs get the owner that was not written down then, where it is still known."""
    before: dict[str, dict[str, object]] = {
        "a": {"name": "a", "training": "trn_1"},
        "gone": {"name": "gone", "training": "trn_2"},
        "found": {"name": "found", "training": None},
        "mine": {"name": "mine", "training": "trn_1", "owner": "hf:me", "shared": False},
    }
    await redis.hset("fluxgate:published", mapping={name: json.dumps(lora) for name, lora in before.items()})
    await redis.hset("fluxgate:job:trn_1", "spec", json.dumps({"caller": "key_abc"}))
    await prepare_state(redis)
    assert await read_version(redis) == STATE_VERSION
    after = {name.decode(): json.loads(raw) for name, raw in (await redis.hgetall("fluxgate:published")).items()}
    assert after == {**before, "a": {**before["a"], "owner": "key_abc", "shared": True}}


async def test_each_step_is_taken_once_whoever_starts_at_the_same_time(redis: RedisClient, redis_url: str) -> None:
    async def append(connection: RedisClient) -> None:
        seen = await connection.llen("steps")
        await asyncio.sleep(0.05)
        await connection.rpush("steps", seen)

    others = [connect_redis(redis_url) for _ in range(6)]
    await redis.set("fluxgate:state_version", 1)
    await asyncio.gather(*(prepare_state(other, (*MIGRATIONS, append, append)) for other in others))
    assert await redis.lrange("steps", 0, -1) == [b"0", b"1"]
    assert await read_version(redis) == 3
    for other in others:
        await other.aclose(close_connection_pool=True)


async def test_after_a_crash_the_steps_that_were_done_are_not_done_again(redis: RedisClient) -> None:
    async def count(connection: RedisClient) -> None:
        await connection.incr("counted")

    async def crash(connection: RedisClient) -> None:
        if await connection.incr("tries") == 1:
            raise RuntimeError("the power went")

    with pytest.raises(RuntimeError):
        await prepare_state(redis, (*MIGRATIONS, count, crash))
    assert await read_version(redis) == 2
    await prepare_state(redis, (*MIGRATIONS, count, crash))
    assert (await redis.get("counted"), await redis.get("tries"), await read_version(redis)) == (b"1", b"2", 3)


async def test_what_is_no_version_is_refused(redis: RedisClient) -> None:
    await redis.set("fluxgate:state_version", "v2-beta")
    with pytest.raises(StateRefused, match="no version"):
        await prepare_state(redis)


async def test_every_process_refuses_a_newer_state_with_one_line(redis: RedisClient, redis_url: str, tmp_path: Path) -> None:
    await redis.set("fluxgate:state_version", NEWER)
    await asyncio.to_thread(start_and_read, redis_url, tmp_path)
    assert await read_version(redis) == NEWER, "nothing is changed in a state that is refused"


def start_and_read(redis_url: str, tmp_path: Path) -> None:
    env = {**os.environ, "REDIS_URL": redis_url, "PORT": "0", "TRAINING_DIR": str(tmp_path), "TRAINER": "tiny"}
    modules = ("gateway", "gateway.dispatch", "trainer_worker")
    started = {
        module: subprocess.Popen([sys.executable, "-m", module], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for module in modules
    }
    for module, process in started.items():
        said, complained = process.communicate(timeout=60)
        assert process.returncode == 2, (module, said, complained)
        lines = [line for line in complained.splitlines() if not line.startswith("{")]
        assert lines == [
            f"fluxgate: The state in Redis has version {NEWER}; this program knows versions up to {STATE_VERSION}. "
            "Start the newer program that wrote it, or restore a backup from before the upgrade."
        ], module


def test_a_state_folder_carries_the_version_too(tmp_path: Path) -> None:
    stamp_state(tmp_path)
    assert (tmp_path / "version").read_text() == f"{STATE_VERSION}\n"
    stamp_state(tmp_path)
    (tmp_path / "version").write_text(f"{NEWER}\n")
    with pytest.raises(StartRefused, match=f"has version {NEWER}; this program knows versions up to {STATE_VERSION}"):
        run({"STATE_DIR": str(tmp_path)})
    (tmp_path / "version").write_text("garbage")
    with pytest.raises(StartRefused, match="no version"):
        run({"STATE_DIR": str(tmp_path)})
