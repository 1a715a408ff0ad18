"""How callers come in: who may, and whether streams reach them as they are made."""

from __future__ import annotations

import asyncio
import time
from urllib.parse import urlsplit

import aiohttp

from gateway.auth import UnsafeBinding, refuse_unsafe_binding
from gateway.callers.keys import KeyStore
from gateway.doctor.finding import Finding, fault, skip, warn, well
from gateway.errors import RedisUnavailable
from gateway.redis_client import RedisClient
from gateway.settings import Settings

TIMEOUT = aiohttp.ClientTimeout(total=30, connect=10)
STREAM_PATH = "/health/stream"
LOOPBACK = ("127.0.0.1", "::1", "localhost")


async def examine_door(settings: Settings, redis: RedisClient) -> list[Finding]:
    try:
        keys = (await KeyStore(redis).load()).keys.values()
    except RedisUnavailable:
        return [skip("door.keys", "keys could not be looked for: Redis is out of reach")]
    good = [key for key in keys if key.is_good(int(time.time() * 1000))]
    try:
        refuse_unsafe_binding(settings, has_keys=bool(keys))
    except UnsafeBinding as error:
        return [fault("door.keys", error.message, error.hint)]
    closed = bool(keys) or settings.admin_key is not None or settings.auth != "auto"
    host = urlsplit(settings.public_url or "").hostname
    if not closed and host and host not in LOOPBACK:
        remedy = "Make a key with `python -m gateway keys create`, or set AUTH=keys: whoever has the URL may do everything."
        return [fault("door.keys", f"PUBLIC_URL leads to {host}, and no API keys are set", remedy)]
    if closed and not good and settings.admin_key is None and settings.auth != "hf":
        return [warn("door.keys", "keys are asked for, and no good one exists", "Make one: python -m gateway keys create --scopes admin")]
    if settings.auth == "hf":
        return [_judge_hub_callers(settings, len(good))]
    said = f"{len(good)} keys" if closed else "no keys: everybody on this machine may do everything"
    return [well("door.keys", f"listens on {settings.host}; {said}")]


def _judge_hub_callers(settings: Settings, keys: int) -> Finding:
    said = f"listens on {settings.host}; {keys} keys, and Hugging Face tokens"
    if not settings.hf_users:
        remedy = "Name users and organisations in HF_USERS, or mean it: an account costs nothing."
        return warn("door.keys", f"{said} of whoever has an account there", remedy)
    return well("door.keys", f"{said} of {len(settings.hf_users)} users and organisations")


async def examine_stream(url: str | None, session: aiohttp.ClientSession) -> list[Finding]:
    """Whether events come one by one through the address that callers use."""
    if not url:
        return [skip("door.stream", "no address to try: set PUBLIC_URL, or give --url")]
    spread = dict(zip(("GET", "POST"), await asyncio.gather(*(_measure(session, method, url) for method in ("GET", "POST"))), strict=True))
    if failed := [said for said in spread.values() if isinstance(said, str)]:
        remedy = "Start the gateway and the tunnel, and see that PUBLIC_URL (or --url) is the tunnel's own address."
        return [fault("door.stream", f"{url}{STREAM_PATH} {failed[0]}", remedy)]
    held = [method for method, share in spread.items() if isinstance(share, float) and share < 0.5]
    if len(held) == 2:
        remedy = "Turn off buffering in what stands before the gateway (nginx: proxy_buffering off), or let clients poll: ?wait=20."
        return [fault("door.stream", f"{url} holds streams back until they are whole", remedy)]
    if held:
        other = "POST" if held == ["GET"] else "GET"
        return [warn("door.stream", f"{url} holds {held[0]} streams back until they are whole", f"Let clients follow jobs by {other}.")]
    return [well("door.stream", f"events come one by one through {url}")]


async def _measure(session: aiohttp.ClientSession, method: str, url: str) -> float | str:
    """Time between the first event's arrival and the last one's, as a share of that between their sending; or what went wrong."""
    arrived, sent = list[float](), list[float]()
    try:
        async with session.request(method, url.rstrip("/") + STREAM_PATH, timeout=TIMEOUT) as answer:
            if answer.status != 200:
                return f"answers {answer.status}"
            async for line in answer.content:
                if line.startswith(b"data: "):
                    arrived.append(time.monotonic())
                    sent.append(float(line[6:]))
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
        return f"does not answer: {error or type(error).__name__}"
    if len(sent) < 2 or sent[-1] <= sent[0]:
        return "answers with something that is no stream"
    return (arrived[-1] - arrived[0]) / (sent[-1] - sent[0])
