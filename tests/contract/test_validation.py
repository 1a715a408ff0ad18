"""What POST /prompt refuses, and how: the recorded answers of a real ComfyUI, row by row."""

import io
import json
from pathlib import Path
from typing import Any

import pytest

from tests.contract.wire import Wire, empty_to_save, kinds, output_names

RECORDED: dict[str, dict[str, Any]] = json.loads((Path(__file__).parents[1] / "data" / "comfyui" / "validation.json").read_text())
# These differ from server to server and say nothing about the wire.
LOCAL_DETAILS = ("traceback", "tooltip", "prompt_id", "number")


def drop_local_details(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: drop_local_details(item) for key, item in value.items() if key not in LOCAL_DETAILS}
    return [drop_local_details(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize("row", RECORDED)
async def test_the_answer_is_the_recorded_one(wire: Wire, row: str) -> None:
    recorded = RECORDED[row]
    graph = recorded["sent"]
    if isinstance(graph, dict):
        known = (await wire.get("/object_info")).body
        missing = {node["class_type"] for node in graph.values() if "class_type" in node} - known.keys() - {"NoSuchNode"}
        if missing:
            pytest.skip(f"the server lacks the nodes {', '.join(sorted(missing))}")
    answer = await wire.post("/prompt", {"prompt": graph})
    assert answer.status == recorded["status"]
    if isinstance(recorded["body"], str):
        assert (answer.content_type, answer.raw.decode()) == ("text/plain", recorded["body"])
    else:
        assert drop_local_details(answer.body) == recorded["body"]


async def test_a_link_of_another_type_is_refused(wire: Wire, prefix: str) -> None:
    graph = empty_to_save(prefix)
    graph["1"] = {"class_type": "LoadImage", "inputs": {"image": "any.png"}}
    graph["9"]["inputs"]["images"] = ["1", 1]
    answer = await wire.post("/prompt", {"prompt": graph})
    error = answer.body["node_errors"]["9"]["errors"][0]
    assert answer.status == 400
    assert error["type"] == "return_type_mismatch"
    assert (error["extra_info"]["received_type"], error["extra_info"]["linked_node"]) == ("MASK", ["1", 1])


async def test_a_choice_that_does_not_exist_is_refused_with_the_choices(wire: Wire, prefix: str) -> None:
    graph = empty_to_save(prefix)
    graph["2"] = {"class_type": "ImageScaleBy", "inputs": {"image": ["1", 0], "upscale_method": "magic", "scale_by": 2}}
    graph["9"]["inputs"]["images"] = ["2", 0]
    answer = await wire.post("/prompt", {"prompt": graph})
    error = answer.body["node_errors"]["2"]["errors"][0]
    assert (error["type"], error["message"]) == ("value_not_in_list", "Value not in list")
    assert error["details"].startswith("upscale_method: 'magic' not in ['nearest-exact', 'bilinear',")
    assert error["extra_info"]["received_value"] == "magic"
    assert "magic" not in error["extra_info"]["input_config"][0]


async def test_a_broken_branch_is_dropped_and_the_rest_runs(wire: Wire, prefix: str) -> None:
    graph = empty_to_save(prefix)
    graph["8"] = {"class_type": "SaveImage", "inputs": {"images": ["1", 0]}}
    listener = await wire.listen()
    answer = await wire.post("/prompt", {"prompt": graph, "client_id": wire.client_id})
    assert answer.status == 200
    assert answer.body["node_errors"]["8"]["errors"][0]["type"] == "required_input_missing"
    assert answer.body["node_errors"]["8"]["dependent_outputs"] == ["8"]
    await listener.until_end(answer.body["prompt_id"])
    entry = await wire.history_of(answer.body["prompt_id"])
    assert list(entry["outputs"]) == ["9"]
    assert entry["prompt"][4] == ["9"]


async def test_every_faulty_node_is_listed_with_its_outputs(wire: Wire, prefix: str) -> None:
    graph = empty_to_save(prefix, width=0, color=None)
    graph["8"] = {"class_type": "SaveImage", "inputs": {"images": ["1", 0]}}
    answer = await wire.post("/prompt", {"prompt": graph})
    assert answer.status == 400
    errors = answer.body["node_errors"]
    assert sorted(error["type"] for error in errors["1"]["errors"]) == ["invalid_input_type", "value_smaller_than_min"]
    assert sorted(errors["1"]["dependent_outputs"]) == ["8", "9"]
    assert errors["8"]["class_type"] == "SaveImage"


async def test_constants_are_converted_to_their_declared_type(wire: Wire, prefix: str) -> None:
    prompt_id, messages = await wire.run(empty_to_save(prefix, width="80", height=48.9))
    inputs = (await wire.history_of(prompt_id))["prompt"][2]["1"]["inputs"]
    assert (inputs["width"], inputs["height"]) == (80, 48)
    assert "execution_success" in kinds(messages)


@pytest.mark.parametrize(
    ("body", "status", "error"),
    [
        pytest.param(b'{"client_id": "a"}', 400, "no_prompt", id="no prompt"),
        pytest.param(b"[1, 2]", 400, "no_prompt", id="an array"),
        pytest.param(b'{"prompt": {}}', 400, "prompt_no_outputs", id="an empty graph"),
        pytest.param(b"{not json", 500, None, id="no JSON"),
        pytest.param(b'{"prompt": 7}', 500, None, id="a number for a graph"),
        pytest.param(b'{"prompt": {}, "number": "abc"}', 500, None, id="a word for a number"),
    ],
)
async def test_bodies_that_are_no_prompt(wire: Wire, body: bytes, status: int, error: str | None) -> None:
    answer = await wire.post("/prompt", data=body)
    assert answer.status == status
    if error is None:
        assert (answer.content_type, answer.raw.decode()) == ("text/plain", "500 Internal Server Error\n\nServer got itself in trouble")
    else:
        assert answer.body["error"]["type"] == error
        assert answer.body["node_errors"] == {}


async def test_the_content_type_of_a_prompt_is_ignored(wire: Wire, prefix: str) -> None:
    body = json.dumps({"prompt": empty_to_save(prefix)}).encode()
    answer = await wire.post("/prompt", data=body, headers={"Content-Type": "text/plain"})
    assert answer.status == 200
    assert output_names(await wire.wait_for_history(answer.body["prompt_id"])) == ["image_00001_.png"]


async def test_a_body_above_the_limit_is_refused(wire: Wire) -> None:
    limit = (await wire.get("/features")).body["max_upload_size"]
    answer = await wire.post("/prompt", data=io.BytesIO(bytes(limit + 1)))
    assert (answer.status, answer.content_type) == (413, "text/plain")


@pytest.mark.parametrize("path", ["/prompt", "/api/prompt"])
async def test_a_page_of_another_site_is_refused(wire: Wire, path: str) -> None:
    assert (await wire.post(path, {}, headers={"Origin": "http://evil.example"})).status == 403
    assert (await wire.post(path, {}, headers={"Origin": wire.base_url})).status == 400
