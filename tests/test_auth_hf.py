"""`AUTH=hf`: Hugging Face tokens as keys, on a running deployment beside a hub that counts how often it is asked."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import httpx
import pytest
import redis

from gateway.callers.keys import mint_key
from local.services import Gateway, S3Server
from tests.callers import as_caller, make_key
from tests.deployment import describe_deployment, make_gateway, running
from tests.hub_accounts import ACCOUNTS, token_of
from tests.hub_server import Hub, running_hub
from tests.journeys.api import Api

ADMIN_KEY = "the-operators-own-key-of-the-hub-test"
ALLOWED = "Ann,bob,eve,org-of-ours"


REFUSED = ("stranger", "blind", "nothing", "organisation", "odd", "nobody")


@dataclass
class Deployment:
    gateway: Gateway
    hub: Hub
    redis_url: str

    def ask(self, token: str, path: str = "/v1/usage") -> httpx.Response:
        return httpx.get(f"{self.gateway.url}{path}", headers={"Authorization": f"Bearer {token}"}, timeout=30.0)

    def forget(self) -> None:
        """What is known of tokens in Redis; the process itself remembers for a while."""
        with redis.Redis.from_url(self.redis_url) as connection:
            for key in connection.scan_iter("fluxgate:hf_token:*"):
                connection.delete(key)


@pytest.fixture(scope="module")
def deployment(redis_server: str, s3_server: S3Server, engine: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with redis.Redis.from_url(redis_server) as connection:
        connection.flushall()
    with running_hub() as hub:
        hub.accounts.update(ACCOUNTS)
        changes = {"AUTH": "hf", "HF_ENDPOINT": hub.url, "HF_USERS": ALLOWED, "ADMIN_KEY": ADMIN_KEY, "LOG_LEVEL": "DEBUG"}
        gateway = make_gateway(tmp_path_factory.mktemp("gateway"), describe_deployment(redis_server, s3_server, engine, **changes))
        with running(gateway):
            yield Deployment(gateway, hub, redis_server)


@pytest.mark.parametrize(("name", "caller"), [("ann", "hf:ann"), ("bob", "hf:Bob"), ("fine", "hf:eve"), ("member", "hf:carl")])
def test_a_token_that_may_read_is_its_users(deployment: Deployment, name: str, caller: str) -> None:
    answer = deployment.ask(token_of(name))
    assert (answer.status_code, answer.json()["caller"]) == (200, caller)
    for path, status in (("/v1/generations", 200), ("/v1/trainings", 200), ("/v1/keys", 403), ("/metrics", 403), ("/v1/instances", 403)):
        assert deployment.ask(token_of(name), path).status_code == status, path
    assert deployment.hub.whoami.count(token_of(name)) == 1


def test_whatever_is_wrong_with_a_token_the_answer_is_that_of_a_wrong_key(deployment: Deployment) -> None:
    wrong = [*(token_of(name) for name in REFUSED), "hf_short", "hf_" + "x" * 5000, f"hf_{'x' * 30}/../y", mint_key("k", ("admin",))[1]]
    answers = [deployment.ask(token) for token in wrong]
    assert {answer.status_code for answer in answers} == {401}
    assert len({answer.text for answer in answers}) == 1
    assert {answer.headers["www-authenticate"] for answer in answers} == {"Bearer"}
    for token in wrong:
        deployment.ask(token)
    assert sorted(token for token in deployment.hub.whoami if token in wrong) == sorted(token_of(name) for name in REFUSED)


def test_keys_and_tokens_are_callers_beside_one_another(deployment: Deployment) -> None:
    with as_caller(deployment.gateway.url, ADMIN_KEY) as admin:
        key = make_key(admin, "generate", caller="ann")["key"]
        refused = admin.post("/v1/keys", json={"caller": "hf:ann"})
        assert refused.status_code == 422, "nobody is given the name of a user of the hub's"
    with as_caller(deployment.gateway.url, token_of("ann")) as ann, as_caller(deployment.gateway.url, token_of("bob")) as bob:
        job = Api.of(ann).run(workflow="trivial", color=12, metadata={"of": "ann alone"})
        upload = ann.post("/v1/uploads", files={"file": ("a.txt", b"ann's", "text/plain")})
        with as_caller(deployment.gateway.url, key) as other:
            for client in (bob, other):
                assert client.get("/v1/generations").json()["data"] == []
                for path in (
                    f"/v1/generations/{job['id']}",
                    f"/v1/generations/{job['id']}/events",
                    f"/v1/uploads/{upload.json().get('id')}",
                ):
                    assert client.get(path).status_code == 404, path
        ticket = ann.post(f"/v1/generations/{job['id']}/ticket").json()["ticket"]
    stream = httpx.get(f"{deployment.gateway.url}/v1/generations/{job['id']}/events?ticket={ticket}")
    assert (stream.status_code, "ann alone" in stream.text) == (200, True)


def test_a_token_is_kept_and_logged_nowhere(deployment: Deployment) -> None:
    tokens = [token_of(name).encode() for name in ("ann", *REFUSED)]
    with redis.Redis.from_url(deployment.redis_url) as connection:
        known = [connection.get(key) for key in connection.scan_iter("fluxgate:hf_token:*")]
        names = b"".join(key for key in connection.scan_iter() if isinstance(key, bytes))
    assert known
    said = deployment.gateway.log_path.read_bytes() + names + b"".join(value or b"" for value in known)
    assert not [token for token in tokens if token in said]


def test_a_hub_that_is_away_stops_only_those_it_was_not_asked_about(deployment: Deployment) -> None:
    assert deployment.ask(token_of("ann")).status_code == 200
    deployment.hub.whoami_status = 503
    try:
        assert deployment.ask(token_of("ann")).status_code == 200
        assert deployment.ask(ADMIN_KEY).status_code == 200
        answer = deployment.ask(token_of("late"))
        assert (answer.status_code, answer.json()["error"]["code"], answer.headers["retry-after"]) == (503, "hub_unavailable", "10")
        assert httpx.get(f"{deployment.gateway.url}/ready", headers={"Authorization": f"Bearer {token_of('late')}"}).status_code == 200
    finally:
        deployment.hub.whoami_status = None
    assert deployment.ask(token_of("late")).status_code == 401, "an outage is not remembered"
