"""Fluxgate on a rented GPU, from one command: `python docker/colab/launch.py start`. Also `run` (in the foreground), `status`, `stop`,
and `--dry-run`, which only says what would be done. A bare Python 3.11 or newer runs it: it imports nothing but the standard library.

It decides (decisions.py), installs (installing.py), brings the state back (keeping.py), and starts ComfyUI and `python -m local.up`,
which starts Redis, S3, the trainer and the gateway. ComfyUI listens on loopback alone; the gateway too, with keys."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

from decisions import Plan, Wish, decide
from installing import REPOSITORY, install, list_steps, python_in, read_versions
from keeping import Keeper, KeepError
from machine import load, measure
from starting import Launch, LaunchError, Place, say, show
from tunnels import TunnelError

STOP_S = 90.0
DEFAULT_FOLDER = "/content/fluxgate-run" if Path("/content").is_dir() else str(Path.home() / "fluxgate-run")


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Fluxgate on a rented GPU.")
    parser.add_argument("verb", choices=("start", "run", "status", "stop"), nargs="?", default="run")
    parser.add_argument("--folder", default=DEFAULT_FOLDER, help="where everything is installed and runs")
    parser.add_argument("--keep", default="", help="where the state outlives the machine: a folder, or s3://BUCKET/PREFIX")
    parser.add_argument("--base-model", default="", help="instead of the one that fits best")
    parser.add_argument("--no-train", action="store_true", help="install nothing for training")
    parser.add_argument("--tunnel", choices=("none", "cloudflared", "ngrok"), default="none", help="a public address")
    parser.add_argument("--port", type=int, default=8000, help="of the gateway, on loopback")
    parser.add_argument("--s3-port", type=int, default=8333, help="of the S3 server that comes with it, on loopback")
    parser.add_argument("--python", default="", help="a Python that has the gateway installed; nothing is installed then")
    parser.add_argument("--machine", default="", help="a JSON description of a machine, instead of looking at this one")
    parser.add_argument("--dry-run", action="store_true", help="print the plan as JSON and do nothing")
    return parser.parse_args(arguments)


def place_of(asked: argparse.Namespace) -> Place:
    folder = Path(asked.folder).absolute()
    return Place(folder, asked.python or python_in(folder, "gateway"), asked.port, asked.s3_port)


def run(asked: argparse.Namespace, plan: Plan) -> None:
    place = place_of(asked)
    if not asked.python:
        machine = load(Path(asked.machine)) if asked.machine else measure(place.folder, asked.keep, os.environ)
        versions = read_versions((REPOSITORY / "docker" / "versions.env").read_text())
        install(list_steps(plan, machine, place.folder, versions), plan, place.folder, say)
    keeper = Keeper(str(Path(place.python).with_name("rclone")), place.state, asked.keep) if asked.keep else None
    if keeper is not None and keeper.restore():
        say(f"brought back what was kept in {asked.keep}")
    Launch(plan, place, keeper).run()


def start_behind(arguments: list[str], place: Place) -> dict[str, Any]:
    """Run it as a process of its own; the connection when it is ready. Its lines are shown meanwhile."""
    if (known := read_connection(place)) is not None:
        return known
    log = place.log("launch")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as out:
        command = [sys.executable, "-u", __file__, "run", *arguments]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True)
    with log.open(errors="replace") as lines:
        while True:
            connection = read_connection(place)
            print(lines.read(), end="", flush=True)
            if connection is not None:
                return connection
            if process.poll() is not None:
                raise LaunchError(lines.read() + f"it ended with {process.returncode}; its log: {log}")
            time.sleep(0.5)


def read_connection(place: Place) -> dict[str, Any] | None:
    """Of a start that runs; None when none does."""
    try:
        connection: dict[str, Any] = json.loads(place.connection.read_text())
        os.kill(connection["pid"], 0)
    except (OSError, ValueError):
        return None
    return connection


def start(*, keep: str = "", train: bool = True, tunnel: str = "none", folder: str = DEFAULT_FOLDER) -> dict[str, Any]:
    """For a notebook: start it, and let `fluxgate.Client()` of this Python find it."""
    arguments = ["--folder", folder, "--keep", keep, "--tunnel", tunnel, *([] if train else ["--no-train"])]
    connection = start_behind(arguments, place_of(parse(["run", *arguments])))
    os.environ |= {"FLUXGATE_URL": connection["url"], "FLUXGATE_API_KEY": connection["key"]}
    sys.path += [path for path in (str(REPOSITORY), f"{folder}/client") if path not in sys.path]
    return connection


def stop(folder: str = DEFAULT_FOLDER) -> bool:
    """Stop it and keep its state; False when it did not run."""
    place = place_of(parse(["stop", "--folder", folder]))
    connection = read_connection(place)
    if connection is None:
        return False
    os.kill(connection["pid"], signal.SIGTERM)
    deadline = time.monotonic() + STOP_S
    while read_connection(place) is not None or is_alive(connection["pid"]):
        if time.monotonic() > deadline:
            raise LaunchError(f"process {connection['pid']} has not ended after {STOP_S:g} s")
        time.sleep(0.2)
    return True


def is_alive(pid: int) -> bool:
    """A child of ours that has ended is none."""
    try:
        if os.waitpid(pid, os.WNOHANG)[0] == pid:
            return False
    except ChildProcessError:
        pass
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main(arguments: list[str]) -> int:
    asked = parse(arguments)
    place = place_of(asked)
    if asked.verb == "stop":
        say("stopped; everything is kept" if stop(asked.folder) else "it does not run")
        return 0
    if asked.verb == "status":
        connection = read_connection(place)
        say(json.dumps(connection, indent=1) if connection else "it does not run")
        return 0 if connection else 1
    machine = load(Path(asked.machine)) if asked.machine else measure(place.folder, asked.keep, os.environ)
    plan = decide(machine, Wish(asked.base_model, not asked.no_train, asked.tunnel))
    if asked.dry_run:
        versions = read_versions((REPOSITORY / "docker" / "versions.env").read_text())
        steps = [] if plan.refusal or asked.python else list_steps(plan, machine, place.folder, versions)
        say(json.dumps({**plan.describe(), "steps": [{"name": step.name, "command": step.command} for step in steps]}, indent=1))
        return 1 if plan.refusal else 0
    if plan.refusal:
        raise LaunchError(plan.refusal)
    if asked.verb == "start":
        if (known := read_connection(place)) is not None:
            show(known, place)
        else:
            start_behind([argument for argument in arguments if argument != "start"], place)
        return 0
    for reason in plan.reasons:
        say(f"- {reason}")
    signal.signal(signal.SIGTERM, interrupt)
    try:
        run(asked, plan)
    except KeyboardInterrupt:
        say("stopped; everything is kept")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (LaunchError, KeepError, TunnelError, subprocess.CalledProcessError) as error:
        sys.exit(f"launch: {error}")
