"""Commands about the machines behind a gateway. They run where it is installed; this package knows no more of it than its name."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

import httpx
import typer

from fluxgate.client import translate
from fluxgate.errors import FluxgateError
from fluxgate.wire import read_answer

PATIENCE_S = 120.0


def is_gateway_here() -> bool:
    return importlib.util.find_spec("gateway") is not None


def run_gateway_command(name: str, arguments: Sequence[str]) -> int:
    """`python -m gateway NAME ...` with this interpreter and environment; its exit status."""
    return subprocess.run([sys.executable, "-m", "gateway", name, *arguments], check=False).returncode


def examine(url: str, api_key: str | None, *, as_json: bool, tunnel: str | None) -> int:
    """The doctor here, where Redis is named; else the word of the gateway at `url`. The exit status: 1 for a fault."""
    if is_gateway_here() and os.environ.get("REDIS_URL"):
        return run_gateway_command("doctor", [*(["--json"] if as_json else []), *(["--url", tunnel] if tunnel else [])])
    if tunnel:
        raise FluxgateError("--url is tried from where the gateway is installed; here set PUBLIC_URL for the gateway instead")
    report = _ask(url, api_key)
    typer.echo(json.dumps(report, indent=1) if as_json else "\n".join(_lines(report["findings"])))
    return 0 if report["ready"] else 1


def _ask(url: str, api_key: str | None) -> dict[str, Any]:
    """Not by the client: what answers 503 here is a report with faults, and asking again would find the same."""
    with translate(url):
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        answer = httpx.get(f"{url.rstrip('/')}/ready", params={"full": True}, headers=headers, timeout=PATIENCE_S)
    if answer.status_code == httpx.codes.SERVICE_UNAVAILABLE and '"findings"' in answer.text:
        return dict(answer.json())
    return dict(read_answer(answer))


def _lines(findings: Sequence[dict[str, Any]]) -> list[str]:
    lines = []
    for found in findings:
        lines.append(f"{found['state']:8} {found['check']:22} {found['message']}")
        if found.get("remedy"):
            lines.append(f"{'':32}-> {found['remedy']}")
    counts = Counter(found["state"] for found in findings)
    return [*lines, f"{counts['fault']} faults, {counts['warning']} warnings, {counts['ok']} well, {counts['skipped']} skipped"]
