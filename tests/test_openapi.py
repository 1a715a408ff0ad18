"""The OpenAPI document says all that can be answered, and a refused method says which there are."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi import FastAPI
from jsonschema_rs import Draft202012Validator

from gateway.app import create_app
from gateway.edge.openapi import PUBLIC, list_methods
from gateway.edge.openapi_words import EXAMPLES, GROUPS
from gateway.settings import Settings
from tests import test_scopes
from tests.deployment import WORKFLOWS_DIR

Json = dict[str, Any]


@pytest.fixture(scope="module")
def app() -> FastAPI:
    return create_app(Settings(workflows_dir=WORKFLOWS_DIR))


@pytest.fixture(scope="module")
def document(app: FastAPI) -> Json:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Duplicate Operation ID")
        return app.openapi()


def walk(document: Json) -> Iterator[tuple[str, str, Json]]:
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            yield path, method, operation


def test_every_reference_leads_somewhere(document: Json) -> None:
    names = set(re.findall(r'"\$ref": "#/components/schemas/([^"]+)"', json.dumps(document)))
    assert names - document["components"]["schemas"].keys() == set()
    assert set(re.findall(r'"\$ref": "(?!#/components/)[^"]*"', json.dumps(document))) == set()
    assert {"LoraRequest", "Error", "OpenAIError"} <= names


def test_every_operation_tells_of_its_errors_in_the_words_of_its_family(document: Json) -> None:
    for path, method, operation in walk(document):
        told = operation["responses"]
        assert "HTTPValidationError" not in str(told), path
        assert {"400", "403", "431"} <= told.keys(), path
        if path in PUBLIC:
            assert "security" not in operation
            continue
        assert operation["security"] == [{"key": []}]
        assert {"401", "429", "503"} <= told.keys(), path
        assert "404" in told or "{" not in path, path
        assert {"408", "409", "413"} <= told.keys() or method in ("get", "head"), path
        family = "OpenAIError" if path.startswith("/v1/images/") else "Error"
        assert method == "head" or told["401"]["content"]["application/json"]["schema"]["$ref"].endswith(f"/{family}")


def test_every_operation_has_a_group_a_line_and_an_id_of_its_own(document: Json) -> None:
    operations = [operation for _, _, operation in walk(document)]
    assert {tag for operation in operations for tag in operation["tags"]} == set(GROUPS)
    assert [tag["name"] for tag in document["tags"]] == list(GROUPS)
    assert all(" " in operation["summary"] for operation in operations)
    ids = [operation["operationId"] for operation in operations]
    assert len(set(ids)) == len(ids)


def test_every_json_body_has_an_example_that_fits_it(document: Json) -> None:
    told = set()
    for path, method, operation in walk(document):
        body = operation.get("requestBody", {}).get("content", {}).get("application/json")
        if body is None or (operation["operationId"].startswith("create_generation_") and "{" not in path and path != "/v1/generations"):
            continue  # a workflow's: its example stands in its schema
        told.add(f"{method.upper()} {path}")
        schema = {**body["schema"], "components": document["components"]}
        Draft202012Validator(schema).validate(body["example"])
    assert told == set(EXAMPLES)


def test_public_is_what_asks_for_no_key(document: Json) -> None:
    documented = {path for path, _, _ in walk(document)}
    assert test_scopes.PUBLIC & documented == PUBLIC


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("PUT", "/v1/generations", "GET, POST"),
        ("PATCH", "/v1/generations/x", "DELETE, GET"),
        ("OPTIONS", "/api/v2/assets/from-hash", "POST"),
        ("OPTIONS", "/api/v2/assets/some-id", "DELETE, GET"),
        ("PUT", "/v1/loras/x", "DELETE, GET, PATCH"),
        ("POST", "/v1/workflows/flux", "DELETE, GET, PUT"),
    ],
)
def test_a_path_has_the_methods_of_all_its_routes(app: FastAPI, method: str, path: str, allowed: str) -> None:
    """What the answer to a refused one says; tests/journeys/test_hostile_inputs.py asks over HTTP."""
    scope = {"type": "http", "method": method, "path": path, "root_path": "", "headers": []}
    assert ", ".join(list_methods(app.routes, scope)) == allowed
