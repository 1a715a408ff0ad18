"""Records the state folder of an earlier commit: `python -m tests.record_state COMMIT...` writes tests/data/state/COMMIT.tar.xz.

The commit's own code runs as `make run` would run it, makes pictures, a LoRA and whatever else that version has, and is killed with a
job running and others waiting. What it answered last lies beside the state as `recorded.json`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import redis

from local.child import ROOT, pick_free_port

RECORDINGS = Path(__file__).parent / "data" / "state"
WORKFLOW = Path(__file__).parent / "workflows" / "trivial"
PATIENCE_S = 60.0
# Redis writes its file each second; what it acknowledged then is there after a kill.
WRITTEN_S = 1.5
SMALL = {"width": 256, "height": 256, "steps": 4}
# A recording is read for years: nothing in it may run out meanwhile.
ENDLESS = {"QUEUE_TIMEOUT_S": "1e9", "TIMEOUT_S": "1e9", "ASSET_TTL_S": "1000000000"}
KEPT = ("redis", "s3", "s3-credentials.json", "version", "recorded.json")


@contextmanager
def run_commit(tree: Path, state_dir: Path) -> Iterator[tuple[subprocess.Popen[bytes], httpx.Client]]:
    """The commit's deployment; it is killed at the end."""
    port = pick_free_port()
    env = {**os.environ, **ENDLESS, "PYTHONPATH": str(tree), "STATE_DIR": str(state_dir), "PORT": str(port)}
    process = subprocess.Popen([sys.executable, "-m", "local.up"], cwd=tree, env=env, start_new_session=True)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as http:
            wait_for(lambda: answers(http))
            yield process, http
    finally:
        process.kill()
        process.wait()


def answers(http: httpx.Client) -> bool:
    try:
        return http.get("/ready").status_code == 200
    except httpx.HTTPError:
        return False


def wait_for(done: Any) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not done():
        assert time.monotonic() < deadline, "it takes too long"
        time.sleep(0.02)


def finish(http: httpx.Client, kind: str, body: dict[str, Any]) -> dict[str, Any]:
    """Ask for a job and wait until it has succeeded."""
    made = http.post(f"/v1/{kind}", json=body).raise_for_status().json()
    wait_for(lambda: http.get(f"/v1/{kind}/{made['id']}").json()["status"] not in ("queued", "running", "canceling"))
    job: dict[str, Any] = http.get(f"/v1/{kind}/{made['id']}").json()
    assert job["status"] == "succeeded", job
    return job


def train(http: httpx.Client) -> dict[str, Any]:
    with (ROOT / "examples" / "tok.zip").open("rb") as file:
        form = {"name": "toks", "trigger_word": "TOK"}
        dataset = http.post("/v1/datasets?resolution=128", data=form, files={"files": file}).raise_for_status().json()
    body = {"name": "old", "dataset": dataset["id"], "trigger_word": "TOK", "steps": 6, "rank": 4, "resolution": 128, "batch_size": 2}
    job = finish(http, "trainings", body)
    wait_for(lambda: http.get("/v1/loras/old").json().get("ready_on"))
    return job


def redis_url(state_dir: Path) -> str:
    return f"redis://127.0.0.1:{(state_dir / 'ports' / 'redis_port').read_text()}/0"


def keep_for_ever(state_dir: Path) -> None:
    """Take every key's time to live away."""
    with redis.Redis.from_url(redis_url(state_dir)) as connection:
        for key in connection.scan_iter():
            connection.persist(key)


def make_key(tree: Path, state_dir: Path) -> str | None:
    """A key, where that version has them."""
    command = [sys.executable, "-m", "gateway", "keys", "create", "--name", "old", "--caller", "local", "--scopes", "admin"]
    env = {**os.environ, "REDIS_URL": redis_url(state_dir), "PYTHONPATH": str(tree), "PORT": "0"}
    if not list((tree / "gateway").rglob("keys.py")):
        return None
    return subprocess.run(command, cwd=tree, env=env, check=True, capture_output=True, text=True).stdout.strip()


def find_engine(parent: int) -> int:
    listed = subprocess.run(["ps", "-A", "-ww", "-o", "ppid=,pid=,args="], capture_output=True, text=True, check=True).stdout
    rows = [line.split(maxsplit=2) for line in listed.splitlines()]
    return next(int(row[1]) for row in rows if len(row) == 3 and int(row[0]) == parent and "local.engine" in row[2])


def use(tree: Path, state_dir: Path) -> dict[str, Any]:
    """Make what there is to make, and leave jobs behind."""
    with run_commit(tree, state_dir) as (process, http):
        said: dict[str, Any] = {"training": train(http)}
        prompt = {"prompt": "a red circle on a blue background", "seed": 7, **SMALL}
        said["done"] = [finish(http, "generations", prompt), finish(http, "generations", {**prompt, "loras": [{"name": "old"}]})]
        if (batch := http.post("/v1/batches", json={"parameters": prompt, "sweep": {"seed": [7, 8]}})).status_code == 202:
            said["batch"] = batch.json()
            wait_for(lambda: http.get(f"/v1/batches/{said['batch']['id']}").json()["status"] not in ("queued", "running"))
        said |= bring(http, said["done"])
        left = [http.post("/v1/generations", json={**prompt, "steps": 40, "seed": 99}).json()["id"]]
        wait_for(lambda: http.get(f"/v1/generations/{left[0]}").json()["status"] == "running")
        os.kill(find_engine(process.pid), signal.SIGSTOP)
        left += [http.post("/v1/generations", json={**prompt, "seed": seed}).json()["id"] for seed in range(100, 105)]
        said["left"] = [http.get(f"/v1/generations/{job}").json() for job in left]
        said["lora"] = http.get("/v1/loras/old").json()
        said["key"] = make_key(tree, state_dir)
        keep_for_ever(state_dir)
        time.sleep(WRITTEN_S)
    return said


def bring(http: httpx.Client, done: list[dict[str, Any]]) -> dict[str, Any]:
    """An upload and a picture made from it, a workflow put in place and one made by that: where that version has them."""
    said: dict[str, Any] = {}
    picture = http.get(done[0]["outputs"][0]["url"]).content
    if (upload := http.post("/v1/uploads", files={"file": ("old.png", picture, "image/png")})).is_success:
        said["upload"] = upload.json()
        body = {"prompt": "a star", "workflow": "flux-img2img", "image": said["upload"]["id"], "strength": 0.6, "steps": 4, "seed": 7}
        done.append(finish(http, "generations", body))
    texts = {name: (WORKFLOW / name).read_text() for name in ("graph.json", "bindings.toml", "example.json")}
    source = {"graph": json.loads(texts["graph.json"]), "bindings": texts["bindings.toml"], "example": json.loads(texts["example.json"])}
    if (workflow := http.put("/v1/workflows/mine", json=source)).is_success:
        said["workflow"] = workflow.json()
        done.append(finish(http, "generations", {"workflow": "mine", "color": 16711680}))
    return said


def record(commit: str) -> Path:
    with tempfile.TemporaryDirectory() as folder:
        tree, state_dir = Path(folder) / "tree", Path(folder) / "state"
        tree.mkdir()
        archive = subprocess.Popen(["git", "archive", commit], cwd=ROOT, stdout=subprocess.PIPE)
        subprocess.run(["tar", "-x", "-C", str(tree)], stdin=archive.stdout, check=True)
        assert archive.wait() == 0, f"{commit} is not in this history"
        said = use(tree, state_dir)
        (state_dir / "recorded.json").write_text(json.dumps({"commit": commit, **said}, indent=1))
        RECORDINGS.mkdir(parents=True, exist_ok=True)
        target = RECORDINGS / f"{commit}.tar.xz"
        with tarfile.open(target, "w:xz") as tar:
            for name in KEPT:
                if (state_dir / name).exists():
                    tar.add(state_dir / name, name)
    return target


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(record(name))
