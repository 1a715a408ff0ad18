"""compose.cpu.yaml without Docker: the processes that its services name, started with the settings that it gives them, draw a picture.
And `make run` starts the same ones from the same settings."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis

from gateway.settings import Settings
from local.child import ROOT, Child, pick_free_port
from local.services import Gateway, RedisServer, S3Credentials, S3Server, TrainerWorker, ask
from local.up import plan_deployment
from tests.deployment import running
from tests.docker_files import DOCKER, fill, read_command, read_compose, read_environment
from tests.test_docker import draw_secrets

FILES = ("compose.yaml", "compose.cpu.yaml")
# Where things lie and listen differs; what they are does not.
PLACES = {"REDIS_URL", "S3_ENDPOINT_URL", "S3_PUBLIC_ENDPOINT_URL", "COMFYUI_URLS", "LORA_DIR", "MODELS_DIR", "TRAINING_DIR"}
IMAGES = {"gateway": "gateway", "comfyui": "local", "trainer": "local"}


@dataclass
class Composed:
    gateway: Gateway
    admin_key: str
    metrics_url: str
    redis_url: str


def start_command(name: str, service: dict[str, Any]) -> list[str]:
    """The service's command, else its image's, with this python and from this checkout."""
    command = list(service.get("command") or read_command(DOCKER / IMAGES[name] / "Dockerfile"))
    return [sys.executable if command[0] == "python" else command[0].replace("/src", str(ROOT)), *command[1:]]


@pytest.fixture(scope="module")
def composed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Composed]:
    """The services' processes; only addresses, folders and ports are those of this machine."""
    volumes = tmp_path_factory.mktemp("volumes")
    draw_secrets(volumes)
    secrets = {path.name: path.read_text() for path in (volumes / "secrets").iterdir()}
    keys = S3Credentials(secrets["aws_access_key_id"], secrets["aws_secret_access_key"])
    (volumes / "s3-credentials.json").write_text(json.dumps(asdict(keys)))
    store, s3 = RedisServer(volumes, pick_free_port()), S3Server(volumes, pick_free_port())
    ports = {name: pick_free_port() for name in ("engine", "gateway", "metrics")}
    moved = {
        "redis://redis:6379": f"redis://127.0.0.1:{store.port}",
        "http://minio:9000": s3.endpoint_url,
        "http://127.0.0.1:9000": s3.endpoint_url,
        "http://comfyui:8188": f"http://127.0.0.1:{ports['engine']}",
        "/secrets": str(volumes / "secrets"),
        "/loras": str(volumes / "loras"),
        "/training": str(volumes / "training"),
        "/src/": f"{ROOT}/",
        "9464": str(ports["metrics"]),
    }
    services = read_compose(*FILES)

    def settle(name: str) -> dict[str, str]:
        environment: dict[str, str] = read_environment(DOCKER / IMAGES[name] / "Dockerfile") | services[name].get("environment", {})
        environment.pop("PATH")
        for there, here in moved.items():
            environment = {key: value.replace(there, here) for key, value in environment.items()}
        return environment

    # In the container it is a volume inside another.
    (volumes / "models" / "loras").symlink_to(volumes / "loras")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    place = {"PATH": path, "DATA_DIR": str(volumes), "ENGINE_PORT": str(ports["engine"]), "LISTEN": "127.0.0.1"}
    url = f"http://127.0.0.1:{ports['engine']}"
    engine = Child(
        "engine",
        start_command("comfyui", services["comfyui"]),
        env=settle("comfyui") | place,
        log_path=volumes / "logs" / "engine.log",
        is_ready=lambda: ask(f"{url}/system_stats"),
    )
    environment = settle("gateway")
    gateway = Gateway(volumes, environment["HOST"], ports["gateway"], environment)
    gateway.command = start_command("gateway", services["gateway"])
    trainer = TrainerWorker(volumes, store.url, settle("trainer"))
    trainer.command = start_command("trainer", services["trainer"])
    with running(store, s3, engine, trainer, gateway):
        yield Composed(gateway, secrets["admin_key"], f"http://127.0.0.1:{ports['metrics']}", store.url)


def test_it_draws_a_picture_for_whoever_has_the_drawn_key(composed: Composed) -> None:
    body = {"prompt": "a red circle", "width": 256, "height": 256, "steps": 2, "seed": 7}
    with httpx.Client(base_url=composed.gateway.url, timeout=90) as http:
        # It listens on all addresses, so it asks for a key.
        assert http.post("/v1/generations", json=body).status_code == 401
        http.headers["Authorization"] = f"Bearer {composed.admin_key}"
        job = http.post("/v1/generations", json=body, headers={"Prefer": "wait=60"}).json()
        assert job["status"] == "succeeded", job
        # The signed URL needs no key.
        assert httpx.get(job["outputs"][0]["url"]).content[:4] == b"\x89PNG"
        assert {instance["state"] for instance in http.get("/v1/instances").json()["data"]} == {"up"}
    assert "fluxgate_redis_up 1.0" in httpx.get(f"{composed.metrics_url}/metrics").text


def test_the_trainer_waits_for_trainings(composed: Composed) -> None:
    with redis.Redis.from_url(composed.redis_url) as connection:
        assert len(connection.smembers("rq:workers:training")) == 1


def test_make_run_starts_the_same_from_the_same_settings(tmp_path: Path) -> None:
    services = read_compose(*FILES)
    plan, _ = plan_deployment({"PORT": str(pick_free_port())}, tmp_path)
    ours = {child.name: child for child in plan.children}
    names = {"redis": "redis", "s3": "minio", "engine": "comfyui", "trainer": "trainer", "gateway": "gateway"}
    always = {name for name, service in services.items() if name not in ("init", "models") and service.get("profiles") != ["public"]}
    assert set(ours) == set(names)
    assert {names[name] for name in ours} == always
    for name in ("gateway", "trainer"):
        assert ours[name].command == start_command(name, services[name])
    assert f"exec python {' '.join(ours['engine'].command[1:3])} " in (DOCKER / "local" / "start.sh").read_text()
    durable = ("--appendonly", "yes", "--appendfsync", "everysec", "--save", "")
    for command in (ours["redis"].command, services["redis"]["command"]):
        assert "\n".join(durable) in "\n".join(command)
    said = fill(services["gateway"]["environment"], {})
    secrets = {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}
    assert set(plan.gateway_env) <= set(said) | secrets
    assert set(said) | secrets <= {name.upper() for name in Settings.model_fields}
    for name in set(said) & set(plan.gateway_env) - PLACES:
        assert plan.gateway_env[name] == said[name].replace("/src/", f"{ROOT}/"), name
    # What compose alone says is what it is without being said, but for where secrets lie and who may scrape.
    alone = set(said) - set(plan.gateway_env) - {"SECRETS_DIR", "METRICS_PORT"}
    unsaid = Settings.model_construct()
    assert {name: said[name] for name in alone} == {name: getattr(unsaid, name.lower()) or "" for name in alone}
    # One table for both processes, here and there, but for what the gateway alone does.
    waiting = fill(services["trainer"]["environment"], {})
    assert waiting == {name: value for name, value in said.items() if name not in ("METRICS_PORT", "MODELS_DIR")}
    assert plan.gateway_env.items() <= ours["trainer"]._env.items()
