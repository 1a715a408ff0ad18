"""`fluxgate` as a person and a script run it, against a real gateway."""

from __future__ import annotations

import io
import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest
import typer
from PIL import Image

from fluxgate import Client, Lora, Progress
from fluxgate.cli import INTERRUPTED, choose_paths, parse_lora, parse_parameter
from fluxgate.display import describe_progress
from tests.conftest import OpenGateway

FLUXGATE = [sys.executable, "-c", "from fluxgate.cli import main; main()"]
SMALL = ["--width", "256", "--height", "256", "--steps", "3", "--seed", "7"]
PATIENCE_S = 60


@pytest.fixture(scope="module")
def url(open_gateway: OpenGateway) -> Iterator[str]:
    with open_gateway() as gateway:
        yield gateway.url


def call(url: str, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "FLUXGATE_URL": url}
    return subprocess.run(
        [*FLUXGATE, *arguments], env=env, cwd=cwd, capture_output=True, text=True, timeout=PATIENCE_S, stdin=subprocess.DEVNULL, check=False
    )


def start_slow_job(url: str, stdin: int, stderr: int) -> subprocess.Popen[bytes]:
    """A `generate` that takes minutes, in a process of its own; it says the job's id first."""
    arguments = ["generate", "--workflow", "slow", "-p", "steps=2000"]
    env = {**os.environ, "FLUXGATE_URL": url}
    return subprocess.Popen(
        [*FLUXGATE, *arguments], env=env, preexec_fn=obey_interrupt, stdin=stdin, stdout=subprocess.DEVNULL, stderr=stderr
    )


def read_job_id(line: bytes) -> str:
    found = re.search(rb"gen_\w+", line)
    assert found, line
    return found[0].decode()


@pytest.fixture
def slow_job(url: str) -> Iterator[tuple[subprocess.Popen[bytes], IO[bytes], str]]:
    """The process without a terminal, its stderr, and the id of its job."""
    with start_slow_job(url, subprocess.DEVNULL, subprocess.PIPE) as process:
        assert process.stderr is not None
        yield process, process.stderr, read_job_id(process.stderr.readline())


def obey_interrupt() -> None:
    # A script's background job ignores Ctrl-C; what a terminal starts does not.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_generate_writes_the_picture_and_shows_its_steps(url: str, tmp_path: Path) -> None:
    done = call(url, "generate", "a red circle on a blue background", *SMALL, "--lora", "tok:0.8", "-o", "sub/out.png", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "sub/out.png\n"
    with Image.open(tmp_path / "sub/out.png") as picture:
        assert (picture.format, picture.size) == ("PNG", (256, 256))
    lines = done.stderr.splitlines()
    assert "(flux, seed 7)" in lines[0]
    assert lines[-1] == "succeeded"
    assert any("step 3/3" in line for line in lines)
    assert "\x1b" not in done.stdout + done.stderr


def test_several_pictures_are_numbered_and_previews_written(url: str, tmp_path: Path) -> None:
    done = call(url, "generate", "a cat", *SMALL, "-n", "2", "-o", "out.png", "--preview", "preview.jpg", cwd=tmp_path)
    assert done.stdout.splitlines() == ["out-1.png", "out-2.png"], done.stderr
    assert (tmp_path / "out-1.png").read_bytes() != (tmp_path / "out-2.png").read_bytes()
    with Image.open(tmp_path / "preview.jpg") as preview:
        preview.load()


def test_without_a_file_the_url_is_printed_and_readable(url: str) -> None:
    done = call(url, "generate", "--workflow", "trivial", "-p", "size=32")
    with Client(url) as client:
        job = client.jobs(limit=1).data[0]
        assert done.stdout.partition("?")[0].strip() == job.outputs[0].url.partition("?")[0]
        with Image.open(io.BytesIO(client.download(job.outputs[0]))) as picture:
            assert picture.size == (32, 32)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["generate", "x", "--width", "13"], ["error: 'width' is 13", "hint: "]),
        (["generate", "x", "--lora", "nope"], ["error: There is no LoRA 'nope'", "hint: "]),
        (["generate", "--workflow", "failing"], ["error: "]),
        (["cancel", "gen_0"], ["error: There is no generation 'gen_0'"]),
        (["jobs", "--status", "odd"], ["error: status"]),
        (["--url", "http://127.0.0.1:1", "loras"], ["error: http://127.0.0.1:1 does not answer", "hint: "]),
        (["generate", "--workflow", "trivial", "-o", f"{__file__}/out.png"], ["error: "]),
    ],
)
def test_errors_are_a_message_and_a_hint(url: str, arguments: list[str], said: list[str]) -> None:
    failed = call(url, *arguments)
    assert failed.returncode == 1
    assert failed.stdout == ""
    assert "Traceback" not in failed.stderr
    assert all(any(line.startswith(part) for line in failed.stderr.splitlines()) for part in said), failed.stderr


def test_lists_are_tab_separated_in_a_pipe(url: str) -> None:
    assert "tok" in [line.split("\t")[0] for line in call(url, "loras").stdout.splitlines()]
    assert "flux" in [line.split("\t")[0] for line in call(url, "workflows").stdout.splitlines()]
    call(url, "generate", "two\nlines\tand a tab", *SMALL)
    newest = call(url, "jobs", "--status", "succeeded", "--limit", "1").stdout
    assert newest.splitlines()[0].split("\t")[1] == "succeeded"
    assert newest.rstrip("\n").split("\t")[4] == "two lines and a tab"


def test_cancel_stops_a_running_job(url: str, slow_job: tuple[subprocess.Popen[bytes], IO[bytes], str]) -> None:
    process, stderr, job_id = slow_job
    assert call(url, "cancel", job_id).stdout.startswith(f"{job_id} is cancel")
    assert b"canceled" in stderr.read()
    assert process.wait(PATIENCE_S) == 1


def test_ctrl_c_in_a_script_cancels_the_job(url: str, slow_job: tuple[subprocess.Popen[bytes], IO[bytes], str]) -> None:
    process, stderr, job_id = slow_job
    process.send_signal(signal.SIGINT)
    assert f"{job_id} is cancel" in stderr.read().decode()
    assert process.wait(PATIENCE_S) == INTERRUPTED
    with Client(url) as client:
        assert client.wait(job_id).status == "canceled"


@pytest.mark.parametrize(("answer", "goes_on"), [(b"y\n", False), (b"n\n", True)])
def test_ctrl_c_on_a_terminal_asks(url: str, answer: bytes, goes_on: bool) -> None:
    terminal, theirs = pty.openpty()
    with start_slow_job(url, theirs, theirs) as process:
        os.close(theirs)
        job_id = read_job_id(read_terminal(terminal, until=b"seed"))
        process.send_signal(signal.SIGINT)
        question = read_terminal(terminal, until=b"?")
        os.write(terminal, answer)
        said = (question + read_terminal(terminal)).decode()
    os.close(terminal)
    assert process.returncode == INTERRUPTED
    assert f"Cancel {job_id}?" in said
    with Client(url) as client:
        if goes_on:
            assert not client.get(job_id).is_terminal
            assert f"fluxgate cancel {job_id}" in said
            client.cancel(job_id)
        assert client.wait(job_id).status == "canceled"


def read_terminal(terminal: int, until: bytes | None = None) -> bytes:
    """What comes until those bytes, else until the program has closed its end."""
    said = b""
    try:
        while until is None or until not in said:
            chunk = os.read(terminal, 4096)
            if not chunk:
                break
            said += chunk
    except OSError:
        # How Linux says that the other end is closed.
        pass
    return said


def test_a_lora_is_a_name_and_perhaps_a_weight() -> None:
    assert parse_lora("tok") == Lora(name="tok", weight=1.0)
    assert parse_lora("a/b:c:0.8") == Lora(name="a/b:c", weight=0.8)
    assert parse_lora("style:v2") == Lora(name="style:v2", weight=1.0)
    assert parse_lora("x:-1") == Lora(name="x", weight=-1.0)


def test_a_parameter_is_json_where_it_can_be() -> None:
    assert parse_parameter("steps=4") == ("steps", 4)
    assert parse_parameter("sampler=euler") == ("sampler", "euler")
    assert parse_parameter('a="4"') == ("a", "4")
    assert parse_parameter("a=b=c") == ("a", "b=c")
    with pytest.raises(typer.BadParameter):
        parse_parameter("steps")


def test_one_picture_keeps_its_name() -> None:
    assert choose_paths(Path("d/out.png"), 1) == [Path("d/out.png")]
    assert choose_paths(Path("d/out.png"), 2) == [Path("d/out-1.png"), Path("d/out-2.png")]


def test_progress_says_what_is_known() -> None:
    assert describe_progress(Progress(current_node="Sampler", current_node_class="KSampler", step=7, steps=20)) == (
        "Sampler (KSampler), step 7/20"
    )
    assert describe_progress(Progress()) == ""
