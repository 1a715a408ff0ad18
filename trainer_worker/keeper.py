"""Stands between the worker and one program, so that nothing of the program outlives either.

Run by file name with the standard library alone: `keeper.py CONTROL_FD PROGRAM ARGS...`. The other end of the pipe is the worker's: a
byte asks for a signal, and its closing says that the worker is gone. On Linux also what the program's own children leave behind is
found and ended, in whichever session it hides. The keeper ends as the program did: same status, same signal.
"""

import contextlib
import ctypes
import os
import resource
import select
import signal
import sys
import time

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
REQUESTS = {b"i": signal.SIGINT, b"t": signal.SIGTERM, b"k": signal.SIGKILL}
REAP_PAUSE_S = 0.02
NOT_STARTED = 127  # what a shell says of a program that cannot be started


def set_process_option(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value)


def start(program: list[str]) -> int:
    """The program's process id, which is also its group's. It dies with us, even when we are killed."""
    keeper_pid = os.getpid()
    pid = os.fork()
    if pid:
        # Both sides do it, as either may run first; ours fails once the program has started.
        with contextlib.suppress(OSError):
            os.setpgid(pid, pid)
        return pid
    try:
        os.setpgid(0, 0)
        set_process_option(PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.set_wakeup_fd(-1)
        # Ignored signals survive exec, and one that is started in a shell's background ignores SIGINT.
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD, signal.SIGPIPE):
            signal.signal(number, signal.SIG_DFL)
        if os.getppid() == keeper_pid:
            os.execvp(program[0], program)
    except OSError as error:
        os.write(2, f"{program[0]} cannot be started: {error.strerror}\n".encode())
    os._exit(NOT_STARTED)


def send(pid: int, number: int) -> None:
    """To the whole group; who has ended already needs no signal."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)


def find_children() -> list[int]:
    """Our own, among them those that others orphaned; Linux only."""
    children, own = [], str(os.getpid())
    for name in os.listdir("/proc") if os.path.isdir("/proc/self") else ():
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat") as file:
                    # The command's name may hold spaces and brackets.
                    parent = file.read().rpartition(")")[2].split()[1]
            except (OSError, IndexError):
                continue
            if parent == own:
                children.append(int(name))
    return children


def end_everything(group: int) -> None:
    """SIGKILL until nobody is left: each death may hand us the next one's parentless children."""
    while True:
        send(group, signal.SIGKILL)
        for pid in find_children():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                continue
        except ChildProcessError:
            return
        time.sleep(REAP_PAUSE_S)


def reap(pid: int) -> int | None:
    """The wait status of the program when it has ended; orphans are reaped on the way."""
    status = None
    try:
        while True:
            ended, its_status = os.waitpid(-1, os.WNOHANG)
            if not ended:
                return status
            if ended == pid:
                status = its_status
    except ChildProcessError:
        return status


def watch(pid: int, control_fd: int, wakeup_fd: int) -> int:
    """Until the program ends, or the worker does; the program's wait status."""
    while True:
        readable, _, _ = select.select([control_fd, wakeup_fd], [], [])
        if wakeup_fd in readable:
            numbers = os.read(wakeup_fd, 512)
            if signal.SIGTERM in numbers:
                return signal.SIGKILL
        status = reap(pid)
        if status is not None:
            return status
        if control_fd in readable:
            requests = os.read(control_fd, 16)
            if not requests:
                return signal.SIGKILL
            for request in requests:
                send(pid, REQUESTS[bytes([request])])


def end_like(status: int) -> None:
    if os.WIFSIGNALED(status):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        number = os.WTERMSIG(status)
        if number != signal.SIGKILL:
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    os._exit(os.waitstatus_to_exitcode(status))


def main(arguments: list[str]) -> None:
    control_fd, program = int(arguments[0]), arguments[1:]
    os.set_inheritable(control_fd, False)
    set_process_option(PR_SET_CHILD_SUBREAPER, 1)
    # A second string beside the pipe, which a careless fork of the worker may hold open.
    set_process_option(PR_SET_PDEATHSIG, signal.SIGTERM)
    wakeup_fd, write_fd = os.pipe()
    os.set_blocking(write_fd, False)
    signal.set_wakeup_fd(write_fd)
    for number in (signal.SIGTERM, signal.SIGCHLD):
        signal.signal(number, lambda *_: None)
    # Ours to pass on or not: a terminal's Ctrl-C is the worker's business.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    pid = start(program)
    status = watch(pid, control_fd, wakeup_fd)
    end_everything(pid)
    end_like(status)


if __name__ == "__main__":
    main(sys.argv[1:])
