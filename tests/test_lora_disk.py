"""Which LoRAs a ComfyUI's folder holds: limits, use, free disk; on a real S3 and a real folder."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from pydantic import SecretStr

from gateway.dispatch.lora_disk import HELD_MS, LoraDisk, choose_kept, rank
from gateway.loras.registry import Lora
from gateway.settings import Settings
from gateway.storage import Storage
from tests.conftest import S3Access

NOW = 10 * HELD_MS
OLD = NOW - 2 * HELD_MS


def make_lora(name: str, created_ms: int = 0, size_bytes: int = 100) -> Lora:
    return Lora(name=name, file=f"{name}.safetensors", sha256=name, size_bytes=size_bytes, created_ms=created_ms)


A, B, C, BIG = make_lora("a", 1), make_lora("b", 2), make_lora("c", 3), make_lora("big", 4, size_bytes=1000)


@pytest.mark.parametrize(
    ("used", "max_bytes", "kept"),
    [
        ({}, 1300, "big c b a"),
        ({}, 300, "c b a"),
        ({}, 200, "c b"),
        ({"a": OLD}, 200, "a c"),
        ({"a": OLD, "b": OLD + 1}, 200, "b a"),
        ({"big": OLD, "a": OLD}, 1050, "big"),
        ({"a": NOW, "b": NOW, "c": NOW}, 200, "c b a"),
        ({"big": NOW}, 200, "big"),
        ({}, 0, ""),
    ],
)
def test_the_last_used_stay_and_what_is_in_use_always_does(used: dict[str, int], max_bytes: int, kept: str) -> None:
    by_file = {f"{name}.safetensors": moment for name, moment in used.items()}
    ranked = rank([A, B, C, BIG], by_file)
    assert " ".join(lora.name for lora in choose_kept(ranked, by_file, max_bytes, NOW)) == kept


@pytest.fixture
async def storage(s3: S3Access) -> AsyncIterator[Storage]:
    settings = Settings(
        s3_endpoint_url=s3.endpoint_url,
        s3_bucket=s3.bucket,
        aws_access_key_id=s3.access_key_id,
        aws_secret_access_key=SecretStr(s3.secret_access_key),
    )
    store = Storage(settings)
    await store.ensure_bucket()
    for lora in (A, B, C):
        await store.put(lora.key, lora.name.encode() * 100, "application/octet-stream")
    yield store
    store.close()


def list_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


async def test_a_used_one_comes_back_and_the_least_used_one_goes(storage: Storage, tmp_path: Path) -> None:
    folder = tmp_path / "loras"
    disk = LoraDisk(folder, storage, 200, 0)
    folder.mkdir()
    (folder / "theirs.safetensors").write_bytes(b"theirs")
    await disk.bring([A, B, C], {}, NOW)
    assert list_names(folder) == ["b.safetensors", "c.safetensors", "theirs.safetensors"]
    await disk.bring([A, B, C], {"a.safetensors": NOW}, NOW)
    assert list_names(folder) == ["a.safetensors", "c.safetensors", "theirs.safetensors"]
    assert (folder / "a.safetensors").read_bytes() == b"a" * 100


async def test_below_the_floor_the_least_used_makes_room(storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk's size cannot be had for a test: how much is free is counted from the folder."""
    folder = tmp_path / "loras"
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(
        "gateway.dispatch.lora_disk.shutil.disk_usage",
        lambda place: usage._replace(free=250 - sum(path.stat().st_size for path in Path(place).iterdir())),
    )
    disk = LoraDisk(folder, storage, 1000, 50)
    await disk.bring([A, B], {}, NOW)
    assert list_names(folder) == ["a.safetensors", "b.safetensors"]
    await disk.bring([A, B, C], {}, NOW)
    assert list_names(folder) == ["b.safetensors", "c.safetensors"], "a, the oldest, made room; then there was none for it"
    await disk.bring([A, B, C], {lora.file: NOW for lora in (B, C)}, NOW)
    assert list_names(folder) == ["b.safetensors", "c.safetensors"], "what is in use makes room for nobody"


async def test_what_cannot_be_fetched_leaves_nothing_behind(storage: Storage, tmp_path: Path) -> None:
    await LoraDisk(tmp_path, storage, 1000, 0).bring([make_lora("absent")], {}, NOW)
    assert list_names(tmp_path) == []
