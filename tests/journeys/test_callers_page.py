"""docs/callers.md as a reader follows it: every block of shell and Python in its order, one session, on a deployment without keys."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import redis
from PIL import Image

from local.services import Gateway, S3Server
from tests.deployment import describe_deployment, make_gateway, running

PAGE = Path(__file__).parents[2] / "docs" / "callers.md"
URL = "http://127.0.0.1:8000"


@pytest.fixture
def gateway(redis_server: str, s3_server: S3Server, engine: str, tmp_path: Path) -> Iterator[Gateway]:
    with redis.Redis.from_url(redis_server) as connection:
        connection.flushall()
        made = make_gateway(tmp_path / "gateway", describe_deployment(redis_server, s3_server, engine))
        with running(made):
            yield made
        # The keys made here would close every other gateway of this Redis.
        connection.flushall()


def read_script(page: str, url: str) -> str:
    """The page as one script that stops at the first command that fails."""
    blocks = re.findall(r"^```(sh|python)\n(.*?)^```", page, re.M | re.S)
    assert {kind for kind, _ in blocks} == {"sh", "python"}
    assert URL in page
    steps = [text if kind == "sh" else f"python3 - <<'PYTHON'\n{text}PYTHON\n" for kind, text in blocks]
    return "set -euo pipefail\n" + "\n".join(steps).replace(URL, url)


def test_the_page_runs_as_it_stands(gateway: Gateway, tmp_path: Path) -> None:
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", read_script(PAGE.read_text(), gateway.url)],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert '"error":{' not in done.stdout, done.stdout
    for said in (" is revoked\n", "event: status", '"last_event_id":', "image_generation.completed", "\nsucceeded "):
        assert said in done.stdout, said
    for name in ("photo.png", "from-comfy-sdk.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.size == (256, 256)


SERVER = """
const ask = fetch;
// The reader's own server: it alone has the key.
globalThis.fetch = () => ask(`${process.env.GATEWAY}/v1/generations/${process.env.JOB}/ticket`, {
  method: "POST", headers: {"Content-Type": "application/json", "Authorization": `Bearer ${process.env.KEY}`}, body: "{}"});
const job = process.env.JOB;
"""
END = '\nsocket.onclose = ({ code }) => console.log("closed with", code);\n'


@pytest.mark.skipif(shutil.which("node") is None, reason="the page's lines for browsers need node")
def test_the_lines_for_browsers_run_as_they_stand(gateway: Gateway, tmp_path: Path) -> None:
    [lines] = re.findall(r"^```js\n(.*?)^```", PAGE.read_text(), re.M | re.S)
    (tmp_path / "page.mjs").write_text(f"{SERVER}{lines}{END}")
    asked = {"prompt": "a green star", "width": 256, "height": 256, "steps": 4}
    job = httpx.post(f"{gateway.url}/v1/generations", json=asked).json()
    # What was made before the first key is the local caller's, and so this key's.
    made = httpx.post(f"{gateway.url}/v1/keys", json={"name": "app", "scopes": ["admin"], "caller": "local"}).json()
    env = {**os.environ, "GATEWAY": gateway.url, "JOB": job["id"], "KEY": made["key"]}
    command = ["node", "--experimental-websocket", "--no-warnings", "page.mjs"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    for said in ("event: 'progress'", "event: 'output'", "status: 'succeeded'", "closed with 1000"):
        assert said in done.stdout, done.stdout
