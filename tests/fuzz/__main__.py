"""`make fuzz`: a whole deployment of its own, thousands of requests made from its OpenAPI document, and a look at what they left.
Ends with 1 when schemathesis found a fault, when the gateway was surprised, when an operation was never asked, or when anything was left
behind. The last line says all of it."""

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
from typing import NamedTuple

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
LIMITS = {"ADMIN_KEY": KEY, "TRAINER": "tiny", "TIMEOUT_S": "60", "MAX_BODY_BYTES": "65536", "LOG_LEVEL": "WARNING"}


@contextmanager
def deployed(folder: Path) -> Iterator[Target]:
    """With one of every thing that a caller can own, for requests to find."""
    s3, engine = S3Server(folder, pick_free_port()), Engine(folder, pick_free_port(), flags=choose_engine_flags())
    store = RedisServer(folder, pick_free_port())
    # The engine answers webhooks with 404, which is an answer.
    env = describe_deployment(store.url, s3, engine.url, **LIMITS, ALLOW_PRIVATE_URLS=engine.url.removeprefix("http://"))
    gateway = make_gateway(folder, env)
    with running(store, s3, engine, gateway):
        with httpx.Client(base_url=gateway.url, headers={"Authorization": f"Bearer {KEY}"}, timeout=60) as http:
            acquire(http, store.url, "admin")
            yield Target(store, s3, engine, gateway, http, env["S3_BUCKET"])


class Attacked(NamedTuple):
    """schemathesis' exit status, and how many cases it made."""

    status: int
    cases: int


def attack(target: Target, cases_each: int, seed: int, *more: str) -> Attacked:
    """Run schemathesis, and show what it says."""
    command = [str(Path(sys.executable).parent / "schemathesis"), "--config-file", str(FOLDER / "schemathesis.toml"), "run"]
    command += [f"{target.gateway.url}/openapi.json", "--header", f"Authorization: Bearer {KEY}", "--checks", "all"]
    command += ["--max-examples", str(cases_each), "--seed", str(seed), *more]
    env = {**os.environ, "SCHEMATHESIS_HOOKS": "tests.fuzz.hooks", "FUZZ_URL": target.gateway.url, "FUZZ_KEY": KEY}
    env["FUZZ_RECEIVER"] = f"{target.engine.url}/interrupted"
    env["FUZZ_INSTANCE"] = target.http.get("/v1/instances").json()["data"][0]["id"]
    cases = 0
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as child:
        for line in child.stdout or ():
            print(line, end="", flush=True)
            if counted := re.match(r"\s+(\d+) generated", line):
                cases = int(counted[1])
    return Attacked(child.returncode, cases)


def list_surprises(target: Target) -> Iterator[str]:
    """Parts that died, and lines of the gateway's log that nobody should ever read."""
    for part in (target.redis, target.s3, target.engine, target.gateway):
        log = part.log_path.read_text() if part.log_path else ""
        if not part.is_alive():
            yield f"{part.name} died: {log[-2000:]}"
        elif part is target.gateway:
            yield from (line for line in log.splitlines() if "unexpected error" in line or "Traceback" in line)


def count_requests(target: Target) -> dict[str, Counter[str]]:
    """Statuses by `METHOD /route`, as the gateway counted them."""
    counted = re.findall(r"^fluxgate_http_requests_total{(.*)} ([0-9.]+)$", target.http.get("/metrics").text, re.MULTILINE)
    by_route: dict[str, Counter[str]] = {}
    for labels, count in counted:
        of = dict(re.findall(r'(\w+)="([^"]*)"', labels))
        by_route.setdefault(f"{of['method']} {of['route'].replace(':path}', '}')}", Counter())[of["status"]] += int(float(count))
    return by_route


def list_operations(target: Target) -> set[str]:
    """All that the document tells of, as `METHOD /route`."""
    paths = target.http.get("/openapi.json").json()["paths"]
    return {f"{method.upper()} {path}" for path, operations in paths.items() for method in operations}


def list_unasked(target: Target) -> Iterator[str]:
    yield from (f"{operation} was never asked" for operation in sorted(list_operations(target) - count_requests(target).keys()))


def show_reach(target: Target) -> int:
    """How many operations were answered with what they are for, and which never: a fuzzer that only ever sees 404 has looked at nothing."""
    by_route, operations = count_requests(target), list_operations(target)
    answered = {route for route in operations if any(status < "400" for status in by_route.get(route, ()))}
    for route in sorted(operations - answered):
        print(f"refused each time: {route} {dict(by_route.get(route, {}))}")
    return len(answered)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--cases-each", type=int, default=30, help="Most random cases of one operation.")
    parser.add_argument("--at-least", type=int, default=0, help="Fewer cases in all are a fault.")
    parser.add_argument("--seed", type=int, default=1)
    asked, more = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder, deployed(Path(folder)) as target:
        status, cases = attack(target, asked.cases_each, asked.seed, *more)
        answered, operations = show_reach(target), len(list_operations(target))
        faults = [*list_unasked(target), *list_left(target), *list_surprises(target)]
    if cases < asked.at_least:
        faults.append(f"only {cases} cases; at least {asked.at_least} are asked for")
    for line in faults:
        print(f"fault: {line[:1000]}")
    reach = f"{cases} cases of {operations} operations, {answered} of them answered with what they are for"
    print(f"fuzz, seed {asked.seed}: {reach}; schemathesis {'found nothing' if not status else 'found faults'}, {len(faults)} other faults")
    return 1 if status or faults else 0


if __name__ == "__main__":
    sys.exit(main())
