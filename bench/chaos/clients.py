"""Callers that never give up: they submit with an Idempotency-Key, retry what a caller should, and follow each job's stream over
any number of broken connections. They write down what they saw; what it means is judged elsewhere."""

from __future__ import annotations

import asyncio
import json
import random
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from bench.chaos.schedule import Request

TERMINAL = frozenset({"succeeded", "failed", "canceled", "expired"})
RETRIED_STATUSES = (502, 503, 504)
BROKEN = (aiohttp.ClientError, TimeoutError, OSError)
# A caller's own patience with one answer and with a silent stream; shorter than any pause would be, so that both are exercised.
ANSWER_S, SILENCE_S = 4.0, 6.0


@dataclass
class Sighting:
    """What one caller saw of its job."""

    request: Request
    job_id: str = ""
    seen: list[tuple[str, str, str]] = field(default_factory=list)  # id, kind, status
    final: dict[str, Any] | None = None
    tries: int = 0
    visits: int = 0
    complaints: list[str] = field(default_factory=list)


class Crowd:
    """All callers. `frontends` are the gateways' URLs; whoever meets a dead one goes to the next."""

    def __init__(self, session: aiohttp.ClientSession, frontends: list[str], seed: int) -> None:
        self._session, self._frontends = session, frontends
        self._draw = random.Random(f"crowd {seed}")
        self.sightings: list[Sighting] = []

    async def ask_for(self, request: Request) -> None:
        """One request from its submission to its end."""
        sighting = Sighting(request)
        self.sightings.append(sighting)
        await self._submit(sighting)
        async with asyncio.TaskGroup() as group:
            group.create_task(self._follow(sighting))
            if request.cancel_after_s is not None:
                group.create_task(self._cancel(sighting, request.cancel_after_s))

    def _frontend(self, sighting: Sighting, turn: int) -> str:
        return self._frontends[(sighting.request.gateway + turn) % len(self._frontends)]

    async def _pause(self) -> None:
        await asyncio.sleep(self._draw.uniform(0.1, 0.4))

    async def _submit(self, sighting: Sighting) -> None:
        headers = {"Idempotency-Key": f"request-{sighting.request.number}"}
        while True:
            sighting.tries += 1
            url = f"{self._frontend(sighting, sighting.tries)}/v1/generations"
            try:
                timeout = aiohttp.ClientTimeout(total=ANSWER_S)
                async with self._session.post(url, json=sighting.request.body, headers=headers, timeout=timeout) as answer:
                    body = await answer.json()
                    if answer.status in (200, 202):
                        sighting.job_id = body["id"]
                        return
                    if answer.status not in RETRIED_STATUSES:
                        sighting.complaints.append(f"submission answered {answer.status}: {str(body)[:200]}")
                        return
            except BROKEN:
                pass
            await self._pause()

    async def _cancel(self, sighting: Sighting, after_s: float) -> None:
        await asyncio.sleep(after_s)
        for turn in range(100):
            url = f"{self._frontend(sighting, turn)}/v1/generations/{sighting.job_id}/cancel"
            try:
                async with self._session.post(url, timeout=aiohttp.ClientTimeout(total=ANSWER_S)) as answer:
                    if answer.status == 200:
                        return
            except BROKEN:
                pass
            await self._pause()

    async def _follow(self, sighting: Sighting) -> None:
        """Read to the terminal status, coming back after every break with the last id that was seen."""
        while sighting.job_id and sighting.final is None:
            sighting.visits += 1
            with suppress(*BROKEN):
                await self._visit(sighting)
            if sighting.final is None:
                await self._pause()

    async def _visit(self, sighting: Sighting) -> None:
        url = f"{self._frontend(sighting, sighting.visits)}/v1/generations/{sighting.job_id}/events"
        headers = {"Last-Event-ID": sighting.seen[-1][0]} if sighting.seen else {}
        leave_after = sighting.request.leave_after if sighting.visits == 1 else None
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=ANSWER_S, sock_read=SILENCE_S)
        async with self._session.get(url, headers=headers, timeout=timeout) as answer:
            if answer.status != 200:
                if answer.status not in RETRIED_STATUSES:
                    sighting.complaints.append(f"stream answered {answer.status}: {(await answer.text())[:200]}")
                return
            buffer = b""
            async for chunk in answer.content.iter_any():
                *frames, buffer = (buffer + chunk).split(b"\n\n")
                for frame in frames:
                    self._note(sighting, frame.decode())
                if leave_after is not None and len(sighting.seen) >= leave_after:
                    return

    def _note(self, sighting: Sighting, frame: str) -> None:
        """Frames without an id are no part of the history: snapshots, comments, calls to reconnect."""
        fields = dict(line.split(": ", 1) for line in frame.split("\n") if line and not line.startswith(":"))
        if "id" not in fields:
            return
        data = json.loads(fields["data"])
        status = data["status"] if fields["event"] == "status" else ""
        sighting.seen.append((fields["id"], fields["event"], status))
        if status in TERMINAL:
            sighting.final = data
