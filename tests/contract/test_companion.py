"""The companion extension inside a real ComfyUI: needs COMFYUI_URL, with docker/comfyui/custom_nodes/fluxgate in its custom_nodes.
The test of load times also needs any file in that ComfyUI's models/vae."""

import io
import json
import os
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from PIL import Image

from tests.contract.wire import Answer, Graph, Wire, empty_to_save, kinds, of_kind, output_names, probe_to_save


@pytest.fixture
async def companion() -> AsyncIterator[Wire]:
    """A client of a ComfyUI that has the extension."""
    if "COMFYUI_URL" not in os.environ:
        pytest.skip("COMFYUI_URL names no ComfyUI, and the engine has no companion extension")
    async with aiohttp.ClientSession() as http:
        wire = Wire(http, os.environ["COMFYUI_URL"].rstrip("/"))
        if (await wire.get("/fluxgate/status")).status != 200:
            pytest.skip("the ComfyUI lacks the extension: copy docker/comfyui/custom_nodes/fluxgate into its custom_nodes folder")
        yield wire


def save_by_companion(graph: Graph, picture_format: str = "png") -> Graph:
    """The same graph with the extension's save node (9) in SaveImage's place."""
    inputs = {**graph["9"]["inputs"], "format": picture_format, "quality": 90, "compress_level": 4}
    return {**graph, "9": {"class_type": "FluxgateSaveImage", "inputs": inputs}}


async def view(wire: Wire, item: dict[str, str]) -> Answer:
    return await wire.get("/fluxgate/view", **item)


async def delete(wire: Wire, files: list[dict[str, str]], **more: Any) -> Answer:
    async with wire.http.delete(wire.base_url + "/fluxgate/outputs", json={"files": files, **more}) as response:
        return Answer(response.status, response.content_type, await response.read())


async def images_of(wire: Wire, prompt_id: str) -> list[dict[str, str]]:
    images: list[dict[str, str]] = (await wire.history_of(prompt_id))["outputs"]["9"]["images"]
    return images


async def test_every_part_fits_this_comfyui(companion: Wire) -> None:
    status = (await companion.get("/fluxgate/status")).body
    assert set(status["features"].values()) == {True}
    assert status["frozen_objects"] > 100_000
    assert status["gc"]["watching"] is True
    assert status["vram"]["total_bytes"] >= status["vram"]["free_bytes"] > 0
    assert (await companion.get("/api/fluxgate/status")).status == 200


async def test_the_node_is_in_the_catalogue(companion: Wire) -> None:
    told = (await companion.get("/object_info/FluxgateSaveImage")).body["FluxgateSaveImage"]
    assert (told["display_name"], told["output_node"]) == ("Save Image (Fluxgate)", True)
    assert told["input_order"]["required"] == ["images", "filename_prefix", "format", "quality", "compress_level"]


async def test_its_picture_is_save_images_picture(companion: Wire, prefix: str) -> None:
    extra = {"extra_pnginfo": {"workflow": {"hello": 1}}}
    graph = empty_to_save(prefix, batch_size=2)
    theirs, _ = await companion.run(graph, extra_data=extra)
    ours, messages = await companion.run(save_by_companion(graph), extra_data=extra)
    expected, found = await images_of(companion, theirs), await images_of(companion, ours)
    assert [item["filename"] for item in found] == ["image_00003_.png", "image_00004_.png"]
    assert [(item["subfolder"], item["type"]) for item in found] == [(item["subfolder"], item["type"]) for item in expected]
    assert of_kind(messages, "executed")[-1]["output"] == {"images": found}
    for mine, model in zip(found, expected, strict=True):
        answers = [await view(companion, item) for item in (mine, model)]
        assert [(answer.status, answer.content_type) for answer in answers] == [(200, "image/png")] * 2
        pictures = [Image.open(io.BytesIO(answer.raw)) for answer in answers]
        assert pictures[0].tobytes() == pictures[1].tobytes()
        assert pictures[0].info.keys() == pictures[1].info.keys()
        assert json.loads(pictures[0].info["prompt"])["9"]["class_type"] == "FluxgateSaveImage"


@pytest.mark.parametrize(("picture_format", "extension"), [("webp", "webp"), ("jpeg", "jpg")])
async def test_other_formats(companion: Wire, prefix: str, picture_format: str, extension: str) -> None:
    prompt_id, _ = await companion.run(save_by_companion(empty_to_save(prefix), picture_format))
    assert output_names(await companion.history_of(prompt_id)) == [f"image_00001_.{extension}"]
    answer = await view(companion, (await images_of(companion, prompt_id))[0])
    assert answer.content_type == f"image/{picture_format}"
    with Image.open(io.BytesIO(answer.raw)) as image:
        assert (image.format, image.size) == (picture_format.upper(), (64, 64))


async def test_pictures_in_flight_never_share_a_name(companion: Wire, prefix: str) -> None:
    listener = await companion.listen()
    big = {"width": 1024, "height": 1024}
    graphs = [save_by_companion(empty_to_save(prefix, **big)), empty_to_save(prefix), save_by_companion(empty_to_save(prefix, **big))]
    prompt_ids = [await companion.submit(graph) for graph in graphs]
    for prompt_id in prompt_ids:
        if not any(message.is_end and message.data["prompt_id"] == prompt_id for message in listener.messages):
            await listener.until_end(prompt_id)
    items = [(await images_of(companion, prompt_id))[0] for prompt_id in prompt_ids]
    assert [item["filename"] for item in items] == ["image_00001_.png", "image_00002_.png", "image_00003_.png"]
    sizes = [Image.open(io.BytesIO((await view(companion, item)).raw)).size for item in items]
    assert sizes == [(1024, 1024), (64, 64), (1024, 1024)]


async def test_a_prefix_outside_the_output_folder_is_refused_as_by_save_image(companion: Wire, prefix: str) -> None:
    graph = empty_to_save(f"../{prefix}")
    _, theirs = await companion.run(graph)
    _, ours = await companion.run(save_by_companion(graph))
    errors = [of_kind(messages, "execution_error")[0] for messages in (theirs, ours)]
    assert errors[0]["exception_message"] == errors[1]["exception_message"]
    assert errors[1]["node_type"] == "FluxgateSaveImage"


async def test_files_are_removed(companion: Wire, prefix: str) -> None:
    prompt_id, _ = await companion.run(save_by_companion(empty_to_save(prefix, batch_size=2)))
    items = await images_of(companion, prompt_id)
    assert (await delete(companion, [*items, {"filename": "x", "subfolder": "../..", "type": "output"}])).status == 400
    assert (await view(companion, items[0])).status == 200
    assert (await delete(companion, items, remove_empty_folders=True)).body == {"removed": 2, "absent": 0}
    assert (await delete(companion, items)).body == {"removed": 0, "absent": 2}
    assert [(await view(companion, item)).status for item in items] == [404, 404]
    assert (await companion.get("/view", **items[0])).status == 404


async def test_a_prompt_is_timed_by_node(companion: Wire, prefix: str) -> None:
    if not (await companion.get("/object_info/ProbeSteps")).body:
        pytest.skip("the server lacks ProbeSteps: copy tests/contract/comfyui_probe_node.py into its custom_nodes folder")
    prompt_id, _ = await companion.run(probe_to_save(prefix, steps=10, delay_s=0.02))
    told = (await companion.get(f"/fluxgate/prompts/{prompt_id}")).body
    assert (told["prompt_id"], told["done"], told["load_ms"]) == (prompt_id, True, 0)
    assert [(node["id"], node["class"]) for node in told["nodes"]] == [("1", "EmptyImage"), ("5", "ProbeSteps"), ("9", "SaveImage")]
    assert told["nodes"][1]["ms"] >= 200  # ten sleeps of 20 ms: a lower bound that no slow machine breaks
    assert told["execution_ms"] >= sum(node["ms"] for node in told["nodes"])
    assert (await companion.get("/fluxgate/prompts/unknown")).status == 404


async def test_a_failed_prompt_is_timed_too(companion: Wire, prefix: str) -> None:
    prompt_id, messages = await companion.run(empty_to_save(f"../{prefix}"))
    assert "execution_error" in kinds(messages)
    told = (await companion.get(f"/fluxgate/prompts/{prompt_id}")).body
    assert (told["done"], [node["class"] for node in told["nodes"]]) == (True, ["EmptyImage", "SaveImage"])


async def test_loading_is_told_from_execution(companion: Wire, prefix: str) -> None:
    names = [name for name in (await companion.get("/models/vae")).body if not name.startswith("pixel_space")]
    if not names:
        pytest.skip("the ComfyUI has no file in models/vae")
    await companion.post("/free", {"unload_models": True, "free_memory": True})
    await companion.run(empty_to_save(prefix))  # the flags are taken before or right after it, never later
    graph: Graph = {
        "1": {"class_type": "VAELoader", "inputs": {"vae_name": names[0]}},
        "2": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
        "3": {"class_type": "VAEDecode", "inputs": {"samples": ["2", 0], "vae": ["1", 0]}},
        "9": {"class_type": "SaveImage", "inputs": {"images": ["3", 0], "filename_prefix": prefix}},
    }
    prompt_id, _ = await companion.run(graph)
    told = (await companion.get(f"/fluxgate/prompts/{prompt_id}")).body
    nodes = {node["class"]: node for node in told["nodes"]}
    assert nodes["VAELoader"]["load_ms"] > 0
    assert 0 < nodes["VAEDecode"]["load_ms"] < nodes["VAEDecode"]["ms"]
    assert nodes["SaveImage"]["load_ms"] == 0
    assert told["load_ms"] == pytest.approx(sum(node["load_ms"] for node in told["nodes"]), abs=0.01)
    [model] = (await companion.get("/fluxgate/status")).body["loaded_models"]
    assert model["loaded_bytes"] > 0
    assert model["class"]
