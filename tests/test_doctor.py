"""The doctor on real servers: a healthy deployment has no fault, and each fault that is planted is found and its remedy named."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import pytest
import redis as sync_redis
from aiohttp import web
from pydantic import SecretStr

from gateway.callers.keys import CallerLimits, KeyStore, mint_key
from gateway.comfy.companion import SAVE_NODE
from gateway.doctor.comfy import _judge_companion, _judge_flags, _judge_version, examine_instances, read_listen
from gateway.doctor.door import examine_door, examine_stream
from gateway.doctor.examine import examine
from gateway.doctor.finding import Finding
from gateway.doctor.hub import examine_hub
from gateway.doctor.loras import examine_loras
from gateway.doctor.redis import examine_redis
from gateway.doctor.trainer import examine_trainer
from gateway.instances import InstanceFacts, InstanceRegistry
from gateway.jobs.model import now_ms
from gateway.redis_client import RedisClient, connect_redis
from gateway.runtime import load_catalog
from gateway.settings import Settings
from gateway.trainings.machines import TrainerMachines
from gateway.trainings.presets import Machine
from local.child import pick_free_port
from local.services import Engine, Gateway, RedisServer, S3Server
from tests.conftest import EngineFactory
from tests.deployment import describe_deployment, make_gateway, running
from tests.doctor_parts import require, states
from tests.hub_server import GATED, Hub, running_hub

ADMIN_KEY = "an-admin-key-for-the-doctor"


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


# -- Redis -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def own_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Redis whose settings may be spoilt."""
    server = RedisServer(tmp_path_factory.mktemp("own-redis"), pick_free_port())
    with running(server):
        yield server.url


async def look_at_redis(url: str) -> list[Finding]:
    client = connect_redis(url)
    try:
        return await examine_redis(client)
    finally:
        await client.aclose(close_connection_pool=True)


def configure(url: str, **values: str) -> None:
    with sync_redis.Redis.from_url(url) as connection:
        for name, value in values.items():
            connection.config_set(name.replace("_", "-"), value)


async def test_a_healthy_redis(own_redis: str) -> None:
    assert states(await look_at_redis(own_redis)) <= {"ok", "skipped", "warning"}


async def test_redis_out_of_reach() -> None:
    require(await look_at_redis(f"redis://127.0.0.1:{pick_free_port()}/0"), "redis.reach", "did not answer", "REDIS_URL")


async def test_redis_without_its_append_only_file(own_redis: str) -> None:
    configure(own_redis, appendonly="no")
    require(await look_at_redis(own_redis), "redis.persistence", "no append-only file", "--appendonly yes")
    configure(own_redis, appendonly="yes")


async def test_redis_that_evicts(own_redis: str) -> None:
    configure(own_redis, maxmemory="100mb", maxmemory_policy="allkeys-lru")
    require(await look_at_redis(own_redis), "redis.eviction", "allkeys-lru", "noeviction")
    configure(own_redis, maxmemory="0")
    require(await look_at_redis(own_redis), "redis.eviction", "allkeys-lru", "noeviction", "warning")
    configure(own_redis, maxmemory_policy="noeviction")


async def test_redis_that_is_nearly_full(own_redis: str) -> None:
    with sync_redis.Redis.from_url(own_redis) as connection:
        used = int(connection.info("memory")["used_memory"])
    configure(own_redis, maxmemory=str(int(used * 1.02)), maxmemory_policy="noeviction")
    require(await look_at_redis(own_redis), "redis.memory", "MB of", "JOB_TTL_S")
    configure(own_redis, maxmemory=str(int(used * 1.4)))
    require(await look_at_redis(own_redis), "redis.memory", "MB of", "JOB_TTL_S", "warning")
    configure(own_redis, maxmemory="0")


async def test_a_state_of_a_newer_program(own_redis: str) -> None:
    with sync_redis.Redis.from_url(own_redis) as connection:
        connection.set("fluxgate:state_version", 99)
        require(await look_at_redis(own_redis), "redis.state", "version 99", "newer program")
        connection.delete("fluxgate:state_version")


# -- ComfyUI and its LoRAs -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def own_engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """An engine whose folders are known here."""
    child = Engine(tmp_path_factory.mktemp("own-engine"), pick_free_port())
    with running(child):
        yield child


def look_at_instances(session: aiohttp.ClientSession, url: str, **changes: Any) -> Any:
    settings = Settings(comfyui_urls=(url,), **{"default_base_model": "tinyflux", **changes})
    return examine_instances(settings, load_catalog(settings), session, settings.comfyui_urls)


async def test_a_healthy_instance(own_engine: Engine, session: aiohttp.ClientSession) -> None:
    findings = await look_at_instances(session, own_engine.url)
    assert "fault" not in states(findings), findings
    assert [each.message for each in findings if each.check == "workflow.flux"] == ["runs with tinyflux"]


async def test_an_instance_that_is_down(session: aiohttp.ClientSession) -> None:
    port = pick_free_port()
    findings = await look_at_instances(session, f"http://127.0.0.1:{port}")
    require(findings, f"comfyui.127.0.0.1-{port}", "did not answer", "Start ComfyUI")


async def test_model_files_that_are_missing(own_engine: Engine, session: aiohttp.ClientSession) -> None:
    findings = await look_at_instances(session, own_engine.url, default_base_model="flux1-dev")
    require(findings, "workflow.flux", "flux1-dev.safetensors", "fluxgate models pull flux1-dev")


async def test_a_node_class_that_is_missing(own_engine: Engine, session: aiohttp.ClientSession, tmp_path: Path) -> None:
    shipped = Path(__file__).parent / "workflows" / "trivial"
    folder = tmp_path / "strange"
    folder.mkdir()
    for file in shipped.iterdir():
        (folder / file.name).write_text(file.read_text())
    graph = json.loads((folder / "graph.json").read_text())
    graph["999"] = {"class_type": "NodeNobodyHas", "inputs": {}, "_meta": {"title": "strange"}}
    saver = next(node for node in graph.values() if node["class_type"] == "SaveImage")
    saver["inputs"]["images"] = ["999", 0]
    (folder / "graph.json").write_text(json.dumps(graph))
    findings = await look_at_instances(session, own_engine.url, workflows_dir=tmp_path, default_workflow="strange")
    require(findings, "workflow.strange", "NodeNobodyHas", "Install the custom nodes that bring NodeNobodyHas")


def test_start_flags_that_are_missing() -> None:
    bare = _judge_flags("comfyui.a", {"argv": ["main.py"]})
    require(bare, "comfyui.a", "sends no previews", "--preview-method auto", "warning")
    require(bare, "comfyui.a", "last prompt's models", "--cache-lru 20", "warning")
    assert _judge_flags("comfyui.a", {"argv": ["main.py", "--preview-method", "auto", "--cache-lru", "20"]}) == []
    assert _judge_companion("comfyui.a", {}, {SAVE_NODE: {}})[0].state == "ok"
    require(_judge_companion("comfyui.a", {}, {}), "comfyui.a", "no companion extension", "docs/companion.md", "warning")
    require([_judge_version("comfyui.a", {"comfyui_version": "0.1"})], "comfyui.a", "0.1, which was not tested", "0.3.64", "warning")


async def test_dispatchers_elsewhere_are_believed(redis: RedisClient, own_redis: str) -> None:
    """The gateway of a cluster reaches no instance: only dispatchers do."""
    settings = Settings(redis_url=own_redis, dispatcher="off", trainer="off")
    checks = {each.check: each.state for each in await examine(settings)}
    assert checks["comfyui"] == "skipped"
    for name, state in (("one", "up"), ("two", "down")):
        await InstanceRegistry(redis).publish(InstanceFacts(id=name, url=f"http://{name}:8188", state=state, seen_ms=now_ms()))
    checks = {each.check: each.state for each in await examine(settings)}
    assert (checks["comfyui.one"], checks["comfyui.two"]) == ("ok", "warning")
    assert not [check for check in checks if check.startswith(("loras", "workflow"))]


async def test_an_instance_that_is_open_to_others(engine_factory: EngineFactory, session: aiohttp.ClientSession) -> None:
    child = engine_factory(flags=("--listen", "0.0.0.0"))
    findings = await look_at_instances(session, child.url)
    require(findings, f"comfyui.127.0.0.1-{child.url.rpartition(':')[2]}", "asks nobody for a key", "--listen 127.0.0.1")


@pytest.mark.parametrize(
    ("argv", "addresses"),
    [
        (["main.py"], ["127.0.0.1"]),
        (["main.py", "--listen"], ["0.0.0.0", "::"]),
        (["main.py", "--listen", "--port", "1"], ["0.0.0.0", "::"]),
        (["main.py", "--listen", "10.0.0.1,127.0.0.1"], ["10.0.0.1", "127.0.0.1"]),
        (["main.py", "--listen=127.0.0.1"], ["127.0.0.1"]),
    ],
)
def test_the_address_it_listens_on_is_read_from_its_command_line(argv: list[str], addresses: list[str]) -> None:
    assert read_listen(argv) == addresses


def look_at_loras(session: aiohttp.ClientSession, url: str, folder: Path | None) -> Any:
    return examine_loras(Settings(lora_dir=folder), session, [url])


async def test_the_folder_of_loras(own_engine: Engine, session: aiohttp.ClientSession, tmp_path: Path) -> None:
    listed = own_engine.base_dir / "models" / "loras"
    before = sorted(listed.iterdir())
    assert states(await look_at_loras(session, own_engine.url, listed)) == {"ok"}
    assert sorted(listed.iterdir()) == before, "nothing is left behind"
    require(await look_at_loras(session, own_engine.url, tmp_path / "absent"), "loras.folder", "is no folder", "Make ")
    require(await look_at_loras(session, own_engine.url, tmp_path), "loras.listed", "does not list", "mount it into both")
    require(await look_at_loras(session, own_engine.url, None), "loras.folder", "not set", "LORA_DIR", "warning")


@pytest.mark.skipif(sys.platform != "linux", reason="a folder that even root cannot write into is /proc")
async def test_a_folder_that_cannot_be_written(own_engine: Engine, session: aiohttp.ClientSession) -> None:
    require(await look_at_loras(session, own_engine.url, Path("/proc")), "loras.folder", "cannot be written", "the right to write")


# -- Hugging Face and the trainer ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with running_hub() as hub:
        yield hub


async def look_at_hub(hub: Hub, token: str | None, base: str = "flux1-dev") -> list[Finding]:
    settings = Settings(hf_endpoint=hub.url, hf_token=SecretStr(token) if token else None, default_base_model=base)
    return await examine_hub(settings, load_catalog(settings))


async def test_a_licence_that_was_not_accepted(hub: Hub) -> None:
    findings = await look_at_hub(hub, "hf_secret")
    require(findings, "hub.access", "gated", f"Accept its licence on {hub.url}/{GATED}")
    assert [each.message for each in findings if each.check == "hub.token"] == ["belongs to somebody"]
    hub.licensed.add("Bearer hf_secret")
    assert states(await look_at_hub(hub, "hf_secret")) == {"ok"}


async def test_a_token_that_nobody_knows(hub: Hub) -> None:
    require(await look_at_hub(hub, "hf_wrong"), "hub.token", "does not know HF_TOKEN", "read scope")
    require(await look_at_hub(hub, None, "no-such-model"), "hub.base_model", "no-such-model", "")


@pytest.fixture
async def redis(own_redis: str) -> AsyncIterator[RedisClient]:
    client = connect_redis(own_redis)
    await client.flushall()
    yield client
    await client.aclose(close_connection_pool=True)


async def look_at_trainer(redis: RedisClient, **changes: Any) -> list[Finding]:
    settings = Settings(**{"trainer": "simpletuner", "default_base_model": "flux1-dev", **changes})
    return await examine_trainer(settings, load_catalog(settings), redis)


async def test_no_interpreter_for_the_trainer(redis: RedisClient, tmp_path: Path) -> None:
    require(await look_at_trainer(redis), "trainer.python", "is not set", "SIMPLETUNER_PYTHON")
    absent = tmp_path / "python"
    require(await look_at_trainer(redis, simpletuner_python=absent), "trainer.python", "does not exist", "Install SimpleTuner")
    wrong = await look_at_trainer(redis, simpletuner_python=Path(sys.executable))
    require(wrong, "trainer.python", "cannot import SimpleTuner", "Install SimpleTuner")
    require(wrong, "trainer.worker", "no worker has reported", "python -m trainer_worker", "warning")


async def test_a_trainer_that_is_too_small(redis: RedisClient) -> None:
    big = {"ram_total_bytes": 64 << 30, "disk_free_bytes": 500 << 30, "gpu": "present", "gpu_name": "L4"}
    await TrainerMachines(redis).publish("box-1", Machine.model_validate({**big, "gpu_total_bytes": 24 << 30}))
    findings = await look_at_trainer(redis)
    assert [each.state for each in findings] == ["skipped", "ok"], findings
    assert "trains flux1-dev in int8" in findings[1].message
    await TrainerMachines(redis).publish("box-1", Machine.model_validate({**big, "gpu_total_bytes": 6 << 30}))
    require(await look_at_trainer(redis), "trainer.machine", "box-1", "larger GPU")
    full = {**big, "gpu_total_bytes": 24 << 30, "disk_free_bytes": 1 << 20}
    await TrainerMachines(redis).publish("box-1", Machine.model_validate(full))
    require(await look_at_trainer(redis), "trainer.machine", "disk", "TRAINING_DIR")


# -- the door --------------------------------------------------------------------------------------------------


async def test_doors_that_stand_open(redis: RedisClient) -> None:
    require(await examine_door(Settings(host="0.0.0.0"), redis), "door.keys", "no API keys", "ADMIN_KEY")
    tunnel = Settings(public_url="https://pictures.example")
    require(await examine_door(tunnel, redis), "door.keys", "leads to pictures.example", "keys create")
    require(await examine_door(Settings(auth="keys"), redis), "door.keys", "no good one", "keys create", "warning")
    key, _ = mint_key("mine", ("admin",))
    await KeyStore(redis).add(key, CallerLimits())
    for settings in (Settings(host="0.0.0.0"), tunnel, Settings(auth="keys")):
        assert states(await examine_door(settings, redis)) == {"ok"}


@pytest.fixture(scope="module")
def gateway(redis_server: str, s3_server: S3Server, own_engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    changes = {"ADMIN_KEY": ADMIN_KEY, "TRAINER": "tiny", "LORA_DIR": str(own_engine.base_dir / "models" / "loras")}
    env = describe_deployment(redis_server, s3_server, own_engine.url, **changes)
    child = make_gateway(tmp_path_factory.mktemp("gateway"), env)
    with running(child):
        yield child


@pytest.mark.parametrize(("holds", "state"), [((), "ok"), (("GET",), "warning"), (("GET", "POST"), "fault")])
async def test_a_tunnel_that_holds_streams_back(
    gateway: Gateway, session: aiohttp.ClientSession, holds: tuple[str, ...], state: str
) -> None:
    async def pass_on(request: web.Request) -> web.StreamResponse:
        async with session.request(request.method, gateway.url + request.path) as answer:
            if request.method in holds:
                return web.Response(body=await answer.read(), content_type="text/event-stream")
            stream = web.StreamResponse()
            await stream.prepare(request)
            async for piece in answer.content.iter_any():
                await stream.write(piece)
            return stream

    app = web.Application()
    app.router.add_route("*", "/{rest:.*}", pass_on)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    findings = await examine_stream(f"http://127.0.0.1:{runner.addresses[0][1]}", session)
    await runner.cleanup()
    assert [each.state for each in findings] == [state], findings
    remedy = {"fault": "proxy_buffering off", "warning": "by POST", "ok": ""}[state]
    assert remedy in (findings[0].remedy or "")


async def test_a_tunnel_that_leads_nowhere(session: aiohttp.ClientSession) -> None:
    require(await examine_stream(f"http://127.0.0.1:{pick_free_port()}", session), "door.stream", "does not answer", "PUBLIC_URL")


def test_admins_get_the_whole_report(gateway: Gateway) -> None:
    assert httpx.get(f"{gateway.url}/ready?full=1").status_code == 401
    headers = {"Authorization": f"Bearer {ADMIN_KEY}"}
    answer = httpx.get(f"{gateway.url}/ready?full=1", headers=headers, timeout=30)
    findings = [Finding.model_validate(each) for each in answer.json()["findings"]]
    assert (answer.status_code, answer.json()["ready"]) == (200, True), findings
    assert {each.check.partition(".")[0] for each in findings} >= {"redis", "s3", "comfyui", "workflow", "loras", "hub", "trainer", "door"}


async def run_command(env: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    def call() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "gateway", "doctor", *arguments]
        return subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, timeout=60, check=False)

    return await asyncio.to_thread(call)


async def test_the_command_says_all_that_is_broken_at_once(own_engine: Engine, tmp_path: Path) -> None:
    """Nothing but ComfyUI is there."""
    nowhere = f"127.0.0.1:{pick_free_port()}"
    env = {
        "REDIS_URL": f"redis://{nowhere}/0",
        "S3_ENDPOINT_URL": f"http://{nowhere}",
        "COMFYUI_URLS": own_engine.url,
        "DEFAULT_BASE_MODEL": "tinyflux",
        "LORA_DIR": str(tmp_path / "absent"),
        "HF_ENDPOINT": f"http://{nowhere}",
    }
    plain, machine, usage = await asyncio.gather(
        run_command(env), run_command(env, "--json", "--url", f"http://{nowhere}"), run_command(env, "--loud")
    )
    assert (plain.returncode, machine.returncode, usage.returncode) == (1, 1, 2), (plain, machine, usage)
    report = json.loads(machine.stdout)
    faults = {each["check"] for each in report["findings"] if each["state"] == "fault"}
    assert (report["ok"], faults) == (False, {"redis.reach", "s3.reach", "loras.folder", "trainer.python", "door.stream"})
    lines = plain.stdout.splitlines()
    assert lines[0].startswith("fault    redis.reach")
    assert lines[1].strip().startswith("-> Start Redis")
    assert lines[-1].startswith("4 faults")


async def test_the_client_asks_the_gateway_where_no_redis_is_named(gateway: Gateway) -> None:
    def call(key: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        env = {name: value for name, value in os.environ.items() if name != "REDIS_URL"}
        command = [sys.executable, "-c", "from fluxgate.cli import main; main()", "doctor", *arguments]
        env |= {"FLUXGATE_URL": gateway.url, "FLUXGATE_API_KEY": key}
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)

    told, refused = await asyncio.gather(asyncio.to_thread(call, ADMIN_KEY), asyncio.to_thread(call, "wrong", "--json"))
    assert told.returncode == 0, told
    assert told.stdout.startswith("ok       redis.reach")
    assert (refused.returncode, refused.stdout) == (1, "")
