"""What a client may say beside the graph."""

import io
import json

import pytest
from PIL import Image

from tests.contract.conftest import StartEngine
from tests.contract.wire import Wire, empty_to_save, of_kind, output_names


async def read_text_chunks(wire: Wire, prompt_id: str) -> dict[str, str]:
    item = (await wire.history_of(prompt_id))["outputs"]["9"]["images"][0]
    with Image.open(io.BytesIO((await wire.get("/view", **item)).raw)) as picture:
        picture.load()
        return {str(key): str(value) for key, value in picture.info.items()}


async def test_the_client_chooses_the_prompt_id(wire: Wire, prefix: str) -> None:
    chosen = f"job-123/á b {prefix}"
    prompt_id, messages = await wire.run(empty_to_save(prefix), prompt_id=chosen)
    assert prompt_id == chosen
    assert {start["prompt_id"] for start in of_kind(messages, "execution_start")} == {chosen}
    assert (await wire.history_of(chosen))["prompt"][1] == chosen


@pytest.mark.parametrize(("given", "kept"), [(42, "42"), (None, "None")])
async def test_a_prompt_id_becomes_text(wire: Wire, prefix: str, given: object, kept: str) -> None:
    assert await wire.submit(empty_to_save(prefix), prompt_id=given) == kept


async def test_a_prompt_id_is_made_up_when_none_is_given(wire: Wire, prefix: str) -> None:
    assert len({await wire.submit(empty_to_save(prefix)) for _ in range(2)}) == 2


async def test_a_repeated_prompt_id_runs_again_and_overwrites_its_history(wire: Wire, prefix: str) -> None:
    chosen = f"again-{prefix}"
    await wire.run(empty_to_save(prefix), prompt_id=chosen)
    await wire.run(empty_to_save(prefix), prompt_id=chosen)
    assert output_names(await wire.history_of(chosen)) == ["image_00002_.png"]
    assert list((await wire.get("/history")).body).count(chosen) == 1


async def test_only_the_chosen_outputs_run(wire: Wire, prefix: str) -> None:
    graph = empty_to_save(prefix)
    graph["10"] = {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": f"{prefix}-b"}}
    prompt_id, messages = await wire.run(graph, partial_execution_targets=["10"])
    entry = await wire.history_of(prompt_id)
    assert (list(entry["outputs"]), entry["prompt"][4]) == (["10"], ["10"])
    assert "9" not in {message["node"] for message in of_kind(messages, "executing")}


async def test_no_chosen_output_is_no_prompt(wire: Wire, prefix: str) -> None:
    answer = await wire.post("/prompt", {"prompt": empty_to_save(prefix), "partial_execution_targets": []})
    assert (answer.status, answer.body["error"]["type"]) == (400, "prompt_no_outputs")


async def test_the_graph_and_extra_pnginfo_stand_in_the_png(wire: Wire, prefix: str) -> None:
    graph = empty_to_save(prefix)
    prompt_id, _ = await wire.run(graph, extra_data={"extra_pnginfo": {"workflow": {"hello": 1}, "gateway": {"job": "j1"}}})
    chunks = await read_text_chunks(wire, prompt_id)
    assert {name: json.loads(text) for name, text in chunks.items()} == {
        "prompt": graph,
        "workflow": {"hello": 1},
        "gateway": {"job": "j1"},
    }


async def test_the_engine_keeps_the_graph_out_of_the_png_when_told(start_engine: StartEngine, wire: Wire, prefix: str) -> None:
    client = Wire(wire.http, start_engine("--disable-metadata").url)
    prompt_id, _ = await client.run(empty_to_save(prefix), extra_data={"extra_pnginfo": {"workflow": 1}})
    assert await read_text_chunks(client, prompt_id) == {}


@pytest.mark.parametrize("path", ["/prompt", "/queue", "/history", "/system_stats", "/models", "/features", "/object_info/EmptyImage"])
async def test_every_route_exists_under_api_too(wire: Wire, path: str) -> None:
    plain, twin = await wire.get(path), await wire.get("/api" + path)
    assert (twin.status, type(twin.body)) == (200, type(plain.body))


async def test_the_socket_exists_under_api_too(wire: Wire) -> None:
    async with wire.http.ws_connect(wire.base_url + "/api/ws") as socket:
        assert (await socket.receive_json())["type"] == "status"
