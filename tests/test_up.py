"""`python -m local.up` as a person meets it: one start, one Ctrl-C, yesterday's state, and one clear line when it cannot."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from local.child import ROOT, pick_free_port

START_S = 90
# Nothing of the caller's own deployment may replace a part of this one.
REPLACING = ("REDIS_URL", "S3_ENDPOINT_URL", "COMFYUI_URLS", "HOST", "PORT", "STATE_DIR")


class Launcher:
    """A running `local.up`: what it said so far, and its gateway."""

    def __init__(self, process: subprocess.Popen[str], log_path: Path, url: str) -> None:
        self.process, self._log_path, self.url = process, log_path, url

    def read(self) -> str:
        return self._log_path.read_text()

    def wait_ready(self) -> None:
        deadline = time.monotonic() + START_S
        while "Paste this" not in self.read():
            assert self.process.poll() is None, self.read()
            assert time.monotonic() < deadline, self.read()
            time.sleep(0.05)

    def find_children(self) -> dict[str, int]:
        """Pids by the program they run."""
        listed = subprocess.run(["ps", "-A", "-ww", "-o", "ppid=,pid=,args="], capture_output=True, text=True, check=True).stdout
        rows = [line.split(maxsplit=2) for line in listed.splitlines()]
        mine = [(int(row[1]), row[2]) for row in rows if len(row) == 3 and int(row[0]) == self.process.pid]
        marks = {"redis": "redis-server", "s3": "rclone", "engine": "local.engine", "gateway": "-m gateway"}
        return {name: pid for pid, command in mine for name, mark in marks.items() if mark in command}


@contextmanager
def launch(state_dir: Path, **env: str) -> Iterator[Launcher]:
    port, log_path = env.pop("PORT", None) or str(pick_free_port()), state_dir.with_name(f"launcher-{time.monotonic_ns()}.log")
    clean = {name: value for name, value in os.environ.items() if name not in REPLACING}
    with log_path.open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "local.up"],
            cwd=ROOT,
            env={**clean, "STATE_DIR": str(state_dir), "PORT": port, **env},
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
            # A script's background job ignores Ctrl-C; what a terminal starts does not.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
    try:
        yield Launcher(process, log_path, f"http://127.0.0.1:{port}")
    finally:
        process.terminate()
        process.wait(60)


def exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture
def state_dir(tmp_path: Path) -> Path:
    return tmp_path / "state"


def test_yesterdays_job_and_picture_are_there_after_a_restart(state_dir: Path) -> None:
    with launch(state_dir) as first:
        first.wait_ready()
        body = {"prompt": "a red circle", "width": 256, "height": 256, "steps": 2, "seed": 7}
        job = httpx.post(f"{first.url}/v1/generations", json=body, headers={"Prefer": "wait=60"}, timeout=90).json()
        assert job["status"] == "succeeded"
        picture = httpx.get(job["outputs"][0]["url"]).content
        children = first.find_children()
        assert sorted(children) == ["engine", "gateway", "redis", "s3"]
        first.process.send_signal(signal.SIGINT)
        assert first.process.wait(60) == 0
        assert first.read().rstrip().endswith("Stopped.")
        assert not [name for name, pid in children.items() if exists(pid)]
    with launch(state_dir) as second:
        second.wait_ready()
        again = httpx.get(f"{second.url}/v1/generations/{job['id']}").json()
        assert again["status"] == "succeeded"
        assert httpx.get(again["outputs"][0]["url"]).content == picture
        # The address in yesterday's answer still reads: S3 came back on its port.
        assert httpx.get(job["outputs"][0]["url"]).content == picture


def test_a_dead_child_ends_the_run_with_its_name(state_dir: Path) -> None:
    with launch(state_dir) as running:
        running.wait_ready()
        children = running.find_children()
        os.kill(children["redis"], signal.SIGKILL)
        assert running.process.wait(60) == 1
        last_line = running.read().rstrip().splitlines()[-1]
        assert last_line.startswith("fluxgate: redis was killed by SIGKILL")
        assert not [name for name, pid in children.items() if exists(pid)]


def test_a_second_run_on_the_same_state_is_refused_in_one_line(state_dir: Path) -> None:
    with launch(state_dir) as first:
        first.wait_ready()
        with launch(state_dir) as second:
            assert second.process.wait(60) == 1
            assert second.read().splitlines() == [
                f"fluxgate: {state_dir} is in use by process {first.process.pid}; stop that one or choose another with STATE_DIR=..."
            ]
        with launch(state_dir.with_name("other"), PORT=first.url.rpartition(":")[2]) as third:
            assert third.process.wait(60) == 1
            assert "Address already in use" in third.read()
            assert len(third.read().splitlines()) == 1
        assert httpx.get(f"{first.url}/ready").status_code == 200


def test_what_the_gateway_refuses_is_said_in_its_words(state_dir: Path) -> None:
    with launch(state_dir, HOST="0.0.0.0") as refused:
        assert refused.process.wait(60) == 1
        assert "HOST=0.0.0.0 can be reached from outside and no API keys are set" in refused.read().splitlines()[-1]
