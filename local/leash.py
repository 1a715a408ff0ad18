"""Ties a program to the life of the process that started it, then becomes that program.
Run by file name, so it may import nothing but the standard library: `leash.py PARENT_PID PIPE_FD PROGRAM ARGS...`."""

import ctypes
import os
import platform
import signal
import sys

PR_SET_PDEATHSIG = 1


def tie_by_kernel(parent_pid: int) -> None:
    """Linux: the kernel kills us when the thread that started us ends; the setting survives exec."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    # The parent may have died before the call; then nobody would ever send the signal.
    if os.getppid() != parent_pid:
        sys.exit(f"parent {parent_pid} ended before its child started")


def tie_by_pipe(pipe_fd: int) -> None:
    """Elsewhere: a small twin reads a pipe whose other end only the parent holds, and kills the program when it closes."""
    program_pid = os.getpid()
    if os.fork():
        return
    while os.read(pipe_fd, 1):
        pass
    # If the program is gone we belong to another parent, and its number may be somebody else's by now.
    if os.getppid() == program_pid:
        os.kill(program_pid, signal.SIGKILL)
    os._exit(0)


def main(arguments: list[str]) -> None:
    parent_pid, pipe_fd, program = int(arguments[0]), int(arguments[1]), arguments[2:]
    if platform.system() == "Linux":
        tie_by_kernel(parent_pid)
    else:
        tie_by_pipe(pipe_fd)
    os.set_inheritable(pipe_fd, False)
    os.execv(program[0], program)


if __name__ == "__main__":
    main(sys.argv[1:])
