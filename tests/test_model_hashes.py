"""Hashes of a models folder: of which files, when they are found again, and where they are from."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from gateway.instances import InstanceRegistry
from gateway.models.folder import Brought, Manifest, ModelFolder
from gateway.models.hashes import ModelHashes
from gateway.redis_client import RedisClient

pytest_plugins = ["tests.store_fixtures"]

FILES = ("ae.safetensors", "sub/one.safetensors", "clip_l.safetensors")
OLD_S = 1_700_000_000


def put(root: Path, place: str, content: bytes, changed_s: int | None = OLD_S) -> str:
    """Its sha256."""
    path = root / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    if changed_s is not None:
        os.utime(path, (changed_s, changed_s))
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def registry(redis_client: RedisClient) -> InstanceRegistry:
    return InstanceRegistry(redis_client)


async def test_files_of_base_models_are_known_by_the_names_that_comfyui_lists(registry: InstanceRegistry, tmp_path: Path) -> None:
    root = tmp_path / "models"
    ae, one = put(root, "vae/ae.safetensors", b"a"), put(root, "diffusion_models/sub/one.safetensors", b"1")
    put(root, "vae/other.safetensors", b"of no base model")
    (root / "unet").mkdir()
    (root / "unet" / "ae.safetensors").symlink_to("/nowhere")
    put(root, ".fluxgate/incoming/ae.safetensors", b"not whole")
    put(root, "text_encoders/clip_l.safetensors", b"just written", changed_s=None)
    await ModelHashes(registry, root, FILES).look()
    assert await registry.hashes_by_name() == {"ae.safetensors": ae, "sub/one.safetensors": one}


async def test_what_changes_is_read_again_and_what_does_not_is_not(registry: InstanceRegistry, tmp_path: Path) -> None:
    hashes = ModelHashes(registry, tmp_path, FILES)
    first = put(tmp_path, "vae/ae.safetensors", b"a")
    await hashes.look()
    put(tmp_path, "vae/ae.safetensors", b"b")
    # Same size, same time: as far as one sees without reading it is the same, for other processes too.
    for looks in (hashes, ModelHashes(registry, tmp_path, FILES)):
        await looks.look()
        assert await registry.hashes_by_name() == {"ae.safetensors": first}
    second = put(tmp_path, "vae/ae.safetensors", b"c", OLD_S + 1)
    await hashes.look()
    assert await registry.hashes_by_name() == {"ae.safetensors": second}


async def test_a_name_that_stands_for_two_files_has_no_hash(registry: InstanceRegistry, tmp_path: Path) -> None:
    same = put(tmp_path, "vae/clip_l.safetensors", b"same")
    put(tmp_path, "text_encoders/clip_l.safetensors", b"same")
    hashes = ModelHashes(registry, tmp_path, FILES)
    await hashes.look()
    assert await registry.hashes_by_name() == {"clip_l.safetensors": same}
    put(tmp_path, "text_encoders/clip_l.safetensors", b"else")
    os.utime(tmp_path / "text_encoders/clip_l.safetensors", (OLD_S + 5, OLD_S + 5))
    await hashes.look()
    assert await registry.hashes_by_name() == {}


@pytest.mark.parametrize(("changed_s", "is_trusted"), [(OLD_S, True), (OLD_S + 100, False)])
async def test_a_file_that_was_brought_is_not_read(registry: InstanceRegistry, tmp_path: Path, changed_s: int, is_trusted: bool) -> None:
    """Unless it was changed since."""
    real = put(tmp_path, "vae/ae.safetensors", b"whatever", changed_s)
    told = {"repository": "r", "path": "p", "commit": "c", "licence": "l", "base_models": ("flux1-dev",)}
    brought = Brought(sha256="f" * 64, size_bytes=8, brought_ms=(OLD_S + 50) * 1000, **told)
    folder = ModelFolder(tmp_path)
    with folder.alone():
        folder.write(Manifest(files={"vae/ae.safetensors": brought}))
    await ModelHashes(registry, tmp_path, FILES).look()
    assert await registry.hashes_by_name() == {"ae.safetensors": "f" * 64 if is_trusted else real}
