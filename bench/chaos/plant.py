"""Four engines, two gateways, two dispatchers, Redis and S3 as real processes, and what can be done to each of them."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import httpx

from bench.chaos.schedule import Fault
from local.child import Child, ChildError
from local.services import LOOPBACK, Gateway, RedisServer, S3Server, ask

ENGINES, GATEWAYS, DISPATCHERS = 4, 2, 2
WORKFLOWS = Path(__file__).with_name("workflows")


async def wait_until(holds: Callable[[], bool], patience_s: float) -> bool:
    """Whether it did before the time was over."""
    deadline = time.monotonic() + patience_s
    while True:
        if holds():
            return True
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(0.1)


def pick_port() -> int:
    """A free port below those that the system hands out: while its part is away, no outgoing connection may take it."""
    while True:
        port = random.SystemRandom().randrange(15_000, 30_000)
        with socket.socket() as probe:
            try:
                probe.bind((LOOPBACK, port))
            except OSError:
                continue
            return port


class Plant:
    """All parts by name. Faults may overlap, but never on one part."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.redis, self.s3 = RedisServer(folder, pick_port()), S3Server(folder, pick_port())
        engines = [self._make_engine(number) for number in range(ENGINES)]
        self.engine_urls = [url for _, url in engines]
        self.env = self._describe()
        self.gateways = [Gateway(folder / f"gateway-{number}", LOOPBACK, pick_port(), self.env) for number in range(GATEWAYS)]
        self.parts: dict[str, Child] = {"redis": self.redis, "s3": self.s3}
        self.parts |= {f"engine-{number}": engine for number, (engine, _) in enumerate(engines)}
        self.parts |= {f"gateway-{number}": gateway for number, gateway in enumerate(self.gateways)}
        self.parts |= {f"dispatcher-{number}": self._make_dispatcher(number) for number in range(DISPATCHERS)}
        self.deaths: list[str] = []
        self._away: set[str] = set()

    def journals(self) -> list[Path]:
        return [self.folder / f"engine-{number}.journal" for number in range(ENGINES)]

    def _make_engine(self, number: int) -> tuple[Child, str]:
        url = f"http://{LOOPBACK}:{(port := pick_port())}"
        command = [sys.executable, "-m", "bench.chaos.engine", "--port", str(port)]
        command += ["--base-directory", str(self.folder / f"engine-{number}"), "--journal", str(self.folder / f"engine-{number}.journal")]
        log_path = self.folder / "logs" / f"engine-{number}.log"
        return Child(f"engine-{number}", command, log_path=log_path, is_ready=lambda: ask(f"{url}/system_stats")), url

    def _make_dispatcher(self, number: int) -> Child:
        log_path = self.folder / "logs" / f"dispatcher-{number}.log"
        return Child(f"dispatcher-{number}", [sys.executable, "-m", "gateway.dispatch"], env=self.env, log_path=log_path, is_ready=_no_wait)

    def _describe(self) -> dict[str, str]:
        return {
            "LOG_LEVEL": "INFO",
            "REDIS_URL": self.redis.url,
            "S3_ENDPOINT_URL": self.s3.endpoint_url,
            "S3_BUCKET": "chaos",
            "AWS_ACCESS_KEY_ID": self.s3.credentials.access_key_id,
            "AWS_SECRET_ACCESS_KEY": self.s3.credentials.secret_access_key,
            "COMFYUI_URLS": ",".join(self.engine_urls),
            "WORKFLOWS_DIR": str(WORKFLOWS),
            "DEFAULT_BASE_MODEL": "tinyflux",
            "DISPATCHER": "off",
            "LEASE_S": "2",
            "POLL_S": "0.5",
            "INSTANCE_LOST_S": "6",
            "STALL_TIMEOUT_S": "20",
            "TIMEOUT_S": "120",
            # Faults come far closer together here than in life; what may end a job is the same.
            "MAX_ATTEMPTS": "8",
            "UPLOAD_TRIES": "6",
        }

    # -- what is done to a part --------------------------------------------------------------------------------

    async def suffer(self, fault: Fault) -> None:
        """One fault, from its beginning to the part's return."""
        part = self.parts[fault.part]
        self._note_death(fault.part)
        self._away.add(fault.part)
        if fault.act == "pause":
            os.killpg(part.pid, signal.SIGSTOP)
            await asyncio.sleep(fault.away_s)
            os.killpg(part.pid, signal.SIGCONT)
        else:
            if fault.act == "kill":
                part.kill()
            else:
                os.killpg(part.pid, signal.SIGTERM)
                await wait_until(lambda: not part.is_alive(), part.grace_s)
                part.stop()
            await asyncio.sleep(fault.away_s)
            part.start()
        self._away.discard(fault.part)

    def _note_death(self, name: str) -> None:
        """A part that ended without our doing is a fault of its own: note it and start it again."""
        part = self.parts[name]
        try:
            part.check()
        except ChildError as error:
            self.deaths.append(str(error))
            part.stop()
            part.start()

    async def mend(self) -> None:
        """All parts run and answer. Call when no fault is at work."""
        assert not self._away, f"still away: {self._away}"
        for name, part in self.parts.items():
            self._note_death(name)
            await asyncio.to_thread(part.wait_ready)

    @asynccontextmanager
    async def run(self) -> AsyncIterator[Plant]:
        """Start every part, and end it whatever happened. Raises ChildError."""
        try:
            for part in self.parts.values():
                # Not in a thread: on Linux a child dies with the thread that started it.
                part.start()
            for part in self.parts.values():
                await asyncio.to_thread(part.wait_ready)
            await self._wait_instances()
            yield self
        finally:
            for part in reversed(self.parts.values()):
                part.kill()

    async def _wait_instances(self) -> None:
        """Until the dispatchers have told of every engine."""
        deadline = time.monotonic() + 60
        async with httpx.AsyncClient() as client:
            while True:
                instances = (await client.get(f"{self.gateways[0].url}/v1/instances")).json()["data"]
                if sum(instance["state"] == "up" for instance in instances) == ENGINES:
                    return
                if time.monotonic() > deadline:
                    raise ChildError(f"not every engine is up after 60 s: {instances}")
                await asyncio.sleep(0.1)


def _no_wait() -> None:
    return None
