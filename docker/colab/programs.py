"""Programs that run until they are stopped, and are started again when they die. The standard library alone."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0
# One that ran so long did not die of its start.
STEADY_S = 60.0


class Program:
    """A command with its log. `grace_s`: from SIGTERM to SIGKILL, for it and all that it started."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        log: Path,
        env: Mapping[str, str] | None = None,
        *,
        folder: Path | None = None,
        grace_s: float = 30.0,
    ) -> None:
        self.name, self.command, self.log, self.grace_s = name, list(command), log, grace_s
        self._env, self._folder = dict(env or {}), folder
        self._process: subprocess.Popen[bytes] | None = None
        self._pause_s = FIRST_PAUSE_S
        self._started_at = self._due_at = 0.0

    @property
    def is_alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self.command,
                cwd=self._folder,
                env={**os.environ, **self._env},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # Ctrl-C reaches the launcher alone, which stops them in order.
                start_new_session=True,
            )
        self._started_at = time.monotonic()

    def keep_alive(self, say: Callable[[str], None]) -> None:
        """Start it again when it is dead and its pause is over; pauses grow while it dies early."""
        if self._process is None or self.is_alive:
            return
        now = time.monotonic()
        if not self._due_at:
            self._pause_s = FIRST_PAUSE_S if now - self._started_at > STEADY_S else min(self._pause_s * 2, LONGEST_PAUSE_S)
            self._due_at = now + self._pause_s
            say(f"{self.name} ended with {self._process.returncode}, starts again in {self._pause_s:g} s: {read_tail(self.log)}")
        elif now >= self._due_at:
            self._due_at = 0.0
            self.start()

    def stop(self) -> None:
        process, self._process = self._process, None
        if process is None or process.poll() is not None:
            return
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(self.grace_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def read_tail(log: Path) -> str:
    """Its last line with words."""
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "nothing was said")
