"""API keys on a running deployment: from none to one, what each may do, and how soon a revoked one is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis

from gateway.callers.keys import mint_key, split_key
from local.child import pick_free_port
from local.services import Gateway, S3Server
from tests.callers import as_caller, make_key
from tests.deployment import describe_deployment, make_gateway, running, wait_for_answers
from tests.journeys.api import Api, wait_until

ADMIN_KEY = "the-operators-own-key-of-the-test"


@pytest.fixture(scope="module")
def env(redis_server: str, s3_server: S3Server, engine: str) -> Iterator[dict[str, str]]:
    with redis.Redis.from_url(redis_server) as connection:
        connection.flushall()
        yield describe_deployment(redis_server, s3_server, engine)
        connection.flushall()


@pytest.fixture(scope="module")
def gateway(env: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """On loopback; open until the first test makes a key."""
    made = make_gateway(tmp_path_factory.mktemp("gateway"), env)
    with running(made):
        yield made


@pytest.fixture(scope="module")
def second(env: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """Another process on the same Redis, with an admin key of its own."""
    made = make_gateway(tmp_path_factory.mktemp("second"), {**env, "DISPATCHER": "off", "ADMIN_KEY": ADMIN_KEY})
    made.start()
    try:
        wait_for_answers(made)
        yield made
    finally:
        made.stop()


@pytest.fixture(scope="module")
def admin(gateway: Gateway) -> Iterator[httpx.Client]:
    """The first key is made by whoever is on the machine. From then on nobody is let in without one."""
    with as_caller(gateway.url, None) as nobody:
        assert nobody.get("/v1/usage").json()["caller"] == "local"
        key = make_key(nobody, "admin", name="first")["key"]
        assert nobody.get("/v1/usage").status_code == 401
    with as_caller(gateway.url, key) as http:
        yield http


def ask(gateway: Gateway, authorization: str | None, path: str = "/v1/generations") -> httpx.Response:
    return httpx.get(f"{gateway.url}{path}", headers={"Authorization": authorization} if authorization else {})


def test_a_key_is_let_in_and_its_text_is_shown_once(gateway: Gateway, admin: httpx.Client) -> None:
    made = make_key(admin, name="app", limits={"requests_per_minute": 500})
    assert made["scopes"] == ["generate"]
    assert made["caller"] == made["id"]
    assert made["limits"] == {"requests_per_minute": 500, "jobs_in_flight": None, "gpu_seconds_per_day": None}
    assert ask(gateway, f"Bearer {made['key']}").status_code == 200
    assert ask(gateway, f"bearer   {made['key']}").status_code == 200
    split = split_key(made["key"])
    assert split is not None
    assert split[1] not in admin.get("/v1/keys").text


def test_whatever_is_wrong_with_a_key_the_answer_is_the_same(gateway: Gateway, admin: httpx.Client) -> None:
    good = make_key(admin)["key"]
    revoked, expired = make_key(admin), make_key(admin, expires_at="2020-01-01T00:00:00Z")
    assert admin.delete(f"/v1/keys/{revoked['id']}").status_code == 200
    wrong = [
        good[:-1] + ("A" if good[-1] != "A" else "B"),
        mint_key("stranger", ("admin",))[1],
        revoked["key"],
        expired["key"],
        good.upper(),
        good[:-1],
        good + "A",
        "fg__",
        "hf_abcdefghijklmnopqrstuvwxyz",
        "x" * 5000,
    ]
    answers = [ask(gateway, f"Bearer {text}") for text in wrong]
    assert {answer.status_code for answer in answers} == {401}
    assert len({answer.text for answer in answers}) == 1
    assert answers[0].headers["www-authenticate"] == "Bearer"
    for authorization in (None, "Bearer", f"Basic {good}", good):
        assert ask(gateway, authorization).status_code == 401


@pytest.mark.parametrize(
    ("scope", "allowed"),
    [
        ("generate", {"/v1/generations", "/v1/loras", "/v1/usage"}),
        ("train", {"/v1/datasets", "/v1/trainings", "/v1/loras", "/v1/usage"}),
        ("admin", {"/v1/generations", "/v1/datasets", "/v1/trainings", "/v1/loras", "/v1/usage", "/v1/keys", "/v1/instances", "/metrics"}),
    ],
)
def test_a_key_opens_what_its_scope_says(gateway: Gateway, admin: httpx.Client, scope: str, allowed: set[str]) -> None:
    everything = {"/v1/generations", "/v1/datasets", "/v1/trainings", "/v1/loras", "/v1/usage", "/v1/keys", "/v1/instances", "/metrics"}
    key = make_key(admin, scope)["key"]
    for path in everything:
        answer = ask(gateway, f"Bearer {key}", path)
        assert answer.status_code == (200 if path in allowed else 403), path
        if path not in allowed:
            assert answer.json()["error"]["code"] == "scope_missing"


def test_everybody_may_know_that_it_lives_and_nobody_more(gateway: Gateway, admin: httpx.Client) -> None:
    for path in ("/health", "/ready", "/docs", "/openapi.json"):
        assert ask(gateway, None, path).status_code == 200
    assert ask(gateway, None, "/metrics").status_code == 401


def test_other_processes_learn_of_new_and_revoked_keys(gateway: Gateway, second: Gateway, admin: httpx.Client) -> None:
    made = make_key(admin)
    assert ask(second, f"Bearer {made['key']}").status_code == 200
    admin.delete(f"/v1/keys/{made['id']}")
    assert ask(gateway, f"Bearer {made['key']}").status_code == 401
    wait_until(lambda: ask(second, f"Bearer {made['key']}").status_code == 401, "the refusal by the other process")


def test_the_admin_key_of_the_settings_is_one_and_only_there(gateway: Gateway, second: Gateway, admin: httpx.Client) -> None:
    assert ask(second, f"Bearer {ADMIN_KEY}", "/v1/keys").status_code == 200
    assert ask(second, f"Bearer {ADMIN_KEY}x", "/v1/keys").status_code == 401
    assert ask(gateway, f"Bearer {ADMIN_KEY}", "/v1/keys").status_code == 401


def test_requests_are_counted_over_all_processes(gateway: Gateway, second: Gateway, admin: httpx.Client) -> None:
    made = make_key(admin, limits={"requests_per_minute": 6})
    answers = [ask(place, f"Bearer {made['key']}") for place in (gateway, second) * 4]
    assert sorted(answer.status_code for answer in answers) == [200] * 6 + [429] * 2
    refused = next(answer for answer in answers if answer.status_code == 429)
    error = refused.json()["error"]
    assert error["code"] == "rate_limited"
    assert error["details"]["limit"] == "requests_per_minute"
    assert error["details"]["allowed"] == 6
    assert 1 <= int(refused.headers["Retry-After"]) <= 60

    def counted() -> dict[str, Any]:
        [today] = [key["usage_today"] for key in admin.get("/v1/keys").json()["data"] if key["id"] == made["id"]]
        return today or {}

    wait_until(lambda: (counted().get("requests"), counted().get("refused")) == (6, 2), "the count of the requests")
    [listed] = [key for key in admin.get("/v1/keys").json()["data"] if key["id"] == made["id"]]
    assert listed["last_used_at"]


def test_keys_of_one_caller_share_what_is_theirs(gateway: Gateway, admin: httpx.Client) -> None:
    first, other = make_key(admin, caller="team", limits={"jobs_in_flight": 7}), make_key(admin, caller="team")
    assert other["limits"]["jobs_in_flight"] == 7
    body = {"workflow": "flux", "prompt": "a red circle", "width": 256, "height": 256, "steps": 1}
    with as_caller(gateway.url, first["key"]) as one, as_caller(gateway.url, other["key"]) as two:
        job = one.post("/v1/generations", json=body).json()
        assert two.get(f"/v1/generations/{job['id']}").status_code == 200


def test_a_caller_sees_what_it_used_and_is_told_its_limit(gateway: Gateway, admin: httpx.Client) -> None:
    made = make_key(admin, limits={"jobs_in_flight": 1})
    with as_caller(gateway.url, made["key"]) as http:
        job = http.post("/v1/generations", json={"workflow": "slow", "steps": 100, "delay_ms": 20}).json()
        refused = http.post("/v1/generations", json={"workflow": "trivial"})
        assert refused.status_code == 429
        assert refused.headers["Retry-After"]
        assert refused.json()["error"]["details"] == {"limit": "jobs_in_flight", "value": 1, "allowed": 1}
        Api.of(http).wait(job["id"])
        Api.of(http).run(workflow="trivial", color=4711)
        [today] = http.get("/v1/usage").json()["days"]
    assert today["jobs"]["succeeded"] == 2
    assert today["gpu_seconds"] > 1


@pytest.mark.parametrize(
    ("body", "parameter"),
    [
        ({"scopes": ["everything"]}, "scopes.0"),
        ({"scopes": []}, "scopes"),
        ({"caller": "hf:somebody"}, "caller"),
        ({"caller": "hf"}, "caller"),
        ({"name": "two\nlines"}, "name"),
        ({"expires_at": "2030-01-01T00:00:00"}, "expires_at"),
        ({"limits": {"requests_per_minute": 0}}, "limits.requests_per_minute"),
        ({"limits": {"pictures": 3}}, "limits.pictures"),
    ],
)
def test_a_key_that_cannot_be_is_refused_by_name(admin: httpx.Client, body: dict[str, Any], parameter: str) -> None:
    answer = admin.post("/v1/keys", json=body)
    assert answer.status_code == 422
    assert answer.json()["error"]["details"]["parameter"] == parameter


def test_a_key_and_its_callers_limits_change_for_every_process(gateway: Gateway, second: Gateway, admin: httpx.Client) -> None:
    made = make_key(admin, name="app", limits={"requests_per_minute": 500, "jobs_in_flight": 3})
    path, mine = f"/v1/keys/{made['id']}", f"Bearer {made['key']}"
    changed = admin.patch(path, json={"limits": {"jobs_in_flight": 2, "requests_per_minute": None, "gpu_seconds_per_day": 60}}).json()
    assert changed["limits"] == {"requests_per_minute": None, "jobs_in_flight": 2, "gpu_seconds_per_day": 60}
    assert {**made, **changed} == {**made, "limits": changed["limits"], "usage_today": changed["usage_today"]}
    assert ask(second, mine, "/v1/usage").json()["limits"] == changed["limits"]

    assert ask(gateway, mine, "/v1/datasets").status_code == 403
    assert admin.patch(path, json={"name": "both", "scopes": ["train", "generate", "train"]}).json()["scopes"] == ["train", "generate"]
    assert ask(gateway, mine, "/v1/datasets").status_code == 200
    wait_until(lambda: ask(second, mine, "/v1/datasets").status_code == 200, "the other process's learning of it")
    [listed] = [key for key in admin.get("/v1/keys").json()["data"] if key["id"] == made["id"]]
    assert (listed["name"], listed["limits"]) == ("both", changed["limits"])
    assert admin.patch(path, json={}).json()["name"] == "both"

    assert admin.patch(path, json={"limits": {"requests_per_minute": 1}}).status_code == 200
    assert [ask(gateway, mine).status_code for _ in range(2)] == [200, 429]
    assert admin.patch(path, json={"limits": {"requests_per_minute": None}}).status_code == 200
    assert ask(gateway, mine).status_code == 200
    assert admin.patch(path, json={"expires_at": "2020-01-01T00:00:00Z"}).json()["is_good"] is False
    assert ask(gateway, mine).status_code == 401
    assert admin.patch(path, json={"expires_at": None}).json()["is_good"] is True
    assert ask(gateway, mine).status_code == 200

    admin.delete(path)
    refused = admin.patch(path, json={"expires_at": None})
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "key_revoked")
    assert ask(gateway, mine).status_code == 401


def test_a_key_that_is_revoked_while_it_is_changed_stays_revoked(gateway: Gateway, second: Gateway, admin: httpx.Client) -> None:
    """Both write the whole record: one that wrote what it had read before would undo the other."""
    made = [make_key(admin) for _ in range(20)]

    def change(key: dict[str, Any]) -> int:
        return httpx.patch(
            f"{second.url}/v1/keys/{key['id']}", json={"name": "x"}, headers={"Authorization": f"Bearer {ADMIN_KEY}"}
        ).status_code

    with ThreadPoolExecutor(8) as pool:
        changed = pool.map(change, made)
        revoked = pool.map(lambda key: admin.delete(f"/v1/keys/{key['id']}").status_code, made)
        assert set(revoked) == {200}
        assert set(changed) <= {200, 409}
    left = {key["id"] for key in admin.get("/v1/keys").json()["data"] if key["revoked_at"] is None}
    assert not left & {key["id"] for key in made}


@pytest.mark.parametrize(
    ("body", "parameter"),
    [
        ({"name": ""}, "name"),
        ({"scopes": []}, "scopes"),
        ({"scopes": None}, "scopes"),
        ({"caller": "other"}, "caller"),
        ({"expires_at": 5}, "expires_at"),
        ({"limits": {"jobs_in_flight": 0}}, "limits.jobs_in_flight"),
        ({"limits": None}, "limits"),
    ],
)
def test_a_change_that_cannot_be_is_refused_by_name(admin: httpx.Client, body: dict[str, Any], parameter: str) -> None:
    answer = admin.patch(f"/v1/keys/{make_key(admin)['id']}", json=body)
    assert (answer.status_code, answer.json()["error"]["details"]["parameter"]) == (422, parameter)


def test_an_unknown_key_cannot_be_revoked_or_changed(admin: httpx.Client) -> None:
    for key_id in ("key_000000000000", "nonsense", "0" * 12):
        for answer in (admin.delete(f"/v1/keys/{key_id}"), admin.patch(f"/v1/keys/{key_id}", json={"name": "x"})):
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "key_not_found")


def run_command(env: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gateway", "keys", *arguments]
    return subprocess.run(command, env={"PATH": "/usr/bin:/bin", **env}, capture_output=True, text=True, timeout=60, check=False)


def test_the_operator_makes_keys_without_a_gateway(gateway: Gateway, admin: httpx.Client, env: dict[str, str]) -> None:
    made = run_command(env, "create", "--name", "ops", "--scopes", "train", "--caller", "ops-team", "--jobs-in-flight", "3")
    key = made.stdout.strip()
    usage = ask(gateway, f"Bearer {key}", "/v1/usage").json()
    assert (usage["caller"], usage["scopes"], usage["limits"]["jobs_in_flight"]) == ("ops-team", ["train"], 3)
    [line] = [line for line in run_command(env, "list").stdout.splitlines() if "\tops-team\t" in line]
    key_id = line.split("\t")[0]
    assert line.split("\t")[1:] == ["ops-team", "train", "good", "ops"]
    assert run_command(env, "revoke", key_id).returncode == 0
    wait_until(lambda: ask(gateway, f"Bearer {key}").status_code == 401, "the refusal of the revoked key")


def run_client(url: str, key: str | None, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from fluxgate.cli import main; main()", "--url", url, "keys", *arguments]
    env = {**os.environ, **({"FLUXGATE_API_KEY": key} if key else {})}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)


def test_an_admin_makes_changes_and_revokes_keys_by_the_client(gateway: Gateway, second: Gateway, admin: httpx.Client) -> None:
    made = run_client(second.url, ADMIN_KEY, "create", "--name", "studio", "--scopes", "generate,train", "--jobs-in-flight", "4")
    key = made.stdout.strip()
    assert split_key(key), made.stderr
    key_id = made.stderr.split()[0]
    usage = ask(gateway, f"Bearer {key}", "/v1/usage").json()
    assert (usage["scopes"], usage["limits"]["jobs_in_flight"]) == (["generate", "train"], 4)

    changed = run_client(second.url, ADMIN_KEY, "change", key_id, "--jobs-in-flight", "0", "--gpu-seconds-per-day", "90", "--name", "both")
    assert changed.stdout.split("\t")[:5] == [key_id, key_id, "generate,train", "good", "gpu_seconds_per_day=90"], changed.stderr
    [row] = [line for line in run_client(second.url, ADMIN_KEY, "list").stdout.splitlines() if line.startswith(key_id)]
    assert row.endswith("\tboth")
    assert key not in row

    assert run_client(second.url, ADMIN_KEY, "revoke", key_id).stdout == f"{key_id} is revoked\n"
    wait_until(lambda: ask(gateway, f"Bearer {key}", "/v1/usage").status_code == 401, "the other process's learning of it")


@pytest.mark.parametrize(
    ("key", "arguments", "said"),
    [
        (None, ("list",), "error: This needs an API key."),
        ("nonsense", ("create",), "error: That is no API key"),
        (ADMIN_KEY, ("create", "--scopes", "paint"), "error: scopes"),
        (ADMIN_KEY, ("create", "--expires-at", "tomorrow"), "error: expires_at"),
        (ADMIN_KEY, ("change", "key_0", "--name", "x"), "error: There is no key 'key_0'"),
        (ADMIN_KEY, ("revoke", "../jobs"), "error: Not Found"),
    ],
)
def test_what_the_client_cannot_do_is_one_message(second: Gateway, key: str | None, arguments: tuple[str, ...], said: str) -> None:
    failed = run_client(second.url, key, *arguments)
    assert (failed.returncode, failed.stdout) == (1, "")
    assert failed.stderr.startswith(said), failed.stderr
    assert "Traceback" not in failed.stderr


@pytest.mark.parametrize("wrong", [("create", "--scopes", "root"), ("create", "--caller", "A B"), ("revoke", "key_1")])
def test_a_command_that_cannot_work_says_why_in_one_line(env: dict[str, str], wrong: tuple[str, ...]) -> None:
    ended = run_command(env, *wrong)
    assert ended.returncode == 2
    assert len(ended.stderr.strip().splitlines()) == 1


def test_a_public_address_is_served_once_a_key_exists(env: dict[str, str], admin: httpx.Client, tmp_path: Path) -> None:
    """And should the keys get lost while it serves, nobody is let in."""
    key = make_key(admin)["key"]
    public = Gateway(tmp_path, "0.0.0.0", pick_free_port(), {**env, "DISPATCHER": "off"})
    public.start()
    try:
        wait_for_answers(public)
        assert ask(public, f"Bearer {key}").status_code == 200
        assert ask(public, None).status_code == 401
        with redis.Redis.from_url(env["REDIS_URL"]) as connection:
            connection.flushall()
        wait_until(lambda: ask(public, f"Bearer {key}").status_code == 401, "the loss of the keys")
        assert ask(public, None).status_code == 401
    finally:
        public.stop()
