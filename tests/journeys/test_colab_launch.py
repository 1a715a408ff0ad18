"""The launcher as a person on a rented machine runs it, with the small model where a GPU would be: start, lose the machine, start again."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fluxgate import ApiError, Client
from local.child import pick_free_port

LAUNCH = Path(__file__).parents[2] / "docker" / "colab" / "launch.py"
PATIENCE_S = 120


def call(*arguments: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "S3_", "REDIS_", "FLUXGATE_"))}
    return subprocess.run(
        [sys.executable, str(LAUNCH), *arguments], env=env, capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )


def test_a_machine_that_goes_away_takes_nothing_with_it(tmp_path: Path) -> None:
    folder, keep = tmp_path / "machine", tmp_path / "drive"
    ports = ["--port", str(pick_free_port()), "--s3-port", str(pick_free_port())]
    asked = ["--folder", str(folder), "--keep", str(keep), "--python", sys.executable, "--no-train", *ports]
    started = call("start", *asked)
    assert started.returncode == 0, started.stderr
    try:
        connection = json.loads(call("status", *asked).stdout)
        assert connection["key"] in started.stdout
        with Client(connection["url"], connection["key"]) as client:
            job = client.wait(client.generate("a red circle on a blue background", width=256, height=256, steps=2, seed=7).id)
            assert job.status == "succeeded"
            picture = client.download(job.outputs[0])
        with Client(connection["url"]) as stranger, pytest.raises(ApiError) as caught:
            stranger.jobs()
        assert caught.value.status == 401
        assert "kept" in call("stop", *asked).stdout
        shutil.rmtree(folder)
        again = call("start", *asked)
        assert "brought back" in again.stdout, again.stderr
        with Client(connection["url"], connection["key"]) as client:
            assert client.jobs().data[0].id == job.id
            assert client.download(client.get(job.id).outputs[0]) == picture
    finally:
        call("stop", *asked)
    assert call("status", *asked).returncode == 1
