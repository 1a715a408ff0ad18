"""Admins put workflows in place while everything runs: checked before, seen by every process, and never changing what was accepted."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
import redis

from local.services import S3Server
from tests.deployment import describe_deployment, make_gateway, running
from tests.journeys.api import Api, fetch, open_picture, wait_until

TRIVIAL = Path(__file__).parents[1] / "workflows" / "trivial"


class Pair(NamedTuple):
    """Two gateways on one Redis; the second places nothing."""

    first: Api
    second: Api


@pytest.fixture(scope="module")
def pair(redis_server: str, s3_server: S3Server, engine: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with redis.Redis.from_url(redis_server) as connection:
        connection.flushall()
    env = describe_deployment(redis_server, s3_server, engine)
    first = make_gateway(tmp_path_factory.mktemp("first"), env)
    second = make_gateway(tmp_path_factory.mktemp("second"), {**env, "DISPATCHER": "off"})
    with running(first, second):
        apis = Api(first.url), Api(second.url)
        with apis[0].http, apis[1].http:
            wait_until(lambda: apis[0].http.get("/v1/instances").json()["data"][0]["state"] == "up", "the instance")
            yield Pair(*apis)


def source(**changes: Any) -> dict[str, Any]:
    graph = json.loads((TRIVIAL / "graph.json").read_text())
    example = json.loads((TRIVIAL / "example.json").read_text())
    return {"graph": graph, "bindings": (TRIVIAL / "bindings.toml").read_text(), "example": example, **changes}


def put(api: Api, name: str, body: dict[str, Any]) -> httpx.Response:
    return api.http.put(f"/v1/workflows/{name}", json=body)


def names(api: Api) -> list[str]:
    return [workflow["name"] for workflow in api.http.get("/v1/workflows").json()["data"]]


def test_a_workflow_is_in_place_everywhere_and_its_versions_stay(pair: Pair) -> None:
    answer = put(pair.first, "my-colour", source())
    assert answer.status_code == 200, answer.text
    version = answer.json()["version"]
    job = pair.first.run(workflow="my-colour", color=0x0000FF)
    assert (job["workflow"], job["workflow_version"]) == ("my-colour", version)
    # In the next request, at the other process.
    made = pair.second.http.post("/v1/workflows/my-colour/generations", json={"color": 0xFF0000}, headers={"Prefer": "wait=60"}).json()
    assert open_picture(fetch(made["outputs"][0])).getpixel((0, 0)) == (255, 0, 0)

    # A new version: larger by default. What waits keeps the graph that it was accepted with.
    waiting = pair.first.create(workflow="slow", steps=20, delay_ms=20)
    queued = [pair.first.create(workflow="my-colour", color=color) for color in range(3)]
    changed = source(bindings=source()["bindings"].replace("default = 64", "default = 128"))
    newer = put(pair.first, "my-colour", changed).json()["version"]
    assert newer != version
    assert pair.first.wait(waiting["id"])["status"] == "succeeded"
    for one in queued:
        assert pair.first.wait(one["id"])["outputs"][0]["width"] == 64
    assert pair.first.run(workflow="my-colour")["outputs"][0]["width"] == 128
    versions = pair.first.http.get("/v1/workflows/my-colour/versions").json()["data"]
    assert versions == [{"version": version, "current": False}, {"version": newer, "current": True}]
    old = pair.second.http.get(f"/v1/workflows/my-colour/versions/{version}").json()
    assert (old["graph"], old["bindings"]) == (source()["graph"], source()["bindings"])

    assert pair.second.http.delete("/v1/workflows/my-colour").json() == {"name": "my-colour", "object": "workflow.deleted"}
    wait_until(lambda: "my-colour" not in names(pair.first), "the other process's forgetting it")
    gone = pair.first.http.post("/v1/generations", json={"workflow": "my-colour"})
    assert (gone.status_code, gone.json()["error"]["code"]) == (404, "workflow_not_found")


def test_a_folder_is_put_in_place_by_the_command_line(pair: Pair, tmp_path: Path) -> None:
    url, folder = str(pair.first.http.base_url), tmp_path / "mine"
    shutil.copytree(TRIVIAL, folder)
    command = [sys.executable, "-c", "from fluxgate.cli import main; main()", "--url", url, "put-workflow"]
    done = subprocess.run([*command, "by-hand", folder], capture_output=True, text=True, check=False)
    assert done.stdout.startswith("by-hand is in place, version "), done.stderr
    assert pair.second.run(workflow="by-hand", color=5)["status"] == "succeeded"
    (folder / "graph.json").write_text("[]")
    for name in ("by-hand", "nowhere"):
        failed = subprocess.run([*command, "by-hand", tmp_path / name], capture_output=True, text=True, check=False)
        assert (failed.returncode, failed.stderr.count("\n")) == (1, 1)
    broken = subprocess.run([*command, "by-hand", folder], capture_output=True, text=True, check=False)
    assert (broken.returncode, broken.stderr.splitlines()[0].startswith("error: ")) == (1, True)


def with_node(**changes: Any) -> dict[str, Any]:
    graph: dict[str, Any] = source()["graph"]
    graph["1"] |= changes
    return graph


def load(file: str) -> dict[str, Any]:
    """A node that reads a file, for a picture that is saved as well."""
    node = {"class_type": "LoadImage", "inputs": {"image": file}, "_meta": {"title": "Load"}}
    return {"2": node, "3": {"class_type": "SaveImage", "inputs": {"images": ["2", 0], "filename_prefix": "x"}}}


def bound(target: str, expression: str) -> dict[str, Any]:
    """The workflow with one binding more or another one, and a text that requests bring."""
    kept = [line for line in source()["bindings"].splitlines() if not line.startswith(f'"{target}"')]
    lines = [*kept, f'"{target}" = "{expression}"', '"Note.value" = "{{ text }}"', "[parameters.text]", 'type = "string"', 'default = "x"']
    note = {"class_type": "PreviewImage", "inputs": {"images": ["1", 0], "value": ""}, "_meta": {"title": "Note"}}
    return source(graph=source()["graph"] | load("x.png") | {"4": note}, bindings="\n".join(lines))


@pytest.mark.parametrize(
    ("name", "body", "status", "code", "said"),
    [
        ("flux", source(), 409, "workflow_shipped", "folder"),
        ("Not_A_Name", source(), 422, "invalid_parameter", "no name"),
        ("broken", source(bindings="title = "), 422, "broken_workflow", "bindings.toml"),
        ("broken", source(graph=with_node(class_type="NoSuchNode")), 422, "broken_workflow", "NoSuchNode"),
        ("broken", source(graph={"nodes": [], "links": []}), 422, "broken_workflow", "editor's own format"),
        ("broken", source(example={"size": 5}), 422, "broken_workflow", "size"),
        ("broken", source(bindings=source()["bindings"].replace("Canvas.color", "Canvas.colour")), 422, "broken_workflow", "colour"),
        ("broken", {"graph": {}}, 422, "invalid_parameter", "required"),
        ("raw", source(), 422, "invalid_parameter", "something else"),
        ("flux1-dev", source(), 422, "invalid_parameter", "something else"),
        (
            "broken",
            source(graph={"1": {"class_type": "EmptyImage", "inputs": {"width": float("nan")}}}),
            422,
            "invalid_parameter",
            "plain JSON",
        ),
        ("broken", source(example={"size": 64, "color": "\ud800"}), 422, "invalid_parameter", "plain JSON"),
        ("broken", source(graph=with_node(inputs={"width": {"__value__": [1]}})), 422, "broken_workflow", "an object is no value"),
        (
            "broken",
            source(graph={str(number): {"class_type": "EmptyImage", "inputs": {}} for number in range(1001)}),
            422,
            "broken_workflow",
            "1001",
        ),
        ("broken", source(graph=source()["graph"] | load("/etc/passwd")), 422, "broken_workflow", "no plain file name"),
        ("broken", source(graph=source()["graph"] | load("../x.png")), 422, "broken_workflow", "no plain file name"),
        ("broken", bound("Save.filename_prefix", "../../{{ job_id }}"), 422, "broken_workflow", "leads out"),
        ("broken", bound("Save.filename_prefix", "{{ text }}"), 422, "broken_workflow", "part of a path"),
        ("broken", bound("Load.image", "{{ text }}"), 422, "broken_workflow", "type image"),
        ("broken", bound("Canvas.width", "{{ 16 ** 2 }}"), 422, "broken_workflow", "a power"),
        ("broken", bound("Canvas.width", "{{ text.format(1) }}"), 422, "broken_workflow", "a call"),
        ("broken", bound("Canvas.width", "{{ ('x' * 1000000000) | length }}"), 422, "broken_workflow", "takes numbers"),
        ("broken", bound("Canvas.width", "{{ size" + "[0]" * 300 + " }}"), 422, "broken_workflow", "inside one another"),
        ("broken", bound("Canvas.width", "{{ " + "(" * 400 + "1" + ")" * 400 + " }}"), 422, "broken_workflow", "does not compile"),
        ("broken", bound("Canvas.width", "{{ 64 }}" + " " * 1000), 422, "broken_workflow", "at most 1000"),
        ("broken", source(bindings="a" + ".a" * 40_000 + " = 1"), 422, "broken_workflow", "dots"),
        ("broken", source(bindings="a = " + "[" * 90_000), 422, "broken_workflow", "bindings.toml"),
        ("broken", source(bindings="#" * 100_001), 422, "invalid_parameter", "100000"),
    ],
)
def test_what_would_not_run_is_not_put_in_place(pair: Pair, name: str, body: dict[str, Any], status: int, code: str, said: str) -> None:
    before = names(pair.first)
    answer = pair.first.http.put(f"/v1/workflows/{name}", content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code), answer.text
    assert said in answer.text
    assert names(pair.first) == before


def test_what_never_was_cannot_be_removed_or_read(pair: Pair) -> None:
    assert pair.first.http.delete("/v1/workflows/none").status_code == 404
    assert pair.first.http.get("/v1/workflows/none/versions/abc").status_code == 404
    assert pair.first.http.get("/v1/workflows/none/versions").json() == {"data": []}
