"""Public addresses: what is started for one, and how its address is read. Neither program was run where this was written: no network."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

from programs import Program, read_tail

PROGRAMS = {
    "cloudflared": "https://github.com/cloudflare/cloudflared/releases/download/2025.11.1/cloudflared-linux-amd64",
    "ngrok": "https://bin.equinox.io/c/bNyj1mQVY4c/ngrok-v3-stable-linux-amd64.tgz",
}
PATIENCE_S = 60.0


class TunnelError(Exception):
    """No public address came."""


def make_tunnel(kind: str, program: str, port: int, log: Path) -> Program:
    """A tunnel to a port of this machine. ngrok takes its token from NGROK_AUTHTOKEN."""
    url = f"http://127.0.0.1:{port}"
    command = {
        "cloudflared": [program, "tunnel", "--no-autoupdate", "--url", url],
        "ngrok": [program, "http", url, "--log", "stdout", "--log-format", "json"],
    }[kind]
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text("")
    return Program(f"{kind} to {port}", command, log, grace_s=5.0)


def read_address(kind: str, log: str) -> str:
    """The public address in what the program has said so far, empty while it has not."""
    if kind == "cloudflared":
        found = re.search(r"https://[a-z0-9-]+\.trycloudflare\.com", log)
        return found[0] if found else ""
    for line in log.splitlines():
        try:
            said = json.loads(line)
        except ValueError:
            continue
        if said.get("msg") == "started tunnel":
            return str(said.get("url", ""))
    return ""


def wait_for_address(kind: str, tunnel: Program) -> str:
    deadline = time.monotonic() + PATIENCE_S
    while not (address := read_address(kind, tunnel.log.read_text(errors="replace"))):
        if not tunnel.is_alive or time.monotonic() > deadline:
            raise TunnelError(f"{tunnel.name} gave no address: {read_tail(tunnel.log)}")
        time.sleep(0.2)
    return address
