"""`fluxgate models` against a server that speaks the hub's routes: fetched, gone on with, checked, listed, and thrown out again."""

from __future__ import annotations

import hashlib
import json
import os
import pty
import shutil
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from pydantic import SecretStr

from comfy_workflows.base_models import read_base_models
from comfy_workflows.errors import BrokenWorkflow
from gateway.errors import Conflict, FluxgateError
from gateway.instances import InstanceRegistry
from gateway.jobs.model import now_ms
from gateway.models.command import read_models, run_models_command
from gateway.models.folder import ModelFolder
from gateway.models.pulls import collect
from gateway.outside.hub_files import PullFailed
from gateway.redis_client import connect_redis
from gateway.settings import Settings
from tests.hub_server import COMMIT, GATED, Hub, running_hub

# huggingface_hub writes pieces of 10 MiB.
PIECE = 10 << 20
LARGE = Random(1).randbytes(2 * PIECE + 5000)
FILES = {
    "open/model/a.safetensors": LARGE,
    "open/model/deep/vae.safetensors": b"v" * 3000,
    "open/model/b.safetensors": b"b" * 4000,
    f"{GATED}/flux1-dev.safetensors": b"g" * 2000,
}
TABLE = """
[{name}]
title = "{name}"
family = "flux1"
files = {{ unet = "{name}.safetensors", vae = "shared.safetensors" }}
sources.unet = {{ repository = "{repository}", path = "{path}", folder = "diffusion_models" }}
sources.vae = {{ repository = "open/model", path = "deep/vae.safetensors", folder = "vae" }}
size_bytes = 5000
source = "{repository}"
licence = "Some Licence"
gated = false
steps = 4
guidance_scale = 1.0
"""
UNET_A, UNET_B, VAE = "diffusion_models/a.safetensors", "diffusion_models/b.safetensors", "vae/shared.safetensors"


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running_hub() as hub:
        hub.files.update(FILES)
        yield hub


@pytest.fixture
def settings(hub: Hub, tmp_path: Path) -> Settings:
    tables = [("a", "open/model", "a.safetensors"), ("b", "open/model", "b.safetensors"), ("g", GATED, "flux1-dev.safetensors")]
    tables += [("absent", "open/model", "nothing.safetensors")]
    (tmp_path / "workflows").mkdir()
    text = "".join(TABLE.format(name=name, repository=repository, path=path) for name, repository, path in tables)
    (tmp_path / "workflows" / "base_models.toml").write_text(text)
    return Settings(
        hf_endpoint=hub.url,
        hf_token=SecretStr("hf_secret"),
        workflows_dir=tmp_path / "workflows",
        models_dir=tmp_path / "models",
        models_min_free_bytes=0,
        default_base_model="a",
        redis_url="redis://127.0.0.1:1/0",
    )


def root_of(settings: Settings) -> Path:
    assert settings.models_dir is not None
    return settings.models_dir


def listed(settings: Settings, capsys: pytest.CaptureFixture[str]) -> dict[str, list[str]]:
    capsys.readouterr()
    assert run_models_command(["list"], settings) == 0
    return {line.split("\t")[0]: line.split("\t")[1:] for line in capsys.readouterr().out.splitlines()}


def test_a_base_model_is_brought_checked_and_listed(hub: Hub, settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    assert listed(settings, capsys)["a"][0] == "missing"
    assert run_models_command(["pull", "a"], settings) == 0
    said = capsys.readouterr().out
    assert "Some Licence" in said
    assert (root_of(settings) / UNET_A).read_bytes() == LARGE
    found = ModelFolder(root_of(settings)).read().files[UNET_A]
    assert (found.sha256, found.size_bytes, found.commit) == (hashlib.sha256(LARGE).hexdigest(), len(LARGE), COMMIT)
    assert listed(settings, capsys)["a"] == ["complete", "0.0 MB", "Some Licence"]
    assert listed(settings, capsys)["b"] == ["partly", "0.0 MB", "Some Licence", f"without {UNET_B}"]
    assert listed(settings, capsys)["tinyflux"][0] == "built in"
    fetched = len(hub.fetched)
    assert run_models_command(["pull", "a", "b"], settings) == 0
    assert [name for name, _ in hub.fetched[fetched:]] == ["open/model/b.safetensors"], "what is there is not fetched again"
    assert ModelFolder(root_of(settings)).read().files[VAE].base_models == ("a", "b")
    assert not list((root_of(settings) / ".fluxgate" / "incoming").iterdir())


def test_a_line_that_breaks_is_gone_on_with(hub: Hub, settings: Settings) -> None:
    hub.cuts = [PIECE + 100]
    assert run_models_command(["pull", "a"], settings) == 0
    ranges = [asked for name, asked in hub.fetched if name.endswith("a.safetensors")]
    assert ranges == [None, f"bytes={PIECE}-"]
    assert (root_of(settings) / UNET_A).read_bytes() == LARGE


def test_what_a_killed_process_had_fetched_is_not_fetched_again(hub: Hub, settings: Settings) -> None:
    hub.cuts, hub.stalls = [PIECE + 100], True
    assert settings.hf_token is not None
    env = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": settings.hf_token.get_secret_value(),
        "WORKFLOWS_DIR": str(settings.workflows_dir),
        "MODELS_DIR": str(settings.models_dir),
        "MODELS_MIN_FREE_BYTES": "0",
    }
    folder = ModelFolder(root_of(settings))
    part = folder.part(hashlib.sha256(LARGE).hexdigest())
    terminal, theirs = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 100))
    with subprocess.Popen([sys.executable, "-m", "gateway", "models", "pull", "a"], env=env, stderr=theirs) as process:
        os.close(theirs)
        deadline = time.monotonic() + 30
        while not part.exists() or part.stat().st_size < PIECE:
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.02)
        assert b"%" in os.read(terminal, 1 << 16), "a bar"
        with pytest.raises(Conflict):
            run_models_command(["pull", "b"], settings)
        process.kill()
    os.close(terminal)
    assert not (root_of(settings) / UNET_A).exists(), "ComfyUI never lists half a file"
    hub.stalls = False
    hub.woken.set()
    assert run_models_command(["pull", "a"], settings) == 0
    assert hub.fetched[1] == ("open/model/a.safetensors", f"bytes={PIECE}-")
    assert (root_of(settings) / UNET_A).read_bytes() == LARGE


def test_a_file_with_a_wrong_hash_is_thrown_away(hub: Hub, settings: Settings) -> None:
    hub.corrupt.add("open/model/b.safetensors")
    with pytest.raises(PullFailed, match="has the hash") as refused:
        run_models_command(["pull", "b"], settings)
    assert "thrown away" in (refused.value.hint or "")
    assert not (root_of(settings) / UNET_B).exists()
    hub.corrupt.clear()
    assert run_models_command(["pull", "b"], settings) == 0
    assert (root_of(settings) / UNET_B).read_bytes() == FILES["open/model/b.safetensors"]


def test_a_licence_is_asked_for_before_anything_is_fetched(hub: Hub, settings: Settings) -> None:
    with pytest.raises(PullFailed, match="is gated") as refused:
        run_models_command(["pull", "g"], settings)
    assert f"{hub.url}/{GATED}" in (refused.value.hint or "")
    assert "hf_secret" not in f"{refused.value} {refused.value.hint}"
    assert hub.fetched == []
    hub.licensed.add("Bearer hf_secret")
    assert run_models_command(["pull", "g"], settings) == 0


def test_too_little_disk_is_said_before_anything_is_fetched(hub: Hub, settings: Settings) -> None:
    free = shutil.disk_usage(settings.workflows_dir or "/").free
    with pytest.raises(PullFailed, match="left free") as refused:
        run_models_command(["pull", "a"], settings.model_copy(update={"models_min_free_bytes": free}))
    assert "fluxgate models gc" in (refused.value.hint or "")
    assert hub.fetched == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["pull", "flux9"], "no base model 'flux9'"),
        (["pull", "tinyflux"], "comes from built-in"),
        (["pull", "absent"], "404"),
    ],
)
def test_what_cannot_be_pulled_is_refused(settings: Settings, arguments: list[str], said: str) -> None:
    with pytest.raises(FluxgateError, match=said):
        run_models_command(arguments, settings)
    with pytest.raises(FluxgateError, match="MODELS_DIR"):
        run_models_command(arguments, settings.model_copy(update={"models_dir": None}))


def test_files_of_others_are_believed_when_they_are_right_and_never_replaced(settings: Settings) -> None:
    place = root_of(settings) / UNET_B
    place.parent.mkdir(parents=True)
    place.write_bytes(b"mine")
    with pytest.raises(PullFailed, match="is another file"):
        run_models_command(["pull", "b"], settings)
    assert place.read_bytes() == b"mine"
    place.write_bytes(FILES["open/model/b.safetensors"])
    assert run_models_command(["pull", "b"], settings) == 0
    assert set(ModelFolder(root_of(settings)).read().files) == {VAE}


def test_verify_finds_what_changed_and_pull_brings_it_anew(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    run_models_command(["pull", "b"], settings)
    assert run_models_command(["verify"], settings) == 0
    (root_of(settings) / UNET_B).write_bytes(b"B" * 4000)
    (root_of(settings) / VAE).unlink()
    capsys.readouterr()
    assert run_models_command(["verify"], settings) == 1
    said = {line.split("\t")[1]: line.split("\t")[0] for line in capsys.readouterr().out.splitlines()}
    assert said == {UNET_B: "changed", VAE: "missing"}
    (root_of(settings) / UNET_B).unlink()
    run_models_command(["pull", "b"], settings)
    assert run_models_command(["verify"], settings) == 0


def test_what_was_used_longest_ago_makes_room(hub: Hub, settings: Settings) -> None:
    hub.licensed.add("Bearer hf_secret")
    run_models_command(["pull", "a", "b", "g"], settings)
    folder, said = ModelFolder(root_of(settings)), list[str]()
    mine = root_of(settings) / "diffusion_models" / "mine.safetensors"
    mine.write_bytes(b"mine")
    day_ms = 24 * 3600 * 1000
    used = {"b": now_ms() + 5 * day_ms - 6 * day_ms, "g": now_ms() - 2 * day_ms}
    brought = folder.read()
    old = {name: each.model_copy(update={"brought_ms": 0}) for name, each in brought.files.items()}
    folder.write(brought.model_copy(update={"files": old}))
    collect(folder, used, "a", folder.free_bytes() + 1500, said.append, dry_run=True)
    assert [line for line in said if "would remove" in line] == ["would remove diffusion_models/g.safetensors (0.0 MB, g)"]
    collect(folder, used, "a", folder.free_bytes() + 1500, said.append)
    left = sorted(path.name for path in root_of(settings).rglob("*.safetensors"))
    assert left == ["a.safetensors", "b.safetensors", "mine.safetensors", "shared.safetensors"]
    collect(folder, {"b": now_ms()}, "a", 1 << 60, said.append)
    assert (root_of(settings) / UNET_B).exists(), "what is at work stays"
    collect(folder, used, "a", 1 << 60, said.append)
    left = sorted(path.name for path in root_of(settings).rglob("*.safetensors"))
    assert left == ["a.safetensors", "mine.safetensors", "shared.safetensors"], "the default one stays whole, and what is not ours"
    assert "less than is to be" in said[-1]
    assert run_models_command(["verify"], settings) == 0


async def test_the_time_of_the_last_use_is_kept_for_all(redis_url: str) -> None:
    redis: Any = connect_redis(redis_url)
    registry = InstanceRegistry(redis)
    await registry.note_base_models({"a", "b"}, 5)
    await registry.note_base_models({"b"}, 7)
    await registry.note_base_models(set(), 9)
    assert await registry.base_models_used() == {"a": 5, "b": 7}
    await redis.aclose(close_connection_pool=True)


def test_a_manifest_that_cannot_be_read_stops_everything(settings: Settings) -> None:
    run_models_command(["pull", "b"], settings)
    path = root_of(settings) / ".fluxgate" / "manifest.json"
    path.write_text(json.dumps({"files": {"x": {}}}))
    with pytest.raises(FluxgateError, match="cannot be read"):
        run_models_command(["gc", "--min-free-bytes", "1"], settings)


def test_every_base_model_that_ships_can_be_pulled_or_is_built_in(settings: Settings) -> None:
    shipped = {name: model for name, model in read_models(settings).items() if name not in ("a", "b", "g", "absent")}
    assert {name for name, model in shipped.items() if not model.sources} == {"tinyflux"}
    places = {(source.folder, model.files[role]) for model in shipped.values() for role, source in model.sources.items()}
    assert all(folder in ("diffusion_models", "text_encoders", "vae") for folder, _ in places)


def test_sources_that_leave_a_file_out_are_refused(tmp_path: Path) -> None:
    table = TABLE.format(name="x", repository="open/model", path="a.safetensors")
    (tmp_path / "base_models.toml").write_text("\n".join(line for line in table.splitlines() if "sources.vae" not in line))
    with pytest.raises(BrokenWorkflow, match="allowed is all of unet, vae"):
        read_base_models(tmp_path / "base_models.toml")
