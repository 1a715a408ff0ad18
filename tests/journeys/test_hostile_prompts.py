"""Text that tries to be something else than text: it reaches the node as it was sent, and nothing else of the graph moves."""

from __future__ import annotations

import json
import secrets
from typing import Any

import pytest

from tests.journeys.api import Api, fetch, read_graph

QUICK: dict[str, Any] = {"width": 256, "height": 256, "steps": 1, "seed": 1}
PLAIN = "a red circle"

HOSTILE = {
    "quotes": """he said "red" and 'blue' and `green`""",
    "template": "{{7*7}} {{ config }} {{ seed }}",
    "template end": '"}} , {% raw %} {% endraw %} {# gone #}',
    "shell and format": "${x} $(id) %s %d {0} {prompt} %date:yyyy% %batch_num%",
    "JSON": '"}, "9": {"class_type": "LoadImage", "inputs": {"image": "/etc/passwd"}}, {"',
    "a JSON list": '["1", 0]',
    "a JSON number": "42",
    "backslashes": "C:\\new\\table \\u0041 \\\\ \\",
    "newlines": "first\nsecond\r\nthird\rfourth\n\nid: 1-1\nevent: status\ndata: {}\n\n",
    "other line ends": "a\u2028b\u2029c\u0085d\x0be\x0cf",
    "right to left": "دائرة حمراء \u202eelcric der\u202c עיגול אדום",
    "emoji": "🔴 on 🟦, 👩‍👩‍👧‍👦, 🏴󠁧󠁢󠁳󠁣󠁴󠁿, e\u0301 is not é",
    "control characters": "".join(map(chr, range(1, 32))) + "\x7f\x9f",
    "spaces around": "  \t a red circle \t  ",
    "zero width": "\ufeffa\u200bred\u200dcircle\u00ad",
    "noncharacters": "\uffff\ufffe\U0010ffff",
    "the longest": ("a red circle, été 🔴 " * 527)[:9999],
}


def strip_own(graph: dict[str, Any], job_id: str, prompt: str) -> dict[str, Any]:
    """The graph with the two things in it that may differ put aside: the job's id, and the prompt where it belongs."""
    assert [node["inputs"]["text"] for node in graph.values() if node["_meta"]["title"] == "Prompt"] == [prompt]
    own = {node_id: {**node, "inputs": dict(node["inputs"])} for node_id, node in graph.items()}
    for node in own.values():
        if node["_meta"]["title"] == "Prompt":
            node["inputs"]["text"] = None
        if node["_meta"]["title"] == "Save":
            assert node["inputs"].pop("filename_prefix") == f"{job_id}/image"
    return own


@pytest.fixture(scope="module")
def plain_graph(api: Api) -> dict[str, Any]:
    job = api.run(prompt=PLAIN, **QUICK)
    return strip_own(api.graph(job["id"]), job["id"], PLAIN)


@pytest.mark.parametrize("prompt", HOSTILE.values(), ids=HOSTILE.keys())
def test_it_reaches_the_node_unchanged_and_changes_nothing_else(api: Api, plain_graph: dict[str, Any], prompt: str) -> None:
    job = api.create(prompt=prompt, **QUICK)
    events = list(api.follow(job["id"]))
    assert events[-1].data["status"] == "succeeded", events[-1].data["error"]
    assert {event.data["parameters"]["prompt"] for event in events if event.kind == "status"} == {prompt}
    assert job["parameters"]["prompt"] == api.get(job["id"])["parameters"]["prompt"] == prompt
    assert strip_own(api.graph(job["id"]), job["id"], prompt) == plain_graph
    ran = read_graph(fetch(events[-1].data["outputs"][0]))
    assert strip_own(ran, job["id"], prompt) == plain_graph


def test_a_hostile_negative_prompt_stays_in_its_own_node(api: Api, plain_graph: dict[str, Any]) -> None:
    negative = HOSTILE["JSON"] + HOSTILE["template"]
    graph = api.graph(api.create(prompt=PLAIN, negative_prompt=negative, **QUICK)["id"])
    (node,) = [node for node in graph.values() if node["_meta"]["title"] == "Negative prompt"]
    assert node["inputs"]["text"] == negative
    assert graph.keys() == plain_graph.keys()


@pytest.mark.parametrize(
    "prompt",
    [
        pytest.param("a" * 100_000, id="100 kB"),
        pytest.param("a" * 10_001, id="one character too long"),
        pytest.param("", id="empty"),
        pytest.param("red\0circle", id="NUL"),
        pytest.param("red \ud83d circle", id="half of an emoji"),
        pytest.param("\udc00\ud800", id="surrogates the wrong way round"),
        pytest.param(["a red circle"], id="a list"),
        pytest.param({"text": "a red circle"}, id="an object"),
        pytest.param(["1", 0], id="a link"),
        pytest.param(7, id="a number"),
        pytest.param(None, id="null"),
    ],
)
@pytest.mark.parametrize("path", ["/v1/generations", "/v1/workflows/flux/generations"])
def test_what_cannot_travel_is_refused_by_name(api: Api, path: str, prompt: object) -> None:
    body = json.dumps({"prompt": prompt, **QUICK}).encode()
    answer = api.http.post(path, content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 422, answer.text
    error = answer.json()["error"]
    assert (error["code"], error["details"]["parameter"]) == ("invalid_parameter", "prompt")
    assert "10000" in error["details"]["allowed"].replace("_", "")
    assert len(answer.content) < 3000, "a refused prompt is not sent back whole"


def test_a_prompt_cannot_leave_the_place_of_its_pictures(api: Api) -> None:
    """Neither the id, which is ours, nor a prompt that looks like a path names another folder."""
    job = api.run(prompt=f"../../{secrets.token_hex(4)}/x", **QUICK)
    assert f"/generations/{job['id']}/0.png?" in job["outputs"][0]["url"]
