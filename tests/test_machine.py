"""What a trainer worker measures of its machine: nvidia-smi's own words, RAM, disk; and when the GPU is given back."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from gateway.dispatch.roster import Roster
from gateway.gpu import GpuLease
from gateway.instances import FleetRegistry, InstanceFacts, InstanceRegistry, instance_id
from gateway.jobs.model import now_ms
from gateway.jobs.store import JobStore
from gateway.loras.registry import LoraRegistry
from gateway.redis_client import RedisClient, connect_redis
from gateway.settings import Settings
from gateway.trainings.machines import TrainerMachines
from gateway.trainings.presets import Machine
from trainer_worker.gpu_turn import GpuTurn
from trainer_worker.machine import MIB, measure, measure_gpu, probe, read_smi


@pytest.fixture
async def client(redis_url: str) -> AsyncIterator[RedisClient]:
    redis = connect_redis(redis_url)
    yield redis
    await redis.aclose(close_connection_pool=True)


TWO = """0, GPU-1c8a3f52-0000-0000-0000-000000000001, NVIDIA L4, 23034, 22563
1, GPU-77aa3f52-0000-0000-0000-000000000002, NVIDIA A100-SXM4-80GB, 81920, 80999
"""


@pytest.mark.parametrize(
    ("visible", "name"),
    [
        (None, "NVIDIA L4"),
        ("0", "NVIDIA L4"),
        ("1", "NVIDIA A100-SXM4-80GB"),
        ("1,0", "NVIDIA A100-SXM4-80GB"),
        ("GPU-77aa", "NVIDIA A100-SXM4-80GB"),
    ],
)
def test_the_gpu_is_the_first_that_a_trainer_may_see(visible: str | None, name: str) -> None:
    assert read_smi(TWO, visible)["gpu_name"] == name


@pytest.mark.parametrize(("text", "visible"), [("", None), ("No devices were found\n", None), (TWO, "7"), (TWO, "-1"), (TWO, "")])
def test_no_gpu_is_told_from_one_that_was_not_measured(text: str, visible: str | None) -> None:
    assert read_smi(text, visible) == {"gpu": "absent"}
    assert read_smi("0, GPU-1, NVIDIA GB10, [N/A], [N/A]\n") == {"gpu": "present", "gpu_name": "NVIDIA GB10"}


def make_smi(folder: Path, says: str, status: int = 0) -> dict[str, str]:
    """A PATH with an nvidia-smi that says this."""
    program = folder / "nvidia-smi"
    (folder / "says").write_text(says)
    program.write_text(f"#!/bin/sh\ncat '{folder}/says'\nexit {status}\n")
    program.chmod(0o755)
    return {"PATH": f"{folder}:/usr/bin:/bin"}


def test_nvidia_smi_is_asked_where_there_is_one(tmp_path: Path) -> None:
    found = Machine.model_validate(measure_gpu(None, make_smi(tmp_path, TWO)))
    assert (found.gpu, found.gpu_total_bytes, found.gpu_free_bytes) == ("present", 23034 * MIB, 22563 * MIB)
    broken = make_smi(tmp_path, "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.\n", status=9)
    assert measure_gpu(None, broken) == {}
    assert measure_gpu(None, {"PATH": "/nowhere"}) == {}


def test_torch_is_asked_in_an_interpreter_of_its_own(tmp_path: Path) -> None:
    assert Machine.model_validate(probe(Path(sys.executable))).gpu in ("absent", "present")
    bare = tmp_path / "python"
    bare.write_text("#!/bin/sh\nexit 1\n")
    bare.chmod(0o755)
    assert probe(bare) == probe(tmp_path / "absent") == {}
    assert "torch" not in sys.modules["trainer_worker.machine"].__dict__


def test_ram_and_disk_are_measured_also_before_the_folder_is_there(tmp_path: Path) -> None:
    machine = measure(Settings(trainer="tiny", training_dir=tmp_path / "not" / "yet"))
    assert machine.gpu == "unknown"
    assert 0 < (machine.ram_free_bytes or 0) <= (machine.ram_total_bytes or 0)
    assert (machine.disk_free_bytes or 0) > 0


async def test_the_last_report_of_each_worker_is_known(client: RedisClient) -> None:
    machines = TrainerMachines(client)
    assert await machines.all() == {}
    await machines.publish("a", Machine(gpu="absent"))
    await machines.publish("b", Machine(gpu_total_bytes=1))
    await machines.publish("a", Machine(gpu="present"))
    assert {name: machine.gpu for name, machine in (await machines.all()).items()} == {"a": "present", "b": "unknown"}


class Memory:
    """Free bytes as they are measured, one after the other; the last one stays."""

    def __init__(self, *free: int | None) -> None:
        self.free = list(free)

    async def __call__(self) -> int | None:
        return self.free.pop(0) if len(self.free) > 1 else self.free[0]


@pytest.fixture
def lease(client: RedisClient) -> GpuLease:
    return GpuLease(client, "g")


async def test_the_gpu_is_given_back_once_its_memory_is_free_again(client: RedisClient, lease: GpuLease) -> None:
    memory = Memory(80 << 30, 20 << 30, 50 << 30, 80 << 30)
    turn = GpuTurn(lease, "trn_1", 30, InstanceRegistry(client), memory)
    holders: list[str | None] = []

    async def tell(stage: str, message: str) -> None:
        holders.append(await lease.holder())

    await turn.take(threading.Event(), tell)
    assert await lease.holder() == "trn_1"
    await turn.give_back(tell)
    assert holders == ["trn_1", "trn_1"], "held while memory was still missing, twice"
    assert memory.free == [80 << 30]
    assert await lease.holder() is None
    await turn.keep()
    assert await lease.holder() is None, "what was given back is not renewed"


async def test_a_gpu_that_cannot_be_measured_is_given_back_at_once(client: RedisClient, lease: GpuLease) -> None:
    turn = GpuTurn(lease, "trn_1", 30, InstanceRegistry(client), Memory(None))

    async def tell(stage: str, message: str) -> None:
        raise AssertionError(message)

    await turn.take(threading.Event(), tell)
    await turn.give_back(tell)
    assert await lease.holder() is None


async def test_a_training_waits_for_the_instances_on_its_gpu_alone(client: RedisClient, lease: GpuLease) -> None:
    registry = InstanceRegistry(client)
    for name, state, gpu in (("near", "up", "g"), ("dead", "down", "g"), ("next", "up", "h"), ("far", "up", None)):
        await registry.publish(InstanceFacts(id=name, url=f"http://{name}:8188", state=state, seen_ms=now_ms(), shared_gpu=gpu))
    turn = GpuTurn(lease, "trn_1", 30, registry, Memory(None))
    told = list[str]()

    async def tell(stage: str, message: str) -> None:
        told.append(message)
        await lease.say_drained("trn_1", "near")

    await turn.take(threading.Event(), tell)
    assert len(told) == 1, "for that one, and for no other"


async def test_only_the_instances_on_its_gpu_stand_back(client: RedisClient, lease: GpuLease) -> None:
    near, far = "http://127.0.0.1:9", "http://localhost:9"
    settings = Settings(comfyui_urls=(near, far), shared_gpu="g", shared_gpu_urls=(near,))
    assert await lease.take("trn_1", 30)
    async with aiohttp.ClientSession() as session, asyncio.TaskGroup() as group:
        stores = JobStore(client, ttl_s=60), InstanceRegistry(client), FleetRegistry(client), LoraRegistry(client)
        roster = Roster(settings, session, *stores, lease, asyncio.Event())
        following = group.create_task(roster.follow(group))
        for _ in range(1500):
            if await lease.drained("trn_1"):
                break
            await asyncio.sleep(0.02)
        assert {each.url: each.yielding for each in roster.instances.values()} == {near: True, far: False}
        assert await lease.drained("trn_1") == {instance_id(near)}
        following.cancel()
        for tasks in roster._watches.values():
            for task in tasks:
                task.cancel()


async def test_only_its_holder_gives_a_gpu_back(client: RedisClient, lease: GpuLease) -> None:
    registry = InstanceRegistry(client)
    first, second = (GpuTurn(lease, name, 30, registry, Memory(None)) for name in ("trn_1", "trn_2"))

    async def tell(stage: str, message: str) -> None:
        await asyncio.sleep(0)

    await first.take(threading.Event(), tell)
    await second.let_go()
    assert await lease.holder() == "trn_1"
    stop = threading.Event()
    stop.set()
    await second.take(stop, tell)
    assert await lease.holder() == "trn_1"
