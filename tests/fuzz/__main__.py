"""`make fuzz`: a whole deployment of its own, thousands of requests made from its OpenAPI document, and a look at what they left.
Ends with 1 when schemathesis found a fault, when the gateway was surprised, or when anything was left behind."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from local.child import pick_free_port
from local.services import Engine, RedisServer, S3Server
from tests.conftest import choose_engine_flags
from tests.deployment import describe_deployment, make_gateway, running
from tests.fuzz.left import Target, list_left
from tests.journeys.belongings import acquire

FOLDER = Path(__file__).parent
KEY = "the-key-of-a-deployment-that-lives-for-minutes"
# Small, so that what is too much is met, and that long jobs end.
LIMITS = {"ADMIN_KEY": KEY, "TRAINER": "tiny", "TIMEOUT_S": "30", "MAX_BODY_BYTES": "65536", "LOG_LEVEL": "WARNING"}


@contextmanager
def deployed(folder: Path) -> Iterator[Target]:
    """With one of every thing that a caller can own, for requests to find."""
    s3, engine = S3Server(folder, pick_free_port()), Engine(folder, pick_free_port(), flags=choose_engine_flags())
    store = RedisServer(folder, pick_free_port())
    env = describe_deployment(store.url, s3, engine.url, **LIMITS)
    gateway = make_gateway(folder, env)
    with running(store, s3, engine, gateway):
        with httpx.Client(base_url=gateway.url, headers={"Authorization": f"Bearer {KEY}"}, timeout=60) as http:
            acquire(http, store.url, "admin")
            yield Target(store, s3, engine, gateway, http, env["S3_BUCKET"])


def attack(target: Target, cases_each: int, seed: int, *more: str) -> int:
    """Run schemathesis; its exit status."""
    command = [str(Path(sys.executable).parent / "schemathesis"), "--config-file", str(FOLDER / "schemathesis.toml"), "run"]
    command += [f"{target.gateway.url}/openapi.json", "--header", f"Authorization: Bearer {KEY}", "--checks", "all"]
    command += ["--max-examples", str(cases_each), "--seed", str(seed), *more]
    env = {**os.environ, "SCHEMATHESIS_HOOKS": "tests.fuzz.hooks", "FUZZ_URL": target.gateway.url, "FUZZ_KEY": KEY}
    return subprocess.run(command, env=env, check=False).returncode


def list_surprises(target: Target) -> Iterator[str]:
    """Parts that died, and lines of the gateway's log that nobody should ever read."""
    for part in (target.redis, target.s3, target.engine, target.gateway):
        log = part.log_path.read_text() if part.log_path else ""
        if not part.is_alive():
            yield f"{part.name} died: {log[-2000:]}"
        elif part is target.gateway:
            yield from (line for line in log.splitlines() if "unexpected error" in line or "Traceback" in line)


def show_reach(target: Target) -> None:
    """Which routes were never answered with what they are for: a fuzzer that only ever sees 404 has looked at nothing."""
    counted = re.findall(r"^fluxgate_http_requests_total{(.*)} ([0-9.]+)$", target.http.get("/metrics").text, re.MULTILINE)
    by_route: dict[str, Counter[str]] = {}
    for labels, count in counted:
        of = dict(re.findall(r'(\w+)="([^"]*)"', labels))
        by_route.setdefault(f"{of['method']} {of['route']}", Counter())[of["status"]] += int(float(count))
    answered = {route: counts for route, counts in by_route.items() if any(status < "400" for status in counts)}
    print(f"{sum(map(Counter.total, by_route.values()))} requests, {len(answered)} operations answered; refused each time:")
    for route in sorted(by_route.keys() - answered.keys()):
        if by_route[route].keys() - {"405"}:
            print(f"  {route} {dict(by_route[route])}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--cases-each", type=int, default=30, help="Most random cases of one operation.")
    parser.add_argument("--seed", type=int, default=1)
    asked, more = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder, deployed(Path(folder)) as target:
        status = attack(target, asked.cases_each, asked.seed, *more)
        show_reach(target)
        left = [*list_left(target), *list_surprises(target)]
    for line in left:
        print(f"left: {line[:1000]}")
    print(f"schemathesis: {status}, left behind: {len(left)}")
    return 1 if status or left else 0


if __name__ == "__main__":
    sys.exit(main())
