"""Two callers with everything shared but the key, or the Hugging Face token. Walks the OpenAPI document: a route that is added is tried
by itself, and fails here until it is known what its path parameters mean."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
import redis
from fastapi import FastAPI
from fastapi.routing import APIWebSocketRoute

from gateway.app import create_app
from gateway.edge.openapi import PUBLIC
from gateway.jobs.model import now_ms
from gateway.pricing import ENOUGH
from gateway.settings import Settings
from local.services import S3Server
from tests.callers import as_caller, make_key
from tests.deployment import describe_deployment, make_gateway, running
from tests.hub_accounts import ACCOUNTS, token_of
from tests.hub_server import running_hub
from tests.journeys.api import Api
from tests.journeys.belongings import (
    Belongings,
    acquire,
    announce_lora,
    describe_training,
    draw_picture,
    hide,
    make_private,
    open_socket,
    use_lora,
    write_ticket,
)
from tests.test_scopes import walk

Json = dict[str, Any]
SCOPES = ("generate", "train", "admin")
# What all callers of a deployment share; who may change it is said by scopes.
SHARED = {("/v1/workflows/", "name"), ("/v1/instances/", "instance"), ("/v1/keys/", "key_id")}
# Deployment-wide facts for admins.
OPERATORS = {"/v1/keys", "/v1/instances", "/metrics"}
# Bodies without which a route answers before it looks whose the thing is.
BODIES: dict[tuple[str, str], Json] = {
    ("patch", "/v1/loras/{name}"): {"json": {"shared": True}},
    ("put", "/v1/datasets/{dataset_id}/files"): {"files": {"files": ("b.png", b"x")}},
    ("post", "/v1/datasets/{dataset_id}/captions"): {"json": {}},
}


ADMIN_KEY = "the-operators-own-key-of-the-isolation-test"


@dataclass
class Two:
    """A owns things; B has a key with the same scopes. Or either has a Hugging Face token."""

    url: str
    redis_url: str
    a: httpx.Client
    b: httpx.Client
    keys: tuple[Json, Json]
    mine: Belongings


@pytest.fixture(scope="module")
def two(redis_server: str, s3_server: S3Server, engine: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Two]:
    with redis.Redis.from_url(redis_server) as connection:
        connection.flushall()
        with running_hub() as hub:
            hub.accounts.update(ACCOUNTS)
            changes = {"CACHE_TTL_S": "3600", "TRAINER": "tiny", "ADMIN_KEY": ADMIN_KEY, "AUTH": "hf", "HF_ENDPOINT": hub.url}
            # For those without the scope `admin`, which no token has.
            changes["RAW_GRAPHS"] = "all"
            gateway = make_gateway(tmp_path_factory.mktemp("gateway"), describe_deployment(redis_server, s3_server, engine, **changes))
            with running(gateway), as_caller(gateway.url, ADMIN_KEY) as admin:
                keys = make_key(admin, *SCOPES), make_key(admin, *SCOPES)
                with as_caller(gateway.url, keys[0]["key"]) as a, as_caller(gateway.url, keys[1]["key"]) as b:
                    yield Two(gateway.url, redis_server, a, b, keys, acquire(a, redis_server, keys[0]["caller"]))
        connection.flushall()


@pytest.fixture(scope="module")
def tokens(two: Two) -> Iterator[Two]:
    """Two users of Hugging Face on the same deployment; the first owns things."""
    keys = tuple({"key": token_of(name), "caller": caller} for name, caller in (("ann", "hf:ann"), ("bob", "hf:Bob")))
    with as_caller(two.url, keys[0]["key"]) as a, as_caller(two.url, keys[1]["key"]) as b:
        yield Two(two.url, two.redis_url, a, b, (keys[0], keys[1]), acquire(a, two.redis_url, keys[0]["caller"]))


@pytest.fixture(params=["key, key", "key, token", "token, key", "token, token"])
def pair(request: pytest.FixtureRequest, two: Two, tokens: Two) -> Two:
    """Whoever owns things, and whoever comes to see: by an API key or by a token."""
    owner, visitor = (tokens if kind == "token" else two for kind in request.param.split(", "))
    return Two(two.url, two.redis_url, owner.a, visitor.b, (owner.keys[0], visitor.keys[1]), owner.mine)


# What makes something of the caller's own, or acts on what all share; ids in their bodies are tried one by one below.
MAKERS = {
    *(
        ("post", path)
        for path in ("/v1/generations", "/v1/generations/preview", "/v1/batches", "/v1/images/generations", "/v1/images/edits")
    ),
    *(("post", path) for path in ("/v1/uploads", "/v1/datasets", "/v1/trainings", "/v1/loras", "/v1/keys", "/v1/instances")),
    *(("post", path) for path in ("/v1/models/load", "/v1/models/unload")),
    *(("post", path) for path in ("/api/v2/jobs", "/api/v2/assets", "/api/v2/assets/from-hash")),
}
_OF_A_WORKFLOW = re.compile(r"/v1/workflows/[a-z0-9-]+/generations")


def read_operations(app: FastAPI) -> list[tuple[str, str]]:
    """(method, path) of everything the document tells of."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Duplicate Operation ID")
        paths = app.openapi()["paths"]
    return [(method, path) for path, operations in paths.items() for method in operations]


def find_untried(operations: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Operations without an id in their path of which nobody has said what another caller could learn by them."""
    known = {*MAKERS, *(("get", path) for path in (*LISTS, *OPERATORS))}
    return [
        (method, path)
        for method, path in operations
        if "{" not in path and path not in PUBLIC and (method, path) not in known and not _OF_A_WORKFLOW.fullmatch(path)
    ]


def is_shared(path: str) -> bool:
    return any(path.startswith(begin) and f"{{{parameter}}}" in path for begin, parameter in SHARED)


OPERATIONS = read_operations(create_app(Settings(workflows_dir=None)))
WITH_IDS = [(method, path) for method, path in OPERATIONS if "{" in path and not is_shared(path)]
# What takes things away comes last, so that all others are tried while they are there.
WITH_IDS.sort(key=lambda operation: operation[0] == "delete")
LISTS = [path for method, path in OPERATIONS if method == "get" and re.match(r"/(v1|api)/[^{]*$", path) and path not in OPERATORS | PUBLIC]
SOCKETS = [route.path for route in walk(create_app(Settings(workflows_dir=None)).routes) if isinstance(route, APIWebSocketRoute)]


def fill(path: str, mine: Belongings) -> tuple[str, str]:
    """The path with A's ids, and with ids that there are not."""
    own, absent = path, path
    for parameter in re.findall(r"{(\w+)}", path):
        found = mine.find(path, parameter)
        assert found is not None, f"{path}: say in belongings.acquire() what {parameter!r} is, or in SHARED that all callers share it"
        own, absent = own.replace(f"{{{parameter}}}", found[0]), absent.replace(f"{{{parameter}}}", found[1])
    return own, absent


def test_every_operation_is_tried() -> None:
    assert find_untried(OPERATIONS) == []


def test_a_route_that_is_added_without_a_word_fails_here() -> None:
    app = FastAPI()
    for method, path in (("GET", "/v1/secrets/{secret_id}"), ("POST", "/v1/wishes"), ("DELETE", "/v1/wishes")):
        app.add_api_route(path, lambda: None, methods=[method], operation_id=f"{method} {path}")
    added = read_operations(app)
    assert find_untried(added) == [("post", "/v1/wishes"), ("delete", "/v1/wishes")]
    with pytest.raises(AssertionError, match="say in belongings"):
        fill("/v1/secrets/{secret_id}", Belongings())


@pytest.mark.parametrize(("method", "path"), WITH_IDS)
def test_a_foreign_id_is_as_absent_as_one_that_never_was(pair: Two, method: str, path: str) -> None:
    own, absent = fill(path, pair.mine)
    asked = BODIES.get((method, path), {})
    foreign, unknown = pair.b.request(method, own, **asked), pair.b.request(method, absent, **asked)
    assert foreign.status_code == 404, f"answered before it looked whose it is; give it a body in BODIES: {foreign.text}"
    assert hide(foreign.status_code, foreign.text, own) == hide(unknown.status_code, unknown.text, absent)


def test_nothing_of_the_owner_was_touched(pair: Two) -> None:
    for (path, parameter), (own, _) in pair.mine.ids.items():
        if parameter not in ("digest", "name"):
            assert pair.a.get(f"{path}{own}").status_code == 200, (path, parameter)
    assert pair.a.get("/v1/loras/own-lora").json()["shared"] is False
    training, _ = pair.mine.ids["/v1/trainings/", "job_id"]
    assert pair.a.get(f"/v1/trainings/{training}").json()["status"] == "queued"


@pytest.mark.parametrize("path", SOCKETS)
def test_a_foreign_socket_is_refused_as_an_unknown_one(pair: Two, path: str) -> None:
    own, absent = fill(path, pair.mine)
    key = pair.keys[1]["key"]
    foreign, unknown = open_socket(pair.url + own, key), open_socket(pair.url + absent, key)
    assert foreign[0] == 404
    assert hide(*foreign, own) == hide(*unknown, absent)
    assert open_socket(pair.url + own, pair.keys[0]["key"])[0] == 101


@pytest.mark.parametrize("path", LISTS)
def test_no_list_and_no_count_tells_of_others(pair: Two, path: str) -> None:
    answer = pair.b.get(path)
    assert answer.status_code == 200, answer.text
    assert not [secret for secret in pair.mine.secrets if secret in answer.text]
    if path in ("/v1/generations", "/v1/datasets", "/v1/trainings", "/v1/uploads", "/v1/batches"):
        assert answer.json()["data"] == []
        assert pair.a.get(path).json()["data"] != []


@pytest.mark.parametrize(
    ("path", "make_body"),
    [
        ("/v1/generations", lambda own: {"prompt": "x", "loras": [{"name": own("/v1/loras/", "name")}]}),
        ("/v1/generations", lambda own: {"workflow": "flux-img2img", "prompt": "x", "image": own("/v1/uploads/", "upload_id")}),
        ("/v1/trainings", lambda own: describe_training(own("/v1/datasets/", "dataset_id"))),
        ("/v1/trainings", lambda own: describe_training(own("B", "dataset"), resume_from=own("/v1/trainings/", "job_id"))),
        ("/v1/datasets", lambda own: {"name": "x", "uploads": [{"id": own("/v1/uploads/", "upload_id"), "name": "a.png"}]}),
        ("/api/v2/assets/from-hash", lambda own: {"hash": own("/api/v2/assets/", "digest")}),
    ],
)
def test_a_foreign_id_in_a_body_is_as_absent(pair: Two, path: str, make_body: Any) -> None:
    of_b = pair.b.post("/v1/datasets", files=[("files", ("a.png", draw_picture()))], data={"trigger_word": "TOK"}).json()["id"]
    pair.mine.ids["B", "dataset"] = (of_b, of_b)
    own, absent = (make_body(lambda *key, side=side: pair.mine.ids[key][side]) for side in (0, 1))
    foreign, unknown = pair.b.post(path, json=own), pair.b.post(path, json=absent)
    assert foreign.status_code in (404, 422), foreign.text
    texts = [(answer.status_code, answer.text) for answer in (foreign, unknown)]
    for value, other in pair.mine.ids.values():
        texts = [(status, text.replace(value, "…").replace(other, "…")) for status, text in texts]
    assert texts[0] == texts[1]


def test_the_same_request_of_another_is_neither_cached_nor_a_twin(two: Two) -> None:
    body = {"workflow": "flux", "prompt": "asked for by both", "width": 256, "height": 256, "steps": 1, "seed": 9}
    Api.of(two.a).run(**body)
    assert two.a.post("/v1/generations", json=body).json()["cached"] is True
    other = Api.of(two.b).run(**body)
    assert other["cached"] is False
    assert other["attempts"] == 1
    assert "queue_ms" in other["metrics"]


def test_a_preview_tells_nothing_of_what_others_made_or_make(two: Two) -> None:
    """Neither that it is in the cache or in the making, nor how many jobs of theirs were measured or wait."""
    body = {"workflow": "flux", "prompt": "previewed by both", "width": 256, "height": 256, "steps": 1, "seed": 4}
    slow = {"workflow": "slow", "size": 64, "steps": 50, "delay_ms": 20}
    Api.of(two.a).run(**body)
    assert two.a.post("/v1/generations/preview", json=body).json()["cache"] == "hit"
    waiting = [two.a.post("/v1/generations", json={**slow, "color": color}).json()["id"] for color in range(8)]
    assert two.a.post("/v1/generations/preview", json={**slow, "color": 7}).json()["cache"] == "in_flight"
    told = [two.b.post("/v1/generations/preview", json=asked).json() for asked in (body, {**slow, "color": 7})]
    assert [(one["cache"], one["cache_job"]) for one in told] == [("miss", None)] * 2
    assert {one["queue_position"] for one in told} <= {0, 1}, "callers take turns: one job of each goes before, however many wait"
    assert {one["estimate"]["measured"] for one in told} <= {0, ENOUGH}
    for job in waiting:
        two.a.post(f"/v1/generations/{job}/cancel")


def test_the_same_bytes_are_new_to_whoever_sends_them_first(two: Two) -> None:
    picture = draw_picture()
    answers = [client.post("/api/v2/assets", files={"file": ("x.png", picture)}) for client in (two.a, two.a, two.b)]
    assert answers[0].status_code == answers[2].status_code != answers[1].status_code
    assert answers[2].json().keys() == answers[0].json().keys()
    assert answers[2].json()["id"] not in {answers[0].json()["id"], answers[1].json()["id"]}


def test_a_name_nearly_that_of_anothers_lora_is_told_nothing(two: Two) -> None:
    for client, is_named in ((two.a, True), (two.b, False)):
        answer = client.post("/v1/generations", json={"prompt": "x", "loras": [{"name": "own-lor"}]})
        assert (answer.status_code, "own-lora" in answer.text) == (404, is_named)


def test_what_one_caller_uses_up_is_not_counted_to_the_other(two: Two) -> None:
    """Requests a minute, and what usage says; keys of one caller share both."""
    made = [make_key(two.a, "generate", caller=name, limits={"requests_per_minute": 3}) for name in ("eager", "eager", "calm")]
    with as_caller(two.url, made[0]["key"]) as one, as_caller(two.url, made[1]["key"]) as same, as_caller(two.url, made[2]["key"]) as calm:
        assert [client.get("/v1/generations").status_code for client in (one, one, same, same, one)] == [200, 200, 200, 429, 429]
        assert calm.get("/v1/generations").status_code == 200
        usage = calm.get("/v1/usage").json()
    assert usage["caller"] == "calm"
    assert sum(day["refused"] for day in usage["days"]) == 0
    assert sum(day["jobs"][outcome] for day in usage["days"] for outcome in day["jobs"]) == 0


def test_one_in_flight_is_joined_by_its_own_caller_alone(two: Two) -> None:
    slow = {"workflow": "slow", "size": 64, "color": 77, "steps": 60, "delay_ms": 25}
    jobs = [client.post("/v1/generations", json=slow).json()["id"] for client in (two.a, two.a, two.b)]
    with redis.Redis.from_url(two.redis_url) as connection:
        followers = connection.zrange(f"fluxgate:followers:{jobs[0]}", 0, -1)
    assert [follower.decode() for follower in followers] == [jobs[1]]
    ended = [Api.of(client).wait(job) for client, job in zip((two.a, two.a, two.b), jobs, strict=True)]
    assert [job["status"] for job in ended] == ["succeeded"] * 3
    assert [job["cached"] for job in ended] == [False, True, False]


def test_an_idempotency_key_is_its_callers_own(two: Two) -> None:
    body = {"workflow": "flux", "prompt": "keyed", "width": 256, "height": 256, "steps": 1}
    answers = [client.post("/v1/generations", json=body, headers={"Idempotency-Key": "same"}) for client in (two.a, two.b, two.b)]
    assert [answer.headers.get("Idempotency-Replayed") for answer in answers] == [None, None, "true"]
    assert answers[0].json()["id"] != answers[1].json()["id"] == answers[2].json()["id"]
    other = two.b.post("/v1/generations", json={**body, "prompt": "another"}, headers={"Idempotency-Key": "same"})
    assert other.status_code == 422


def test_a_lora_is_for_others_once_it_is_shared(two: Two) -> None:
    announce_lora(two.redis_url, two.keys[0]["caller"], "to-share", training="trn_of_a")
    assert two.b.get("/v1/loras/to-share").status_code == 404
    assert two.a.patch("/v1/loras/to-share", json={"shared": True}).json()["shared"] is True
    seen = two.b.get("/v1/loras/to-share").json()
    assert (seen["owned"], seen["shared"], seen["training"]) == (False, True, None)
    assert two.a.patch("/v1/loras/to-share", json={"shared": False}).status_code == 200
    assert two.b.get("/v1/loras/to-share").status_code == 404


def test_of_two_loras_with_one_name_each_caller_gets_its_own(two: Two) -> None:
    own = [announce_lora(two.redis_url, key["caller"], "same-name") for key in two.keys]
    announce_lora(two.redis_url, None, "same-name")
    for client, lora in zip((two.a, two.b), own, strict=True):
        assert client.get("/v1/loras/same-name").json()["file"] == lora.file


def test_a_private_lora_on_an_instance_is_no_choice_of_another_callers_graph(two: Two) -> None:
    """ComfyUI runs whatever file is named; the gateway says that there is none, in the words for one that there is not."""
    [file] = [lora["file"] for lora in two.b.get("/v1/loras").json()["data"] if lora["name"] == "tok"]
    make_private(two.redis_url, two.keys[0]["caller"], file)
    try:
        foreign, unknown = (two.b.post("/api/v2/jobs", json={"workflow": use_lora(name)}) for name in (file, "no-such.safetensors"))
        assert foreign.status_code == 422
        assert foreign.text.replace(file, "…") == unknown.text.replace("no-such.safetensors", "…")
        assert two.a.post("/api/v2/jobs", json={"workflow": use_lora(file)}).status_code in (200, 201, 202)
        assert "tok" not in [lora["name"] for lora in two.b.get("/v1/loras").json()["data"]]
        assert two.a.delete("/v1/loras/tok").status_code == 200
        for client in (two.a, two.b):
            assert client.get("/v1/loras/tok").status_code == 404, "a file left on an instance is nobody's"
    finally:
        with redis.Redis.from_url(two.redis_url) as connection:
            connection.srem("fluxgate:withdrawn", file)


# -- tickets ---------------------------------------------------------------------------------------------------


def read_stream(two: Two, path: str, method: str = "GET") -> httpx.Response:
    return httpx.request(method, f"{two.url}{path}", timeout=30)


def test_a_ticket_opens_the_streams_of_its_job_and_nothing_else(two: Two) -> None:
    job, _ = two.mine.ids["/v1/generations/", "job_id"]
    made = two.a.post(f"/v1/generations/{job}/ticket")
    assert made.status_code == 201
    ticket = made.json()["ticket"]
    for method in ("GET", "POST"):
        stream = read_stream(two, f"/v1/generations/{job}/events?ticket={ticket}", method)
        assert (stream.status_code, "event: status" in stream.text) == (200, True)
    assert read_stream(two, made.json()["urls"]["events"].removeprefix(two.url)).status_code == 200
    assert open_socket(f"{two.url}/v1/generations/{job}/ws?ticket={ticket}", None)[0] == 101
    for path in ("", "/workflow", "/ticket"):
        assert read_stream(two, f"/v1/generations/{job}{path}?ticket={ticket}", "POST" if path == "/ticket" else "GET").status_code == 401
    assert httpx.get(f"{two.url}/v1/generations/{job}", headers={"Authorization": f"Bearer {ticket}"}).status_code == 401


def test_what_is_no_ticket_for_the_job_is_refused_in_the_same_words(two: Two) -> None:
    job, absent = two.mine.ids["/v1/generations/", "job_id"]
    raw, _ = two.mine.ids["/api/v2/jobs/", "job_id"]
    caller = two.keys[0]["caller"]
    good = write_ticket(two.redis_url, job, caller, None, now_ms() + 60_000)
    payload, signature = good.split(".")
    foreign = write_ticket(two.redis_url, job, two.keys[1]["caller"], None, now_ms() + 60_000)
    wrong = [
        write_ticket(two.redis_url, job, caller, None, now_ms() - 1),
        write_ticket(two.redis_url, raw, caller, None, now_ms() + 60_000),
        write_ticket(two.redis_url, absent, caller, None, now_ms() + 60_000),
        f"{foreign.split('.')[0]}.{signature}",
        f"{payload[::-1]}.{signature}",
        f"{payload}.{signature[::-1]}",
        f"{payload}.",
        payload,
        f"{good}.{signature}",
        "x",
        "",
    ]
    assert read_stream(two, f"/v1/generations/{job}/events?ticket={good}").status_code == 200
    answers = [read_stream(two, f"/v1/generations/{job}/events?ticket={text}") for text in wrong]
    assert {answer.status_code for answer in answers} == {401}
    assert len({answer.text for answer in answers}) == 1
    assert open_socket(f"{two.url}/v1/generations/{job}/ws?ticket={wrong[0]}", None)[0] == 401
    # One that another caller could have got for this id only by owning the job.
    assert read_stream(two, f"/v1/generations/{job}/events?ticket={foreign}").status_code == 404


def test_a_ticket_dies_with_the_key_that_got_it(two: Two) -> None:
    made = make_key(two.a, "generate", caller="short-lived")
    with as_caller(two.url, made["key"]) as client:
        job = Api.of(client).run(workflow="trivial", color=31)["id"]
        ticket = client.post(f"/v1/generations/{job}/ticket", json={"ttl_s": 3600}).json()["ticket"]
    assert read_stream(two, f"/v1/generations/{job}/events?ticket={ticket}").status_code == 200
    two.a.delete(f"/v1/keys/{made['id']}")
    assert read_stream(two, f"/v1/generations/{job}/events?ticket={ticket}").status_code == 401
