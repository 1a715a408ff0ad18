"""Every way a request can be wrong, over HTTP. Each answer has the one error shape, and none of them is a 500."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from contextlib import closing
from http.client import HTTPConnection
from typing import Any

import httpx
import pytest
import redis

from tests.conftest import OpenGateway

JSON = {"Content-Type": "application/json"}
GENERATIONS = "/v1/generations"
TRIVIAL = {"workflow": "trivial"}
PROMPT = {"prompt": "a red circle", "steps": 1, "width": 256, "height": 256}
# A job that waits: no test here lets it run to its end.
ENDLESS = {"workflow": "slow", "steps": 10_000, "delay_ms": 20}


@pytest.fixture(scope="module")
def http(open_gateway: OpenGateway) -> Iterator[httpx.Client]:
    """A caller of a gateway that lives as long as this file's tests."""
    with open_gateway() as gateway, httpx.Client(base_url=gateway.url, timeout=30.0) as client:
        yield client


def read_error(answer: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """The error of an answer, after a look at its shape."""
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert body.keys() == {"error"}
    error = dict(body["error"])
    assert error.keys() == {"code", "message", "hint", "details"}
    assert error["code"] == code
    assert error["message"]
    assert isinstance(error["details"], dict)
    assert error["hint"] is None or error["hint"]
    return error


def run_to_end(http: httpx.Client, **body: Any) -> dict[str, Any]:
    answer = http.post(GENERATIONS, json=body, headers={"Prefer": "wait=30"})
    assert (answer.status_code, answer.json().get("status")) == (200, "succeeded"), answer.text
    return dict(answer.json())


# -- bodies that are no request ----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [GENERATIONS, "/v1/workflows/trivial/generations"])
@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        pytest.param(b'{"workflow": ', 400, "invalid_json", id="cut off"),
        pytest.param(b"{'workflow': 'trivial'}", 400, "invalid_json", id="python"),
        pytest.param(b'{"a": 1,}', 400, "invalid_json", id="comma"),
        pytest.param(b'{"prompt": "\xff\xfe"}', 400, "invalid_json", id="not UTF-8"),
        pytest.param(b'{"metadata": ' + b'{"a":' * 30_000 + b"1" + b"}" * 30_001, 400, "invalid_json", id="too deep"),
        pytest.param(b'{"seed": ' + b"9" * 5_000 + b"}", 400, "invalid_json", id="more digits than Python reads"),
        pytest.param(b"", 422, "invalid_parameter", id="empty"),
        pytest.param(b"null", 422, "invalid_parameter", id="null"),
        pytest.param(b"[]", 422, "invalid_parameter", id="array"),
        pytest.param(b'"trivial"', 422, "invalid_parameter", id="text"),
        pytest.param(b"7", 422, "invalid_parameter", id="number"),
    ],
)
def test_a_body_that_is_no_object_is_refused(http: httpx.Client, path: str, body: bytes, status: int, code: str) -> None:
    read_error(http.post(path, content=body, headers=JSON), status, code)


# -- requests that do not fit the workflow -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "parameter", "nearest"),
    [
        pytest.param({**PROMPT, "steps": "20"}, "steps", None, id="text for a number"),
        pytest.param({**PROMPT, "steps": 20.5}, "steps", 20, id="fraction for an integer"),
        pytest.param({**PROMPT, "steps": True}, "steps", None, id="true for an integer"),
        pytest.param({**PROMPT, "steps": 0}, "steps", 1, id="too few"),
        pytest.param({**PROMPT, "steps": 101}, "steps", 100, id="too many"),
        pytest.param({**PROMPT, "width": 500}, "width", 496, id="off the grid"),
        pytest.param({**PROMPT, "width": -(2**200)}, "width", 256, id="a huge negative integer"),
        pytest.param({**PROMPT, "seed": 2**63}, "seed", None, id="seed above the highest"),
        pytest.param({**PROMPT, "seed": 10**4000}, "seed", None, id="a huge integer"),
        pytest.param({**PROMPT, "seed": -2}, "seed", None, id="negative seed"),
        pytest.param({**PROMPT, "guidance_scale": float("nan")}, "guidance_scale", None, id="NaN"),
        pytest.param({**PROMPT, "guidance_scale": float("inf")}, "guidance_scale", 30.0, id="infinity"),
        pytest.param({**PROMPT, "sampler": "eulr"}, "sampler", "euler", id="misspelt choice"),
        pytest.param({**PROMPT, "output_format": "PNG"}, "output_format", "png", id="choice in capitals"),
        pytest.param({**PROMPT, "loras": {}}, "loras", None, id="loras no list"),
        pytest.param({**PROMPT, "loras": ["tok"]}, "loras[0]", None, id="a LoRA as text"),
        pytest.param({**PROMPT, "loras": [{"weight": 1}]}, "loras[0].name", None, id="a LoRA without a name"),
        pytest.param({**PROMPT, "loras": [{"name": "tok", "weight": 9}]}, "loras[0].weight", 4.0, id="LoRA weight"),
        pytest.param({**PROMPT, "loras": [{"name": "tok"}] * 2}, "loras", None, id="a LoRA twice"),
        pytest.param({**PROMPT, "loras": [{"name": f"l{n}"} for n in range(9)]}, "loras", None, id="nine LoRAs"),
        pytest.param({"steps": 1}, "prompt", None, id="no prompt"),
        pytest.param({**PROMPT, "base_model": 7}, "base_model", None, id="base model as a number"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed(http: httpx.Client, body: Any, parameter: str, nearest: object) -> None:
    answer = http.post(GENERATIONS, content=json.dumps(body).encode(), headers=JSON)
    details = read_error(answer, 422, "invalid_parameter")["details"]
    assert (details["parameter"], details["nearest"]) == (parameter, nearest)
    assert details["allowed"]
    assert "value" in details
    assert len(answer.content) < 5000


def test_every_fault_is_told_at_once(http: httpx.Client) -> None:
    details = read_error(http.post(GENERATIONS, json={**PROMPT, "steps": 0, "width": 1, "promt": ""}), 422, "invalid_parameter")["details"]
    assert {fault["parameter"] for fault in details["parameters"]} == {"steps", "width", "promt"}


@pytest.mark.parametrize(("name", "nearest"), [("step", "steps"), ("Prompt", "prompt"), ("guidance", "guidance_scale"), ("xyzzy", None)])
def test_an_unknown_parameter_is_named_with_the_nearest(http: httpx.Client, name: str, nearest: str | None) -> None:
    answer = http.post(GENERATIONS, content=json.dumps({**PROMPT, name: 1}).encode(), headers=JSON)
    error = read_error(answer, 422, "unknown_parameter")
    assert error["details"]["nearest"] == nearest
    assert error["details"]["parameter"] == name
    assert "prompt" in error["details"]["allowed"]


def test_a_name_that_is_no_text_is_refused(http: httpx.Client) -> None:
    for body in ({**PROMPT, "\ud800": 1}, {**PROMPT, "loras": [{"name": "tok", "\udfff": 1}]}):
        answer = http.post(GENERATIONS, content=json.dumps(body).encode(), headers=JSON)
        assert answer.status_code == 422
        assert "ud800" in answer.text or "udfff" in answer.text


@pytest.mark.parametrize(
    ("body", "status", "code", "parameter", "nearest"),
    [
        pytest.param({"workflow": "flx"}, 404, "workflow_not_found", None, "flux", id="workflow"),
        pytest.param({"workflow": "../flux"}, 404, "workflow_not_found", None, "flux", id="workflow as a path"),
        pytest.param({"workflow": ""}, 422, "invalid_parameter", "prompt", None, id="no workflow is the default one"),
        pytest.param({**PROMPT, "base_model": "tinyflx"}, 422, "base_model_not_found", "base_model", "tinyflux", id="base model"),
        pytest.param({**PROMPT, "loras": [{"name": "tock"}]}, 404, "lora_not_found", "loras", ["tok"], id="LoRA"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(
    http: httpx.Client, body: Any, status: int, code: str, parameter: str | None, nearest: object
) -> None:
    error = read_error(http.post(GENERATIONS, json=body), status, code)
    assert error["details"].get("parameter") == parameter
    assert error["details"]["nearest"] == nearest
    assert error["hint"] or nearest is None


def test_a_lora_of_another_family_is_refused(http: httpx.Client) -> None:
    error = read_error(
        http.post(GENERATIONS, json={**PROMPT, "base_model": "flux1-dev", "loras": [{"name": "tok"}]}), 422, "family_mismatch"
    )
    assert (error["details"]["parameter"], error["details"]["value"]) == ("loras", "tok")
    assert (error["details"]["family"], error["details"]["allowed"]) == ("tinyflux", ["flux1"])


def test_a_model_that_no_instance_has_is_named(http: httpx.Client) -> None:
    error = read_error(http.post(GENERATIONS, json={**PROMPT, "base_model": "flux1-dev"}), 503, "no_instance")
    assert "UNETLoader.unet_name = flux1-dev.safetensors" in error["details"]["missing"]
    assert len(error["details"]["instances"]) == 1


@pytest.mark.parametrize(
    "metadata",
    [
        pytest.param([], id="a list"),
        pytest.param({"note": "x" * 17_000}, id="too long"),
        pytest.param({"note": float("nan")}, id="NaN"),
        pytest.param({"note": "\ud800"}, id="half a character"),
        pytest.param({"\udfff": 1}, id="half a character as a key"),
    ],
)
def test_metadata_has_limits(http: httpx.Client, metadata: object) -> None:
    answer = http.post(GENERATIONS, content=json.dumps({**TRIVIAL, "metadata": metadata}).encode(), headers=JSON)
    assert read_error(answer, 422, "invalid_parameter")["details"]["parameter"] == "metadata"


def test_metadata_within_the_limits_comes_back_as_it_is(http: httpx.Client) -> None:
    metadata: dict[str, Any] = {
        "text": "été 🔴 \u0000 \u2028",
        "list": [1, 2.5, None, True, {"deep": []}],
        "": "empty",
        "long": "x" * 15_000,
    }
    job = run_to_end(http, **TRIVIAL, metadata=metadata)
    assert http.get(f"{GENERATIONS}/{job['id']}").json()["metadata"] == metadata


@pytest.mark.parametrize(
    ("name", "value"), [("priority", "urgent"), ("priority", 1), ("workflow", 7), ("workflow", ["flux"]), ("metadata", 1)]
)
def test_the_gateways_own_fields_are_checked_too(http: httpx.Client, name: str, value: object) -> None:
    error = read_error(http.post(GENERATIONS, json={**PROMPT, name: value}), 422, "invalid_parameter")
    assert error["details"]["parameter"] == name


# -- places that are not there -----------------------------------------------------------------------------------

IDS = ["gen_0", "nonsense", "%00", "%ff%fe", "%2e%2e", "gen_%0d%0a", "%F0%9F%94%B4", "*", "x" * 3000]


@pytest.mark.parametrize("job_id", IDS)
@pytest.mark.parametrize(
    ("method", "path"), [("GET", ""), ("DELETE", ""), ("GET", "/events"), ("POST", "/events"), ("GET", "/workflow"), ("POST", "/cancel")]
)
def test_an_unknown_job_is_not_there(http: httpx.Client, job_id: str, method: str, path: str) -> None:
    read_error(http.request(method, f"{GENERATIONS}/{job_id}{path}"), 404, "job_not_found")


def test_somebody_elses_job_is_as_absent_as_one_that_never_was(http: httpx.Client, redis_server: str) -> None:
    job = run_to_end(http, **TRIVIAL)
    key = f"fluxgate:job:{job['id']}"
    with redis.Redis.from_url(redis_server) as connection:
        spec = json.loads(connection.hget(key, "spec") or b"")
        connection.hset(key, "spec", json.dumps({**spec, "caller": "somebody else"}))
    for method, path in (("GET", ""), ("GET", "/events"), ("GET", "/workflow"), ("POST", "/cancel"), ("DELETE", "")):
        foreign = read_error(http.request(method, f"{GENERATIONS}/{job['id']}{path}"), 404, "job_not_found")
        absent = read_error(http.request(method, f"{GENERATIONS}/gen_0{path}"), 404, "job_not_found")
        assert json.loads(json.dumps(foreign).replace(job["id"], "gen_0")) == absent


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("/v1/nothing", "not_found"),
        ("/v1", "not_found"),
        ("/v1/workflows/flx", "workflow_not_found"),
        ("/v1/loras/tock", "lora_not_found"),
        ("/v1/loras/a/b", "lora_not_found"),
        ("/v1/instances/nowhere", "instance_not_found"),
    ],
)
def test_an_unknown_place_is_not_there(http: httpx.Client, path: str, code: str) -> None:
    read_error(http.get(path), 404, code)


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("PUT", GENERATIONS, "POST"),
        ("DELETE", GENERATIONS, "POST"),
        ("PATCH", f"{GENERATIONS}/gen_0", "GET"),
        ("GET", f"{GENERATIONS}/gen_0/cancel", "POST"),
        ("POST", "/health", "GET"),
        ("DELETE", "/v1/workflows", "GET"),
    ],
)
def test_a_method_that_a_route_lacks_is_refused(http: httpx.Client, method: str, path: str, allowed: str) -> None:
    answer = http.request(method, path)
    read_error(answer, 405, "method_not_allowed")
    assert allowed in answer.headers["allow"]


# -- queries and headers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("query", "parameter"),
    [
        ({"limit": "0"}, "limit"),
        ({"limit": "101"}, "limit"),
        ({"limit": "many"}, "limit"),
        ({"limit": "9" * 5000}, "limit"),
        ({"status": "done"}, "status"),
        ({"cursor": "x"}, "cursor"),
        ({"cursor": "!!!"}, "cursor"),
        ({"cursor": "é"}, "cursor"),
        ({"cursor": ""}, "cursor"),
        ({"cursor": base64.urlsafe_b64encode(b"now:gen_0").decode()}, "cursor"),
        ({"cursor": base64.urlsafe_b64encode(b"\xff:\xff").decode()}, "cursor"),
        ({"created_after": "yesterday"}, "created_after"),
        ({"created_after": "2026-01-31T12:00:00"}, "created_after"),
    ],
)
def test_a_list_query_that_cannot_be_read_is_named(http: httpx.Client, query: dict[str, str], parameter: str) -> None:
    answer = http.get(GENERATIONS, params=query)
    code = "invalid_parameter" if parameter in ("limit", "status") else "bad_request"
    assert read_error(answer, 400, code)["details"]["parameter"] == parameter


@pytest.mark.parametrize("after", ["x", "1-", "-1", "1-2-3", "$", "+", "1 2", "9" * 40, "(1-1"])
def test_an_event_id_that_is_none_is_refused(http: httpx.Client, after: str) -> None:
    job = run_to_end(http, **TRIVIAL)
    for answer in (
        http.get(f"{GENERATIONS}/{job['id']}/events", params={"after": after}),
        http.get(f"{GENERATIONS}/{job['id']}/events", headers={"Last-Event-ID": after}),
    ):
        assert read_error(answer, 400, "bad_request")["details"]["parameter"] == "after"


def test_a_request_id_is_echoed_when_it_is_one_and_made_when_not(http: httpx.Client) -> None:
    for given in ("a", "order-17.b_2", "x" * 64):
        assert http.get("/health", headers={"X-Request-ID": given}).headers["x-request-id"] == given
    for given in ("x" * 65, "two words", "a;b", ""):
        assert len(http.get("/health", headers={"X-Request-ID": given}).headers["x-request-id"]) == 16
    answer = http.get(f"{GENERATIONS}/gen_0", headers={"X-Request-ID": "lost"})
    assert (answer.status_code, answer.headers["x-request-id"]) == (404, "lost")


# -- bodies that are too large -----------------------------------------------------------------------------------

LIMIT = 1 << 20


def test_a_large_body_is_refused_before_it_is_read(http: httpx.Client) -> None:
    """The head alone is sent: an answer can come only from it."""
    with closing(HTTPConnection(http.base_url.host, http.base_url.port or 80, timeout=10)) as connection:
        connection.putrequest("POST", "/v1/trainings")
        connection.putheader("Content-Type", "application/json")
        connection.putheader("Content-Length", str(LIMIT + 1))
        connection.endheaders()
        answer = connection.getresponse()
        assert (answer.status, json.load(answer)["error"]["code"]) == (413, "payload_too_large")


def test_a_large_body_without_a_length_is_refused_while_it_comes(http: httpx.Client) -> None:
    pieces = (b'{"name": "' if number == 0 else b"a" * 65_536 for number in range(20))
    read_error(http.post("/v1/trainings", content=pieces, headers=JSON), 413, "payload_too_large")


def test_a_body_just_under_the_limit_is_read(http: httpx.Client) -> None:
    body = json.dumps({"prompt": ""}).encode()
    body = body.replace(b'""', b'"' + b"a" * (LIMIT - len(body)) + b'"')
    assert len(body) == LIMIT
    read_error(http.post(GENERATIONS, content=body, headers=JSON), 422, "invalid_parameter")


# -- Prefer ------------------------------------------------------------------------------------------------------


def test_prefer_wait_holds_the_answer_until_the_job_has_ended(http: httpx.Client) -> None:
    answer = http.post(GENERATIONS, json={"workflow": "slow", "steps": 5, "delay_ms": 20}, headers={"Prefer": "respond-async, wait=20"})
    assert (answer.status_code, answer.json()["status"]) == (200, "succeeded")
    assert answer.headers["preference-applied"] == "wait=20"
    assert answer.headers["location"] == answer.json()["urls"]["self"]
    assert httpx.get(answer.json()["outputs"][0]["url"]).status_code == 200


def test_prefer_wait_that_passes_answers_with_the_running_job(http: httpx.Client) -> None:
    answer = http.post(GENERATIONS, json=ENDLESS, headers={"Prefer": "wait=1"})
    assert (answer.status_code, answer.json()["status"]) == (202, "running")
    http.post(f"{GENERATIONS}/{answer.json()['id']}/cancel")


@pytest.mark.parametrize("prefer", ["wait=0", "return=minimal", "", "waiting=5", ";;,"])
def test_other_preferences_change_nothing(http: httpx.Client, prefer: str) -> None:
    answer = http.post(GENERATIONS, json=TRIVIAL, headers={"Prefer": prefer})
    assert answer.status_code == 202
    assert "preference-applied" not in answer.headers


@pytest.mark.parametrize("prefer", ["wait", "wait=", "wait=soon", "wait=-1", "wait=1.5", "wait=1e3"])
def test_a_wait_that_is_no_number_is_refused_and_makes_no_job(http: httpx.Client, prefer: str) -> None:
    before = http.get(GENERATIONS, params={"limit": 1}).json()["data"]
    answer = http.post(GENERATIONS, json=TRIVIAL, headers={"Prefer": prefer})
    assert read_error(answer, 400, "bad_request")["details"]["parameter"] == "Prefer"
    assert [job["id"] for job in http.get(GENERATIONS, params={"limit": 1}).json()["data"]] == [job["id"] for job in before]


@pytest.mark.parametrize("prefer", ["wait=²", "wait=" + "9" * 5000])
def test_a_wait_of_odd_digits_is_refused(http: httpx.Client, prefer: str) -> None:
    answer = http.post(GENERATIONS, json=TRIVIAL, headers=[(b"Prefer", prefer.encode("latin-1"))])
    assert read_error(answer, 400, "bad_request")["details"]["parameter"] == "Prefer"


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_a_body_that_is_not_declared_as_json_is_refused(http: httpx.Client, content_type: str) -> None:
    read_error(
        http.post(GENERATIONS, content=b'{"workflow": "trivial"}', headers={"Content-Type": content_type}), 415, "unsupported_media_type"
    )


@pytest.mark.parametrize("headers", [{}, {"Idempotency-Key": "deep"}])
@pytest.mark.parametrize("name", ["metadata", "prompt", "nonsense"])
@pytest.mark.parametrize("depth", [66, 200, 300, 900])
def test_a_body_that_is_too_deep_names_the_field(http: httpx.Client, depth: int, name: str, headers: dict[str, str]) -> None:
    nested = '{"a":' * depth + "1" + "}" * depth
    body = f'{{"workflow": "trivial", "{name}": {nested}}}'.encode()
    answer = http.post(GENERATIONS, content=body, headers={**JSON, **headers})
    assert name in read_error(answer, 422, "invalid_parameter")["message"]
