"""`python -m local.up`: a whole deployment on this machine, from one command to one Ctrl-C.
It knows what to start, in which order, and what an address given from outside replaces."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from urllib.parse import urlsplit

import local.tinyflux
from gateway.state_version import STATE_VERSION, StateRefused, require_known
from local.child import Child, ChildError, pick_free_port
from local.services import LOOPBACK, Engine, Gateway, RedisServer, S3Server, TrainerWorker

WATCH_S = 0.2
DEFAULT_PORT = 8000
MAX_PORT = 65535
BUCKET = "fluxgate"
EXAMPLE = '{"prompt": "a red circle on a blue background", "seed": 7}'


class StartRefused(Exception):
    """What the person has to change before anything can start, in one line."""


def read_port(env: Mapping[str, str], name: str) -> int | None:
    """A port from the environment; None when it is unset, a free one for 0."""
    text = env.get(name)
    if not text:
        return None
    if not text.isdecimal() or int(text) > MAX_PORT:
        raise StartRefused(f"{name}={text!r} is no port; allowed: 0 (any free one) to {MAX_PORT}")
    return int(text) or pick_free_port()


def choose_port(env: Mapping[str, str], name: str, state_dir: Path) -> int:
    """The environment's port, else the last run's where it is still free, else any free one.

    Remembered, because addresses outlive a run: signed picture URLs name S3's, and the gateway knows an instance by its own.
    """
    port = read_port(env, name)
    if port is None:
        note = state_dir / "ports" / name.lower()
        port = int(note.read_text()) if note.exists() else pick_free_port()
        try:
            require_free("127.0.0.1", port)
        except StartRefused:
            port = pick_free_port()
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(str(port))
    return port


def require_free(host: str, port: int) -> None:
    """StartRefused when the gateway could not listen there."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            # As servers do: a connection of the last run that still lingers does not count.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise StartRefused(f"cannot listen on {host}:{port}: {error.strerror}; choose another with PORT=8001 make run") from error


@contextmanager
def lock_state(state_dir: Path) -> Iterator[None]:
    """Hold the state folder for this process. The system lets go of the lock however we end."""
    state_dir.mkdir(parents=True, exist_ok=True)
    with (state_dir / "lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise StartRefused(f"{state_dir} is in use by process {holder}; stop that one or choose another with STATE_DIR=...") from error
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def stamp_state(state_dir: Path) -> None:
    """Note in the folder which version its state has. StartRefused for a folder of a newer program; older ones have had no other shape."""
    note = state_dir / "version"
    text = note.read_text().strip() if note.exists() else "0"
    if not text.isdecimal():
        raise StartRefused(f"{note} holds {text[:40]!r}, which is no version; restore the folder, or choose another with STATE_DIR=...")
    try:
        require_known(int(text), str(state_dir))
    except StateRefused as error:
        raise StartRefused(f"{error.message} {error.hint}") from error
    note.write_text(f"{STATE_VERSION}\n")


@dataclass
class Deployment:
    """What runs here, in starting order, and what the gateway is told about the rest."""

    children: list[Child] = field(default_factory=list)
    addresses: dict[str, str] = field(default_factory=dict)
    gateway_env: dict[str, str] = field(default_factory=dict)


def plan_redis(plan: Deployment, env: Mapping[str, str], state_dir: Path) -> None:
    url = env.get("REDIS_URL")
    if not url:
        server = RedisServer(state_dir, choose_port(env, "REDIS_PORT", state_dir))
        plan.children.append(server)
        url = server.url
    plan.addresses["redis"] = url
    plan.gateway_env["REDIS_URL"] = url


def name_to_callers(env: Mapping[str, str], host: str) -> str:
    """The host by which callers know this machine: PUBLIC_URL's, HOST itself, or behind a wildcard the address of its way out."""
    if public := urlsplit(env.get("PUBLIC_URL") or "").hostname:
        return f"[{public}]" if ":" in public else public
    if host not in ("0.0.0.0", "::"):
        return f"[{host}]" if ":" in host else host
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            # Nothing is sent: connecting a datagram socket only looks up the route. 192.0.2.1 is nobody's.
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return LOOPBACK
        return str(probe.getsockname()[0])


def plan_s3(plan: Deployment, env: Mapping[str, str], state_dir: Path) -> None:
    url = env.get("S3_ENDPOINT_URL")
    if url:
        missing = [name for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY") if not env.get(name)]
        if missing:
            raise StartRefused(f"S3_ENDPOINT_URL={url} needs {' and '.join(missing)} beside it")
        bucket, region = env.get("S3_BUCKET") or BUCKET, env.get("S3_REGION") or "us-east-1"
        keys = {name: env[name] for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")}
    else:
        port, host = choose_port(env, "S3_PORT", state_dir), env.get("HOST") or LOOPBACK
        server = S3Server(state_dir, port, host)
        # Signed URLs name an address that callers from outside can reach; all but signed requests are refused there.
        plan.gateway_env["S3_PUBLIC_ENDPOINT_URL"] = env.get("S3_PUBLIC_ENDPOINT_URL") or f"http://{name_to_callers(env, host)}:{port}"
        plan.children.append(server)
        url, bucket, region = server.endpoint_url, BUCKET, "us-east-1"
        keys = {"AWS_ACCESS_KEY_ID": server.credentials.access_key_id, "AWS_SECRET_ACCESS_KEY": server.credentials.secret_access_key}
    plan.addresses["s3"] = f"{url} (bucket {bucket})"
    plan.gateway_env |= {"S3_ENDPOINT_URL": url, "S3_BUCKET": bucket, "S3_REGION": region, **keys}


def plan_comfyui(plan: Deployment, env: Mapping[str, str], state_dir: Path) -> None:
    urls = env.get("COMFYUI_URLS")
    if not urls:
        engine = Engine(state_dir, choose_port(env, "ENGINE_PORT", state_dir), flags=["--warm-up"])
        plan.children.append(engine)
        urls = engine.url
        plan.gateway_env["MODELS_DIR"] = env.get("MODELS_DIR") or str(engine.base_dir.absolute() / "models")
        # An instance from outside keeps the gateway's own default: it holds a real Flux.
        plan.gateway_env["DEFAULT_BASE_MODEL"] = env.get("DEFAULT_BASE_MODEL") or "tinyflux"
        plan.addresses["comfyui"] = f"{urls} (built-in small model: its pictures are toys)"
    else:
        plan.addresses["comfyui"] = urls
    plan.gateway_env["COMFYUI_URLS"] = urls


def plan_training(plan: Deployment, env: Mapping[str, str], state_dir: Path) -> None:
    """The small trainer, or SimpleTuner where SIMPLETUNER_PYTHON names its interpreter; TRAINER=off does without."""
    trainer = env.get("TRAINER") or ("simpletuner" if env.get("SIMPLETUNER_PYTHON") else "tiny")
    plan.gateway_env["TRAINER"] = trainer
    if trainer == "off":
        return
    model_dir = str(Path(local.tinyflux.__file__).parent / "model")
    plan.gateway_env |= {
        # What needs no weights.
        "CAPTION_PROVIDER": env.get("CAPTION_PROVIDER") or "colours",
        "TRAINING_DIR": str(state_dir.absolute() / "training"),
        "BASE_MODEL_PATHS": env.get("BASE_MODEL_PATHS") or json.dumps({"tinyflux": model_dir}),
    }
    if not env.get("COMFYUI_URLS"):
        plan.gateway_env["LORA_DIR"] = str(state_dir.absolute() / "comfyui" / "models" / "loras")
    plan.children.append(TrainerWorker(state_dir, plan.gateway_env["REDIS_URL"], plan.gateway_env))
    plan.addresses["trainer"] = trainer


def plan_deployment(env: Mapping[str, str], state_dir: Path) -> tuple[Deployment, Gateway]:
    """Decide what to start; nothing runs yet. The gateway comes last, it needs all others."""
    host, port = env.get("HOST") or "127.0.0.1", read_port(env, "PORT") or DEFAULT_PORT
    require_free(host, port)
    plan = Deployment()
    plan_redis(plan, env, state_dir)
    plan_s3(plan, env, state_dir)
    plan_comfyui(plan, env, state_dir)
    plan_training(plan, env, state_dir)
    gateway = Gateway(state_dir, host, port, plan.gateway_env)
    plan.children.append(gateway)
    return plan, gateway


@contextmanager
def running(children: list[Child]) -> Iterator[None]:
    """Start all, the slow ones side by side, and stop them in the opposite order whatever happens."""
    started: list[Child] = []
    # The gateway and the trainer need the servers.
    ours = [child for child in children if isinstance(child, Gateway | TrainerWorker)]
    try:
        for group in ([child for child in children if child not in ours], ours):
            for child in group:
                started.append(child)
                child.start()
            for child in group:
                child.wait_ready()
        yield
    except ChildError:
        # Blame the one that died, not the one that waits for it.
        for child in started:
            child.check()
        raise
    finally:
        # A second Ctrl-C must not leave half of them behind; every stop has its own deadline.
        with deaf_to(signal.SIGINT, signal.SIGTERM):
            for child in reversed(started):
                child.stop()


@contextmanager
def deaf_to(*signals: signal.Signals) -> Iterator[None]:
    """These signals do nothing meanwhile; children that are started afterwards hear them again."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def print_welcome(plan: Deployment, gateway: Gateway, state_dir: Path) -> None:
    for name, address in plan.addresses.items():
        print(f"  {name:8} {address}")
    print(f"  state    {state_dir} (logs in {state_dir / 'logs'})")
    print(f"\nFluxgate is ready on {gateway.url}  (API: {gateway.url}/docs). Paste this into another terminal:\n")
    print(f"  curl -s {gateway.url}/v1/generations -H 'Content-Type: application/json' -d '{EXAMPLE}'\n")
    print("Ctrl-C stops everything; the state stays.", flush=True)


def watch(children: list[Child]) -> None:
    """Return never; ChildError when one of them has died."""
    while True:
        for child in children:
            child.check()
        time.sleep(WATCH_S)


def interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def run(env: Mapping[str, str]) -> None:
    """Run until interrupted. StartRefused or ChildError say in one line why it ended by itself."""
    state_dir = Path(env.get("STATE_DIR") or ".fluxgate").resolve()
    with lock_state(state_dir):
        stamp_state(state_dir)
        plan, gateway = plan_deployment(env, state_dir)
        print(f"Starting {', '.join(child.name for child in plan.children)} ...", flush=True)
        with running(plan.children):
            print_welcome(plan, gateway, state_dir)
            watch(plan.children)


def main() -> int:
    signal.signal(signal.SIGTERM, interrupt)
    signal.signal(signal.SIGINT, interrupt)
    try:
        run(os.environ)
    except KeyboardInterrupt:
        print("\nStopped.")
        return 0
    except (StartRefused, ChildError) as error:
        print(f"fluxgate: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
