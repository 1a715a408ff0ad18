"""One start on a rented machine: the programs of a plan, the key, the tunnel and its test, the keeping of the state.
It knows neither the command line nor how anything was installed. The standard library alone."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from decisions import Plan
from installing import REPOSITORY, python_in
from keeping import PERIOD_S, Keeper, KeepError
from programs import Program, read_tail
from tunnels import make_tunnel, wait_for_address

COMFYUI_PORT = 8188
READY_S = 600.0


class LaunchError(Exception):
    """It cannot go on; the message is one line for a person."""


@dataclass(frozen=True)
class Place:
    """Where everything of this start lies."""

    folder: Path
    python: str  # of the gateway's environment
    port: int
    s3_port: int

    @property
    def state(self) -> Path:
        return self.folder / "state"

    @property
    def connection(self) -> Path:
        return self.state / "connection.json"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def log(self, name: str) -> Path:
        return self.folder / "logs" / f"{name}.log"


def say(line: str) -> None:
    print(line, flush=True)


def ask(url: str, key: str = "", body: dict[str, Any] | None = None) -> Any:
    """The JSON of the gateway's answer; None when it refuses or is away."""
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
    request = urllib.request.Request(url, headers=headers, data=json.dumps(body).encode() if body is not None else None)
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.load(answer)
    except (urllib.error.URLError, OSError, ValueError):
        return None


def read_secret(file: Path) -> str:
    """A secret of this state, drawn the first time; for the owner's eyes only."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_private(file, "fg-" + secrets.token_urlsafe(32))
    return file.read_text().strip()


def write_private(file: Path, text: str) -> None:
    waiting = file.with_name(f".{file.name}.part")
    with os.fdopen(os.open(waiting, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as part:
        part.write(text)
    waiting.replace(file)


def make_key(place: Place, admin_key: str) -> str:
    """A key to generate and train with, the same at every start; what it made stays its caller's if it has to be made anew."""
    file = place.state / "api-key"
    known = file.read_text().strip() if file.exists() else ""
    if known and ask(f"{place.url}/v1/usage", known) is not None:
        return known
    made = ask(f"{place.url}/v1/keys", admin_key, {"name": "launcher", "scopes": ["generate", "train"], "caller": "owner"})
    if made is None:
        raise LaunchError(f"The gateway made no key; its log: {place.state / 'logs' / 'gateway.log'}")
    write_private(file, made["key"])
    return str(made["key"])


def describe_deployment(plan: Plan, place: Place, admin_key: str, s3_url: str) -> dict[str, str]:
    """The environment of `python -m local.up`. What the environment says of an S3 or Redis elsewhere is taken as it is."""
    env = {"STATE_DIR": str(place.state), "PORT": str(place.port), "HOST": "127.0.0.1", "S3_PORT": str(place.s3_port)}
    env |= {"ADMIN_KEY": admin_key, "AUTH": "keys", "TRAINER": plan.trainer}
    if s3_url:
        env["S3_PUBLIC_ENDPOINT_URL"] = s3_url
    if plan.comfyui:
        env |= {
            "COMFYUI_URLS": f"http://127.0.0.1:{COMFYUI_PORT}",
            "DEFAULT_BASE_MODEL": plan.base_model,
            "LORA_DIR": str(place.folder / "ComfyUI" / "models" / "loras"),
        }
    if plan.install_simpletuner:
        env |= {"SIMPLETUNER_PYTHON": python_in(place.folder, "simpletuner"), "SHARED_GPU": "gpu0", "HF_HOME": str(place.folder / "hf")}
    return env


def list_programs(plan: Plan, place: Place, env: Mapping[str, str]) -> list[Program]:
    """In starting order."""
    programs = [Program("fluxgate", [place.python, "-m", "local.up"], place.log("fluxgate"), env, folder=REPOSITORY, grace_s=60.0)]
    if plan.comfyui:
        comfyui = place.folder / "ComfyUI"
        command = [python_in(place.folder, "comfyui-env"), str(comfyui / "main.py"), "--listen", "127.0.0.1", "--port", str(COMFYUI_PORT)]
        programs.insert(0, Program("comfyui", [*command, "--disable-auto-launch", *plan.comfyui_flags], place.log("comfyui")))
    return programs


class Launch:
    """A start: everything that runs, until it is told to stop."""

    def __init__(self, plan: Plan, place: Place, keeper: Keeper | None) -> None:
        self._plan, self._place, self._keeper = plan, place, keeper
        self._programs: list[Program] = []
        self._tunnels: list[Program] = []
        self._addresses: list[str] = []

    def run(self) -> None:
        """Return never; KeyboardInterrupt stops it all, and keeps the state once more."""
        try:
            self._open()
            saved_at = time.monotonic()
            while True:
                time.sleep(0.5)
                if any(not tunnel.is_alive for tunnel in self._tunnels):
                    # A new tunnel has a new address, which signed URLs carry.
                    say("the tunnel ended; another is opened")
                    self._stop()
                    self._open()
                for program in self._programs:
                    program.keep_alive(say)
                if self._keeper is not None and time.monotonic() > saved_at + PERIOD_S:
                    saved_at = time.monotonic()
                    self._save()
        finally:
            self._place.connection.unlink(missing_ok=True)
            self._stop()
            self._save()

    def _open(self) -> None:
        place, plan = self._place, self._plan
        admin_key = read_secret(place.state / "admin-key")
        self._open_tunnels()
        s3_url = self._addresses[1] if len(self._addresses) > 1 else ""
        self._programs = list_programs(plan, place, describe_deployment(plan, place, admin_key, s3_url))
        for program in self._programs:
            say(f"starting {program.name} (log: {program.log})")
            program.start()
        self._wait_ready()
        key = make_key(place, admin_key)
        connection: dict[str, Any] = {"url": place.url, "key": key, "pid": os.getpid(), "base_model": plan.base_model}
        if self._addresses:
            connection |= {"public_url": self._addresses[0], "way": self._test_tunnel(key)}
        show(connection, place)
        write_private(place.connection, json.dumps(connection))

    def _open_tunnels(self) -> None:
        """To the gateway, and to the S3 that comes with it: pictures are read there."""
        self._tunnels, self._addresses = [], []
        kind, place = self._plan.tunnel, self._place
        if kind == "none":
            return
        program = str(place.folder / kind) if (place.folder / kind).exists() else kind
        for port in (place.port,) if os.environ.get("S3_ENDPOINT_URL") else (place.port, place.s3_port):
            tunnel = make_tunnel(kind, program, port, place.log(f"tunnel-{port}"))
            tunnel.start()
            self._tunnels.append(tunnel)
            self._addresses.append(wait_for_address(kind, tunnel))

    def _wait_ready(self) -> None:
        deadline = time.monotonic() + READY_S
        while ask(f"{self._place.url}/ready") is None:
            if time.monotonic() > deadline:
                said = "; ".join(f"{program.name}: {read_tail(program.log)}" for program in self._programs)
                raise LaunchError(f"not ready after {READY_S:g} s. {said}")
            for program in self._programs:
                program.keep_alive(say)
            time.sleep(0.5)

    def _test_tunnel(self, key: str) -> str:
        """Which way streams come live through it."""
        say("testing whether streams come live through the tunnel ...")
        command = [self._place.python, "-m", "fluxgate.tunnel", self._addresses[0]]
        env = {**os.environ, "FLUXGATE_API_KEY": key}
        done = subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True, check=False)
        if done.returncode:
            say(f"not tested: {done.stderr.strip()[-300:]}")
            return "poll"
        return str(json.loads(done.stdout)["way"])

    def _stop(self) -> None:
        for program in reversed([*self._tunnels, *self._programs]):
            program.stop()

    def _save(self) -> None:
        try:
            if self._keeper is not None:
                self._keeper.save()
        except KeepError as error:
            say(f"the state was not kept: {error}")


def show(connection: Mapping[str, Any], place: Place) -> None:
    """Address and key, and a QR code of a public address where the library for it is there."""
    say(f"\nFluxgate is ready on {connection['url']}, with {connection['base_model']}")
    public = connection.get("public_url")
    if public:
        say(f"from outside: {public}   (streams: {connection['way']}; export FLUXGATE_STREAM={connection['way']})")
    say(f"key: {connection['key']}")
    client = Path(place.python).with_name("fluxgate")
    say(f"\n  export FLUXGATE_URL={connection['url']} FLUXGATE_API_KEY={connection['key']}")
    say(f"  {client} generate 'a red circle on a blue background' -o circle.png")
    if public:
        subprocess.run([place.python, "-m", "segno", "--compact", public], check=False)
