"""Whole deployments for tests: a gateway process, and a dispatcher process where wanted, over real Redis, S3 and engines.
It knows how they are configured and started; what a test does to them is the test's business."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import httpx

from local.child import Child, pick_free_port
from local.services import Gateway, S3Server, ask

WORKFLOWS_DIR = Path(__file__).parent / "workflows"


def describe_deployment(redis_url: str, s3: S3Server, engine_urls: str, **changes: str) -> dict[str, str]:
    """The environment of a gateway on these servers, with a bucket of its own. Leases and polls are short: crashes are noticed soon."""
    return {
        "REDIS_URL": redis_url,
        "S3_ENDPOINT_URL": s3.endpoint_url,
        "S3_BUCKET": f"test-{uuid4().hex[:12]}",
        "AWS_ACCESS_KEY_ID": s3.credentials.access_key_id,
        "AWS_SECRET_ACCESS_KEY": s3.credentials.secret_access_key,
        "COMFYUI_URLS": engine_urls,
        "WORKFLOWS_DIR": str(WORKFLOWS_DIR),
        "DEFAULT_BASE_MODEL": "tinyflux",
        "LEASE_S": "2",
        "POLL_S": "0.5",
        # Each job really runs, also one that was asked for before.
        "CACHE_TTL_S": "0",
        **changes,
    }


def make_gateway(folder: Path, env: dict[str, str]) -> Gateway:
    """A gateway that keeps its port, so `kill()` and then `start()` is a crash and a restart at the same address."""
    return Gateway(folder, "127.0.0.1", pick_free_port(), env)


def make_dispatcher(folder: Path, env: dict[str, str], gateway_url: str) -> Child:
    """A dispatcher in a process of its own, ready when the gateway has heard of an instance from it."""
    headers = {"Authorization": f"Bearer {env['ADMIN_KEY']}"} if "ADMIN_KEY" in env else {}

    def ask_for_instance() -> str | None:
        found = httpx.get(f"{gateway_url}/v1/instances", headers=headers).json()["data"]
        return None if any(instance["state"] == "up" for instance in found) else f"no instance is up: {found}"

    command = [sys.executable, "-m", "gateway.dispatch"]
    return Child("dispatcher", command, env=env, log_path=folder / "logs" / "dispatcher.log", is_ready=ask_for_instance)


def wait_for_answers(gateway: Gateway) -> None:
    """Return when the gateway answers at all: without a dispatcher it is never ready."""
    deadline = time.monotonic() + gateway.ready_timeout_s
    while ask(f"{gateway.url}/health"):
        gateway.check()
        assert time.monotonic() < deadline, f"no answer from {gateway.url} (log: {gateway.log_path})"
        time.sleep(0.03)


@contextmanager
def running(*children: Child) -> Iterator[None]:
    """The children, started in order and stopped in reverse, whatever a test did to them meanwhile."""
    try:
        for child in children:
            child.start()
            child.wait_ready()
        yield
    finally:
        for child in reversed(children):
            child.stop()
