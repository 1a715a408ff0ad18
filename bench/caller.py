"""A caller of the gateway, as an application would be one: posts, waits or follows the stream, reads the picture by its URL."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
from PIL import Image

TERMINAL = ("succeeded", "failed", "canceled", "expired")


class BenchFailure(Exception):
    """What was measured is not what was asked for; its time means nothing."""


class Caller:
    """Any number of calls may run at once. With a `key` each request carries it, and each submission an idempotency key."""

    def __init__(self, url: str, session: aiohttp.ClientSession, key: str | None = None) -> None:
        self._url, self._session = url, session
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}

    async def submit(self, body: dict[str, Any], headers: dict[str, str] | None = None) -> dict[str, Any]:
        """POST a generation; the job as answered."""
        headers = {**(headers or {}), **self._headers, **({"Idempotency-Key": uuid.uuid4().hex} if self._headers else {})}
        async with self._session.post(f"{self._url}/v1/generations", json=body, headers=headers) as response:
            raw = await response.read()
            if response.status not in (200, 202):
                raise BenchFailure(f"the gateway answered {response.status}: {raw[:300]!r}")
        job: dict[str, Any] = json.loads(raw)
        return job

    async def make_waiting(self, body: dict[str, Any]) -> dict[str, Any]:
        """One request that answers when the picture is there."""
        return _require_success(await self.submit(body, {"Prefer": "wait=60"}))

    async def make_streaming(self, body: dict[str, Any]) -> dict[str, Any]:
        """POST, then the event stream until the terminal status."""
        return await self.follow_to_success(await self.submit(body))

    async def follow_to_success(self, job: dict[str, Any]) -> dict[str, Any]:
        """The job as its stream last told it; BenchFailure when it did not succeed."""
        return _require_success(await self.follow(job))

    async def follow(self, job: dict[str, Any]) -> dict[str, Any]:
        """The job as its stream last told it."""
        kind = b""
        timeout = aiohttp.ClientTimeout(total=300)
        async with self._session.get(job["urls"]["events"], headers=self._headers, timeout=timeout) as response:
            async for line in response.content:
                if line.startswith(b"event: "):
                    kind = line[7:].strip()
                elif line.startswith(b"data: ") and kind == b"status":
                    job = json.loads(line[6:])
                    if job["status"] in TERMINAL:
                        # Read on: the server ends the stream, and the connection can be used again.
                        await response.read()
                        return job
        raise BenchFailure(f"the stream of {job['id']} ended while it was {job['status']}")

    async def wait_for_status(self, job: dict[str, Any], status: str) -> None:
        """Return when the job is in that status; BenchFailure when it ends in another or takes a minute."""
        deadline = time.monotonic() + 60
        while job["status"] != status:
            if job["status"] in TERMINAL or time.monotonic() > deadline:
                raise BenchFailure(f"{job['id']} is {job['status']}, not {status}: {job['error']}")
            async with self._session.get(job["urls"]["self"]) as response:
                job = await response.json()
            await asyncio.sleep(0 if job["status"] == status else 0.1)

    async def wait_for_instances(self, count: int) -> None:
        """Return when that many instances are up; BenchFailure after a minute."""
        deadline = time.monotonic() + 60
        while True:
            async with self._session.get(f"{self._url}/v1/instances") as response:
                up = [instance for instance in (await response.json())["data"] if instance["state"] == "up"]
            if len(up) >= count:
                return
            if time.monotonic() > deadline:
                raise BenchFailure(f"{len(up)} of {count} instances are up")
            await asyncio.sleep(0.1)

    async def fetch_picture(self, job: dict[str, Any]) -> bytes:
        """The bytes behind the signed URL; BenchFailure unless they are those that the job tells of."""
        output = job["outputs"][0]
        async with self._session.get(output["url"]) as response:
            body = await response.read()
            if response.status != 200:
                raise BenchFailure(f"the URL of {job['id']} answers {response.status}: {body[:300]!r}")
        if hashlib.sha256(body).hexdigest() != output["sha256"]:
            raise BenchFailure(f"the URL of {job['id']} gives other bytes than the job tells of")
        return body


def _require_success(job: dict[str, Any]) -> dict[str, Any]:
    if job["status"] != "succeeded":
        raise BenchFailure(f"{job['id']} is {job['status']}: {job['error']}")
    return job


def check_picture(body: bytes, side: int, color: int) -> None:
    """BenchFailure unless the picture is a square of this side (pixels) and colour."""
    wanted = (color >> 16 & 0xFF, color >> 8 & 0xFF, color & 0xFF)
    with Image.open(io.BytesIO(body)) as image:
        found, size = image.convert("RGB").getpixel((side // 2, side // 2)), image.size
    if size != (side, side) or found != wanted:
        raise BenchFailure(f"asked for {side} px of {wanted}, got {size} of {found}")


@asynccontextmanager
async def open_caller(url: str, key: str | None = None) -> AsyncIterator[Caller]:
    """A caller whose connections are kept."""
    timeout = aiohttp.ClientTimeout(total=120)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
        yield Caller(url, session, key)
