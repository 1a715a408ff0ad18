"""The laptop deployment's servers: real programs, started, broken and stopped as a person would."""

from __future__ import annotations

import os
import platform
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import boto3
import httpx
import pytest
import redis
from botocore.config import Config
from botocore.exceptions import ClientError

from local.child import LEASH, ROOT, Child, ChildError, pick_free_port
from local.services import RedisServer, S3Server, load_credentials
from local.up import StartRefused, choose_port, lock_state, plan_deployment, read_port, require_free, running
from tests.conftest import EngineFactory, S3Access

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

ALWAYS_READY: Callable[[], str | None] = lambda: None  # noqa: E731


def wait_until(holds: Callable[[], bool], what: str, timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, f"{what} did not happen in {timeout_s} s"
        time.sleep(0.02)


def read_process(pid: int, column: str) -> str:
    """What `ps` says about a process: its command line (`args`), its state (`stat`). Empty when it is gone."""
    return subprocess.run(["ps", "-ww", "-o", f"{column}=", "-p", str(pid)], capture_output=True, text=True, check=False).stdout.strip()


def is_gone(pid: int) -> bool:
    """Gone, or dead and only waiting for its new parent to notice."""
    state = read_process(pid, "stat")
    return not state or state.startswith("Z")


def make_child(tmp_path: Path, code: str, **options: float) -> Child:
    return Child("snake", [sys.executable, "-c", code], log_path=tmp_path / "snake.log", is_ready=ALWAYS_READY, **options)  # type: ignore[arg-type]


def connect_s3(access: S3Access, secret: str | None = None) -> S3Client:
    return boto3.client(
        "s3",
        endpoint_url=access.endpoint_url,
        aws_access_key_id=access.access_key_id,
        aws_secret_access_key=secret or access.secret_access_key,
        region_name="us-east-1",
        config=Config(signature_version="s3v4", s3={"addressing_style": "path"}, retries={"total_max_attempts": 1}),
    )


def test_redis_keeps_its_data_over_a_crash(tmp_path: Path) -> None:
    server = RedisServer(tmp_path, pick_free_port())
    server.start()
    try:
        server.wait_ready()
        with redis.Redis.from_url(server.url) as connection:
            connection.set("yesterday", "job")
        server.kill()
        assert not server.is_alive()
        server.start()
        server.wait_ready()
        with redis.Redis.from_url(server.url, decode_responses=True) as connection:
            assert connection.get("yesterday") == "job"
            assert connection.config_get("appendonly")["appendonly"] == "yes"
            assert connection.config_get("bind")["bind"] == "127.0.0.1"
    finally:
        server.stop()


def test_redis_url_is_empty_for_each_test(redis_url: str) -> None:
    with redis.Redis.from_url(redis_url) as connection:
        assert connection.dbsize() == 0
        connection.set("left", "behind")


def test_redis_url_is_empty_again(redis_url: str) -> None:
    with redis.Redis.from_url(redis_url) as connection:
        assert connection.dbsize() == 0


def test_s3_stores_for_the_key_and_refuses_another(s3: S3Access) -> None:
    client = connect_s3(s3)
    client.create_bucket(Bucket=s3.bucket)
    client.put_object(Bucket=s3.bucket, Key="generations/a/0.png", Body=b"bytes", ContentType="image/png")
    url = client.generate_presigned_url("get_object", Params={"Bucket": s3.bucket, "Key": "generations/a/0.png"})
    answer = httpx.get(url)
    assert (answer.status_code, answer.content, answer.headers["content-type"]) == (200, b"bytes", "image/png")
    assert httpx.get(f"{s3.endpoint_url}/{s3.bucket}/generations/a/0.png").is_client_error
    with pytest.raises(ClientError, match="SignatureDoesNotMatch"):
        connect_s3(s3, secret="wrong").put_object(Bucket=s3.bucket, Key="x", Body=b"")


def test_the_s3_secret_is_for_the_owner_alone(s3_server: S3Server) -> None:
    path = s3_server.credentials_path
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert load_credentials(path) == s3_server.credentials
    assert len(s3_server.credentials.access_key_id) >= 20
    command_line = read_process(s3_server.pid, "args")
    assert "serve s3" in command_line
    assert s3_server.credentials.secret_access_key not in command_line


def test_a_broken_key_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "keys.json").write_text("{}")
    with pytest.raises(ChildError, match=r"keys\.json"):
        load_credentials(tmp_path / "keys.json")


def test_an_engine_comes_back_on_its_port(engine_factory: EngineFactory) -> None:
    engine = engine_factory()
    first_pid = engine.pid
    assert httpx.get(f"{engine.url}/system_stats").status_code == 200
    engine.kill()
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{engine.url}/system_stats")
    engine.start()
    engine.wait_ready()
    assert engine.pid != first_pid
    assert httpx.get(f"{engine.url}/system_stats").status_code == 200


def test_a_death_is_told_in_one_line_with_the_last_words(tmp_path: Path) -> None:
    child = make_child(tmp_path, "import sys; print('cannot bind'); sys.exit(3)")
    child.start()
    wait_until(lambda: not child.is_alive(), "the end")
    with pytest.raises(ChildError, match=r"^snake ended with status 3: cannot bind \(log: .*snake\.log\)$"):
        child.check()
    child.stop()


def test_a_child_that_never_gets_ready_is_given_up(tmp_path: Path) -> None:
    child = Child(
        "deaf",
        [sys.executable, "-c", "import time; time.sleep(60)"],
        log_path=tmp_path / "deaf.log",
        is_ready=lambda: "no answer yet",
        ready_timeout_s=0.1,
    )
    child.start()
    try:
        with pytest.raises(ChildError, match=r"deaf is not ready after 0\.1 s: no answer yet"):
            child.wait_ready()
    finally:
        child.stop()


def test_a_child_deaf_to_sigterm_is_killed(tmp_path: Path) -> None:
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(600)"
    child = make_child(tmp_path, code, grace_s=0.2)
    child.start()
    wait_until(lambda: "deaf" in child.log_path.read_text(), "the handler")
    pid = child.pid
    child.stop()
    assert is_gone(pid)


def test_a_missing_program_is_named(tmp_path: Path) -> None:
    child = Child("ghost", [str(tmp_path / "no-such-program")], log_path=tmp_path / "log", is_ready=ALWAYS_READY)
    with pytest.raises(ChildError, match=r"ghost: the program .*no-such-program is missing"):
        child.start()


PARENT = """
import sys, time
from pathlib import Path
from local.child import Child
child = Child("sleeper", [sys.executable, "-c", "import time; time.sleep(600)"], log_path=Path(sys.argv[1]), is_ready=lambda: None)
child.start()
print(child.pid, flush=True)
time.sleep(600)
"""


def test_a_child_dies_with_its_parent_even_by_kill_9(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path / "log")], cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child_pid = int(parent.stdout.readline())
        assert not is_gone(child_pid)
        parent.kill()
    wait_until(lambda: is_gone(child_pid), "the child's death")


def test_the_pipe_leash_kills_when_the_pipe_closes() -> None:
    """What systems without the kernel's leash use; it works on this one too."""
    read_fd, write_fd = os.pipe()
    code = f"from local import leash; leash.tie_by_pipe({read_fd}); import os, sys; os.execv('/bin/sleep', ['sleep', '600'])"
    program = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, pass_fds=(read_fd,))
    os.close(read_fd)
    wait_until(lambda: read_process(program.pid, "args").startswith("sleep"), "the exec")
    assert program.poll() is None
    os.close(write_fd)
    assert program.wait(20) == -signal.SIGKILL


@pytest.mark.skipif(platform.system() != "Linux", reason="only Linux has a kernel's leash")
def test_the_leash_refuses_a_parent_that_is_gone() -> None:
    arguments = [str(1 << 30), "0", "/bin/echo", "alive"]
    answer = subprocess.run([sys.executable, "-I", "-S", str(LEASH), *arguments], capture_output=True, text=True, check=False)
    assert answer.returncode == 1
    assert answer.stdout == ""
    assert "ended before its child started" in answer.stderr


def test_a_taken_port_is_refused_by_name() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(StartRefused, match=f"127.0.0.1:{port}: Address already in use"):
            require_free("127.0.0.1", port)


@pytest.mark.parametrize("text", ["http", "-1", "65536", "8000.0"])
def test_a_port_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(StartRefused, match="REDIS_PORT"):
        read_port({"REDIS_PORT": text}, "REDIS_PORT")


def test_a_port_is_kept_for_the_next_run_unless_it_is_taken(tmp_path: Path) -> None:
    first = choose_port({}, "S3_PORT", tmp_path)
    assert choose_port({}, "S3_PORT", tmp_path) == first
    assert choose_port({"S3_PORT": "4711"}, "S3_PORT", tmp_path) == 4711
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", first))
        taken.listen()
        assert choose_port({}, "S3_PORT", tmp_path) != first


def test_one_state_folder_serves_one_run(tmp_path: Path) -> None:
    with lock_state(tmp_path):
        with pytest.raises(StartRefused, match=f"in use by process {os.getpid()}"):
            with lock_state(tmp_path):
                pass
    with lock_state(tmp_path):
        pass


def test_given_addresses_replace_their_parts(tmp_path: Path) -> None:
    env = {
        "PORT": "0",
        "REDIS_URL": "redis://elsewhere:6379/3",
        "S3_ENDPOINT_URL": "https://s3.example",
        "AWS_ACCESS_KEY_ID": "id",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "S3_BUCKET": "mine",
        "COMFYUI_URLS": "http://10.0.0.1:8188,http://10.0.0.2:8188",
    }
    plan, _ = plan_deployment(env, tmp_path)
    assert [child.name for child in plan.children] == ["trainer", "gateway"]
    assert plan.gateway_env["REDIS_URL"] == "redis://elsewhere:6379/3"
    assert plan.gateway_env["S3_BUCKET"] == "mine"
    assert plan.gateway_env["COMFYUI_URLS"] == env["COMFYUI_URLS"]
    assert "DEFAULT_BASE_MODEL" not in plan.gateway_env


def test_without_addresses_all_parts_are_embedded(tmp_path: Path) -> None:
    plan, _ = plan_deployment({"PORT": "0"}, tmp_path)
    assert [child.name for child in plan.children] == ["redis", "s3", "engine", "trainer", "gateway"]
    assert plan.gateway_env["DEFAULT_BASE_MODEL"] == "tinyflux"


@pytest.mark.parametrize(
    ("env", "named"),
    [
        ({}, "127.0.0.1"),
        ({"HOST": "0.0.0.0", "PUBLIC_URL": "http://studio.example:8000"}, "studio.example"),
        ({"HOST": "::1"}, "[::1]"),
    ],
)
def test_signed_urls_name_the_host_that_callers_know(tmp_path: Path, env: dict[str, str], named: str) -> None:
    plan, _ = plan_deployment({"PORT": "0", **env}, tmp_path)
    assert plan.gateway_env["S3_PUBLIC_ENDPOINT_URL"].rpartition(":")[0] == f"http://{named}"


def test_behind_a_wildcard_address_signed_urls_do_not_name_it(tmp_path: Path) -> None:
    plan, _ = plan_deployment({"PORT": "0", "HOST": "0.0.0.0"}, tmp_path)
    public = plan.gateway_env["S3_PUBLIC_ENDPOINT_URL"]
    assert "0.0.0.0" not in public
    s3 = next(child for child in plan.children if isinstance(child, S3Server))
    access = S3Access(public, s3.credentials.access_key_id, s3.credentials.secret_access_key, "mine")
    with running([s3]):
        client = connect_s3(access)
        client.create_bucket(Bucket="mine")
        client.put_object(Bucket="mine", Key="a", Body=b"bytes")
        url = client.generate_presigned_url("get_object", Params={"Bucket": "mine", "Key": "a"})
        assert url.startswith(public)
        assert httpx.get(url).content == b"bytes"


def test_an_s3_without_keys_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StartRefused, match="AWS_SECRET_ACCESS_KEY"):
        plan_deployment({"PORT": "0", "S3_ENDPOINT_URL": "http://x", "AWS_ACCESS_KEY_ID": "id"}, tmp_path)
