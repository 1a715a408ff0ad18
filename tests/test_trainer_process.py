"""Real children: honest ends, three steps of a stop, silence, lateness, and nobody left over, whoever is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.training_parts import find_processes, wait_for
from trainer_worker.logs import LogReader, hide_secrets
from trainer_worker.process import ENDED, STALLED, STOPPED, TIMED_OUT, Child, ChildEnd, Limits, run_child

ROOT = Path(__file__).parents[1]
CHILD = Path(__file__).with_name("trainer_child.py")
PATIENT = Limits(stall_s=60, total_s=60, grace_s=20)


def command(how: str) -> list[str]:
    return [sys.executable, str(CHILD), how]


def run(folder: Path, how: str, limits: Limits = PATIENT, *, stop_when_ready: bool = False) -> ChildEnd:
    should_stop = threading.Event()

    def hear(lines: list[str]) -> bool:
        if stop_when_ready and "ready" in lines:
            should_stop.set()
        return False

    end = run_child(command(how), os.environ, folder / "log", cwd=folder, limits=limits, should_stop=should_stop, hear=hear)
    assert find_processes(folder) == []
    return end


@pytest.mark.parametrize(
    ("program", "exit_code", "said"),
    [
        ("print('done')", 0, "done"),
        ("raise SystemExit(7)", 7, ""),
        ("import os; os.kill(os.getpid(), 9)", -9, ""),
        ("import os; os.kill(os.getpid(), 15)", -15, ""),
        ("import os; os.abort()", -6, ""),
        ("1/0", 1, "ZeroDivisionError: division by zero"),
    ],
)
def test_the_exit_code_is_the_programs(tmp_path: Path, program: str, exit_code: int, said: str) -> None:
    end = run_child([sys.executable, "-c", program], os.environ, tmp_path / "log", cwd=tmp_path)
    assert (end.reason, end.exit_code) == (ENDED, exit_code)
    assert end.log_tail.endswith(said)


def test_a_program_that_is_not_there_ends_as_in_a_shell(tmp_path: Path) -> None:
    end = run_child([str(tmp_path / "nothing")], os.environ, tmp_path / "log")
    assert (end.exit_code, end.log_tail) == (127, f"{tmp_path}/nothing cannot be started: No such file or directory")


def test_a_stop_is_an_interrupt_first(tmp_path: Path) -> None:
    end = run(tmp_path, "obey", stop_when_ready=True)
    assert (end.reason, end.exit_code) == (STOPPED, 130)
    assert end.log_tail == "ready\ninterrupted"


def test_an_interrupt_arrives_though_the_worker_ignores_it(tmp_path: Path) -> None:
    """As in a shell's background job."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert run(tmp_path, "obey", stop_when_ready=True).exit_code == 130
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_stop_grows_harder(tmp_path: Path) -> None:
    quick = Limits(stall_s=60, total_s=60, grace_s=0.3)
    assert run(tmp_path, "ignore_interrupt", quick, stop_when_ready=True).exit_code == -signal.SIGTERM
    assert run(tmp_path, "ignore_all", quick, stop_when_ready=True).exit_code == -signal.SIGKILL


def test_silence_and_lateness_end_a_program(tmp_path: Path) -> None:
    end = run(tmp_path, "obey", Limits(stall_s=0.5, total_s=60, grace_s=20))
    assert (end.reason, end.exit_code) == (STALLED, 130)
    end = run(tmp_path, "chatter", Limits(stall_s=60, total_s=0.5, grace_s=20))
    assert (end.reason, end.exit_code) == (TIMED_OUT, -signal.SIGINT)


def test_what_is_heard_elsewhere_is_a_sign_of_life(tmp_path: Path) -> None:
    heard = iter([True] * 30)
    end = run_child(command("obey"), os.environ, tmp_path / "log", limits=Limits(0.3, 60, 20), hear=lambda lines: next(heard, False))
    assert end.reason == STALLED
    assert next(heard, None) is None


def test_children_of_a_program_that_ended_are_ended(tmp_path: Path) -> None:
    assert run(tmp_path, "start_family").exit_code == 0


def test_children_of_a_program_that_is_stopped_are_ended(tmp_path: Path) -> None:
    assert run(tmp_path, "start_family_and_sleep", Limits(60, 60, 0.2), stop_when_ready=True).exit_code == -signal.SIGKILL


def test_an_error_of_the_listener_ends_the_program(tmp_path: Path) -> None:
    def hear(lines: list[str]) -> bool:
        raise LookupError(lines)

    with pytest.raises(LookupError):
        run_child(command("start_family_and_sleep"), os.environ, tmp_path / "log", cwd=tmp_path, hear=hear)
    assert find_processes(tmp_path) == []


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_worker_leaves_nobody(tmp_path: Path, number: signal.Signals) -> None:
    owner = [sys.executable, "-m", "tests.trainer_owner", "start_family_and_sleep", str(tmp_path)]
    with subprocess.Popen(owner, cwd=ROOT, stdout=subprocess.PIPE) as worker:
        assert worker.stdout is not None
        assert worker.stdout.readline() == b"ready\n"
        wait_for(lambda: len(find_processes(tmp_path)) == 5, "the keeper, the program and three naps run")
        worker.send_signal(number)
    wait_for(lambda: not find_processes(tmp_path), "nothing runs in the folder")


def test_a_killed_keeper_takes_the_program_along(tmp_path: Path) -> None:
    child = Child(command("ignore_all"), os.environ, tmp_path / "log", tmp_path)
    wait_for(lambda: "ready" in (tmp_path / "log").read_text(), "the program runs")
    os.kill(child.pid, signal.SIGKILL)
    wait_for(lambda: child.poll() is not None, "the keeper is dead")
    child.close()
    wait_for(lambda: not find_processes(tmp_path), "nothing runs in the folder")


def test_the_log_is_ours_alone_and_is_appended_to(tmp_path: Path) -> None:
    for word in ("one", "two"):
        end = run_child([sys.executable, "-c", f"print('{word}')"], os.environ, tmp_path / "log")
        assert end.log_tail == word
    assert (tmp_path / "log").read_text() == "one\ntwo\n"
    assert (tmp_path / "log").stat().st_mode & 0o777 == 0o600


def test_the_tail_keeps_the_last_state_of_a_bar(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"before\n")
    log = LogReader(path)
    with path.open("ab", 0) as file:
        file.write(b"start\n\rbar 1\rbar 2\rba")
        assert log.read_lines() == ["start", "bar 1", "bar 2"]
        file.write(b"r 3\n\x1b[31mred\x1b[0m\r\nlast")
        assert log.read_lines() == ["bar 3", "red"]
        assert log.read_rest() == ["last"]
    assert log.tail() == "start\nbar 3\nred\nlast"
    log.close()


def test_the_tail_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.touch()
    log = LogReader(path)
    path.write_bytes(b"".join(b"line %d\n" % number for number in range(200)) + b"x" * 3_000_000)
    lines = log.read_rest()
    assert lines[199] == "line 199"
    assert len(log.tail().splitlines()) == 50
    assert max(map(len, log.tail().splitlines())) == 2000
    log.close()


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("token hf_abcdefghijklmnopqrstuv here", "token *** here"),
        ("Authorization: Bearer abc.def-123456", "Authorization: Bearer ***"),
        ("http://user:secret@host/x", "http://***@host/x"),
        ("https://s3/x?X-Amz-Signature=0123abc&y=1", "https://s3/x?X-Amz-Signature=***&y=1"),
        ("key AKIAABCDEFGHIJKLMNOP", "key ***"),
        ("http://127.0.0.1:80/hook/abcdefghijklmnopqrst", "http://127.0.0.1:80/hook/***"),
        ("my own word", "my own word"),
        ("open sesame123", "open ***"),
    ],
)
def test_secrets_are_hidden(text: str, hidden: str) -> None:
    assert hide_secrets(text, ["sesame123", "own", ""]) == hidden
