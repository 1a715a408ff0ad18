"""Runs one program as a child that cannot outlive us: watched, stopped in three steps, cut off when it says nothing.

It refuses to know that the program is a trainer; what ended it is told honestly.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer_worker.logs import LogReader

KEEPER = Path(__file__).with_name("keeper.py")
POLL_S = 0.1
TERMINATE_GRACE_S = 3.0  # between SIGTERM and SIGKILL; who ignored SIGINT for its whole grace rarely needs it
KILL_GRACE_S = 10.0  # a process that the kernel cannot end (a driver call) is left behind after this

ENDED, STOPPED, STALLED, TIMED_OUT = "ended", "stopped", "stalled", "timed_out"


@dataclass(frozen=True)
class Limits:
    """In seconds: silence allowed, whole run allowed, and what SIGINT is given before harder signals."""

    stall_s: float = 1800.0
    total_s: float = 86400.0
    grace_s: float = 20.0


@dataclass(frozen=True)
class ChildEnd:
    exit_code: int  # negative: the signal that ended it
    reason: str  # ENDED by itself, STOPPED because asked to, STALLED, TIMED_OUT
    log_tail: str


class Child:
    """A program under a keeper. Start it from a thread that lives as long as it should."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str], log_path: Path, cwd: Path | None = None) -> None:
        read_fd, self._control_fd = os.pipe()
        try:
            with open(os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab") as log:
                self._keeper = subprocess.Popen(
                    [sys.executable, "-I", "-S", str(KEEPER), str(read_fd), *command],
                    cwd=cwd,
                    env=dict(env),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    pass_fds=(read_fd,),
                    start_new_session=True,
                )
        except BaseException:  # boundary: whatever happens, the pipe is not left open
            os.close(self._control_fd)
            raise
        finally:
            os.close(read_fd)

    @property
    def pid(self) -> int:
        """The keeper's; its session holds the program."""
        return self._keeper.pid

    def poll(self) -> int | None:
        return self._keeper.poll()

    def interrupt(self) -> None:
        self._ask(b"i")

    def terminate(self) -> None:
        self._ask(b"t")

    def kill(self) -> None:
        self._ask(b"k")

    def abandon(self) -> int:
        """Kill what can be killed, without the keeper's help."""
        if self._keeper.poll() is None:
            self._keeper.kill()
        self._keeper.wait()
        kill_session(self._keeper.pid)
        return self._keeper.returncode

    def close(self) -> None:
        """Nothing of it runs afterwards."""
        if self._control_fd >= 0:
            # Also the keeper's signal to end everything, if it still runs.
            os.close(self._control_fd)
            self._control_fd = -1
        try:
            self._keeper.wait(KILL_GRACE_S)
        except subprocess.TimeoutExpired:
            self.abandon()
        if self._keeper.returncode < 0:
            # A keeper that was killed could not clean up.
            kill_session(self._keeper.pid)

    def _ask(self, request: bytes) -> None:
        try:
            os.write(self._control_fd, request)
        except BrokenPipeError:
            return


def kill_session(session: int) -> None:
    """SIGKILL to every process of a session, found in /proc; elsewhere to none."""
    for name in os.listdir("/proc") if os.path.isdir("/proc/self") else ():
        if not name.isdigit():
            continue
        try:
            fields = Path("/proc", name, "stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) == session:
                os.kill(int(name), signal.SIGKILL)
        except (OSError, IndexError, ValueError):
            continue


class Ending:
    """The three steps of a stop, each when the one before was given its time."""

    def __init__(self, child: Child, grace_s: float) -> None:
        self._steps = [(0.0, child.interrupt), (grace_s, child.terminate), (grace_s + TERMINATE_GRACE_S, child.kill)]
        self._began = time.monotonic()
        self._last = self._began + grace_s + TERMINATE_GRACE_S + KILL_GRACE_S

    def advance(self) -> None:
        while self._steps and time.monotonic() >= self._began + self._steps[0][0]:
            self._steps.pop(0)[1]()

    @property
    def is_hopeless(self) -> bool:
        return time.monotonic() > self._last


def run_child(
    command: Sequence[str],
    env: Mapping[str, str],
    log_path: Path,
    *,
    cwd: Path | None = None,
    limits: Limits | None = None,
    should_stop: threading.Event | None = None,
    hear: Callable[[list[str]], bool] = lambda lines: False,
    secrets: Iterable[str] = (),
) -> ChildEnd:
    """Run the program to its end; `env` is all of its environment, its output is appended to the log.

    `hear` is called several times a second with the log's new lines (perhaps none) and says whether it heard something elsewhere;
    lines and that are the signs of life. OSError when the log or the interpreter cannot be opened.
    """
    limits = limits or Limits()
    child = Child(command, env, log_path, cwd)
    log = LogReader(log_path, secrets)
    try:
        reason, exit_code = watch(child, log, limits, should_stop or threading.Event(), hear)
    finally:
        child.close()
        rest = log.read_rest()
        log.close()
    hear(rest)
    return ChildEnd(exit_code, reason, log.tail())


def watch(child: Child, log: LogReader, limits: Limits, should_stop: threading.Event, hear: Callable[[list[str]], bool]) -> tuple[str, int]:
    """(why it ended, its exit code)"""
    began = last_sign = time.monotonic()
    reason, ending = ENDED, None
    while True:
        exit_code = child.poll()
        if exit_code is not None:
            return reason, exit_code
        lines = log.read_lines()
        if hear(lines) or lines:
            last_sign = time.monotonic()
        now = time.monotonic()
        if ending is None:
            reason = find_reason(should_stop.is_set(), now - last_sign > limits.stall_s, now - began > limits.total_s)
            if reason != ENDED:
                ending = Ending(child, limits.grace_s)
        if ending is None:
            should_stop.wait(POLL_S)
            continue
        ending.advance()
        if ending.is_hopeless:
            return reason, child.abandon()
        time.sleep(POLL_S)


def find_reason(is_stopped: bool, is_stalled: bool, is_late: bool) -> str:
    if is_stopped:
        return STOPPED
    if is_late:
        return TIMED_OUT
    return STALLED if is_stalled else ENDED
