"""A dispatcher in the test's own process whose only instance is reached through a proxy that misbehaves.
It runs jobs of one colour and says whether each ended as it should; what goes wrong is the test's business."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp
from PIL import Image

from gateway.admission import Wish
from gateway.auth import LOCAL
from gateway.jobs.events import read_events
from gateway.jobs.model import TERMINAL, EventKind, Job, stream_position
from gateway.runtime import Runtime, open_runtime
from gateway.settings import Settings
from tests.conftest import S3Access
from tests.deployment import WORKFLOWS_DIR
from tests.journeys.faulty_proxy import FaultyProxy

PATIENCE_S = 20.0
SIZE, COLOR = 48, 0x3366CC
# 0.6 s of work: long enough for a fault to come in the middle.
SLOW = {"workflow": "slow", "size": SIZE, "color": COLOR, "steps": 12, "delay_ms": 50}


async def wait_until(holds: Callable[[], Awaitable[bool]]) -> None:
    """TimeoutError after PATIENCE_S: no fault may take a job that long."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            if await holds():
                return
            await asyncio.sleep(0.02)


@dataclass
class Bench:
    """A dispatcher in this process whose only instance is reached through the proxy."""

    runtime: Runtime
    proxy: FaultyProxy
    engine_url: str

    async def submit(self, **changes: Any) -> Job:
        parameters = {**SLOW, **changes}
        job, _ = await self.runtime.admission.admit(Wish(parameters.pop("workflow"), parameters, cache="off"), LOCAL)
        return job

    async def load(self, job: Job) -> Job:
        current = await self.runtime.store.load(job.id)
        assert current is not None
        return current

    async def wait(self, job: Job, holds: Callable[[Job], bool] = lambda job: job.is_terminal) -> Job:
        async def look() -> bool:
            return holds(await self.load(job))

        await wait_until(look)
        return await self.load(job)

    async def wait_step(self, job: Job, step: int) -> Job:
        return await self.wait(job, lambda job: (job.progress.step or 0) >= step)

    async def run(self, **changes: Any) -> Job:
        """Submit and wait for the end; the stream must tell one story whatever the end is."""
        done = await self.wait(await self.submit(**changes))
        await self.check_stream(done)
        return done

    async def check_stream(self, done: Job) -> None:
        events = await read_events(self.runtime.redis, done.id)
        positions = [stream_position(event.id) for event in events]
        assert positions == sorted(set(positions))
        statuses = [json.loads(event.data)["status"] for event in events if event.kind == EventKind.STATUS]
        assert [status for status in statuses if status in TERMINAL] == [done.status]
        assert (events[-1].kind, statuses[-1]) == (EventKind.STATUS, done.status)

    async def check_picture(self, done: Job) -> None:
        """One picture, readable, of the size and colour asked for."""
        assert done.status == "succeeded", done.error
        (output,) = done.outputs
        body = await self.runtime.storage.get(output.key)
        assert len(body) == output.size_bytes
        with Image.open(io.BytesIO(body)) as image:
            image.load()
            assert image.size == (SIZE, SIZE)
            assert image.convert("RGB").getcolors() == [(SIZE * SIZE, (COLOR >> 16, COLOR >> 8 & 255, COLOR & 255))]

    async def count_runs(self, job: Job) -> int:
        """Files that the engine saved for the job, over all attempts."""
        async with aiohttp.ClientSession() as session, session.get(f"{self.engine_url}/history") as answer:
            history = await answer.json()
        return sum(f"{job.id}/image" in json.dumps(entry["prompt"][2]) for entry in history.values())

    async def is_idle(self) -> bool:
        async with aiohttp.ClientSession() as session, session.get(f"{self.engine_url}/queue") as answer:
            queue = await answer.json()
        return not queue["queue_running"] and not queue["queue_pending"]


@asynccontextmanager
async def open_bench(
    redis_url: str, s3: S3Access, engine_url: str, prepare: Callable[[FaultyProxy], object] | None = None, **changes: Any
) -> AsyncIterator[Bench]:
    """`prepare` sees the proxy before the dispatcher does; `changes` are settings."""
    async with FaultyProxy(engine_url).open() as proxy:
        if prepare is not None:
            prepare(proxy)
        values: dict[str, Any] = {
            "redis_url": redis_url,
            "s3_endpoint_url": s3.endpoint_url,
            "s3_bucket": s3.bucket,
            "aws_access_key_id": s3.access_key_id,
            "aws_secret_access_key": s3.secret_access_key,
            "comfyui_urls": (proxy.url,),
            "workflows_dir": WORKFLOWS_DIR,
            "default_base_model": "tinyflux",
            "poll_s": 0.2,
            "lease_s": 1.5,
            "instance_lost_s": 3.0,
            "stall_timeout_s": 8.0,
            "upload_tries": 3,
            **changes,
        }
        async with open_runtime(Settings(**values), dispatch=True) as runtime:
            yield Bench(runtime, proxy, engine_url)
