"""Graphs of callers' own: everything hostile that one can hold, and what is made of honest ones."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from comfy_workflows.errors import EditorGraph, InvalidGraph, MissingAsset
from comfy_workflows.raw import MAX_NODES, AssetUse, prepare_raw, read_rules

JOB = "gen_0123"
GRAPH: dict[str, Any] = {
    "1": {"class_type": "LoadImage", "inputs": {"image": "photo.png"}, "_meta": {"title": "Photo"}},
    "2": {"class_type": "ImageInvert", "inputs": {"image": ["1", 0]}},
    "3": {"class_type": "SaveImage", "inputs": {"images": ["2", 0], "filename_prefix": "ComfyUI"}},
}


def put(node: str, name: str, value: Any) -> dict[str, Any]:
    graph = copy.deepcopy(GRAPH)
    graph[node]["inputs"][name] = value
    return graph


def change(node: str, **fields: Any) -> dict[str, Any]:
    graph = copy.deepcopy(GRAPH)
    graph[node] |= fields
    return graph


def refer(asset: Any) -> dict[str, Any]:
    return {"__type": "core/ASSET", "info": asset}


def nest(levels: int) -> Any:
    value: Any = "x"
    for _ in range(levels):
        value = [value]
    return value


PATHS = [
    "../secret.png", "../../etc/passwd", "/etc/passwd", "a/../../b.png", "..\\..\\windows\\win.ini", "C:\\Windows\\win.ini", "C:/x.png",
    "~/x.png", "//host/share/x.png", "\\\\host\\share\\x.png", "file:///etc/passwd", "gen_00/image_00001_.png [output]", "x.png [temp]",
    "x.png [input]", "sub/x.png", ".", "..", "", "x\0.png", "x.png\n", " /etc/passwd", "\ud800.png",
]  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
def test_a_file_input_takes_no_path(path: str) -> None:
    with pytest.raises(InvalidGraph) as caught:
        prepare_raw(put("1", "image", path), read_rules(), job_id=JOB)
    assert caught.value.details["node_errors"]["1"][0]["field"] == "image"


@pytest.mark.parametrize("prefix", [path for path in PATHS if path not in ("", ".", "sub/x.png")])
def test_a_prefix_takes_no_path_out(prefix: str) -> None:
    with pytest.raises(InvalidGraph):
        prepare_raw(put("3", "filename_prefix", prefix), read_rules(), job_id=JOB)


@pytest.mark.parametrize("path", ["/srv/models/x.safetensors", "../x.safetensors", "loras/../../x", "x [output]", "C:\\x"])
def test_no_other_text_is_a_path_either(path: str) -> None:
    graph = {**GRAPH, "7": {"class_type": "UNETLoader", "inputs": {"unet_name": path, "weight_dtype": "default"}}}
    with pytest.raises(InvalidGraph, match="leads out"):
        prepare_raw(graph, read_rules(), job_id=JOB)


HOSTILE: dict[str, Any] = {
    "nothing": None,
    "a list": [],
    "empty": {},
    "a text": "graph",
    "a node that is none": {"1": 3},
    "no inputs": {"1": {"class_type": "SaveImage"}},
    "inputs as a list": {"1": {"class_type": "SaveImage", "inputs": []}},
    "a class that is no text": {"1": {"class_type": ["SaveImage"], "inputs": {}}},
    "the body of POST /prompt": {"prompt": GRAPH},
    "too many nodes": {str(number): GRAPH["1"] for number in range(MAX_NODES + 1)},
    "an id with a path": {"../1": GRAPH["1"]},
    "an id that is long": {"1" * 65: GRAPH["1"]},
    "an input's name with a line": put("1", "image\n", "x.png"),
    "an input's name with a surrogate": put("1", "\ud800", "x.png"),
    "an unknown class": change("2", class_type="ImageInvertt"),
    "a class of the system": change("2", class_type="__import__"),
    "a class that is huge": change("2", class_type="x" * 100_000),
    "a node that writes models": change("3", class_type="CheckpointSave"),
    "a node that reads folders": change("1", class_type="LoadImageSetFromFolderNode"),
    "a node that reads others' outputs": change("1", class_type="LoadImageOutput"),
    "a node that reads latents": change("1", class_type="LoadLatent"),
    "a node that runs patterns": change("2", class_type="RegexReplace"),
    "a paid node": change("2", class_type="GeminiNode"),
    "a class of a surrogate": change("2", class_type="\udfff"),
    "a link to nowhere": put("2", "image", ["99", 0]),
    "a link to itself": put("2", "image", ["2", 0]),
    "a cycle": put("1", "image2", ["3", 0]),
    "a link of one": put("2", "image", ["1"]),
    "a link of three": put("2", "image", ["1", 0, 0]),
    "a negative slot": put("2", "image", ["1", -1]),
    "a slot that is no number": put("2", "image", ["1", True]),
    "a link to a list": put("2", "image", [["1"], 0]),
    "a deep list": put("2", "image", nest(50)),
    "a wrapped path": put("1", "image", {"__value__": "/etc/passwd"}),
    "a wrapped list": put("1", "image", {"__value__": ["1", 0]}),
    "an object": put("2", "image", {"a": 1}),
    "a file by a link": put("1", "image", ["2", 0]),
    "a prefix by a link": put("3", "filename_prefix", ["1", 0]),
    "a prefix that is a number": put("3", "filename_prefix", 7),
    "a file that is a number": put("1", "image", 7),
    "a file that is null": put("1", "image", None),
    "not a number": put("3", "quality", float("nan")),
    "infinity": put("3", "quality", float("inf")),
    "an endless number": put("3", "quality", 10**400),
    "an asset where none goes": put("3", "filename_prefix", refer({"id": "x"})),
    "another kind of reference": put("1", "image", {"__type": "core/FOLDER", "info": {"id": "x"}}),
}


@pytest.mark.parametrize("graph", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_graph_is_refused(graph: Any) -> None:
    with pytest.raises(InvalidGraph) as caught:
        prepare_raw(graph, read_rules(), job_id=JOB)
    said = json.dumps({"message": caught.value.message, "details": caught.value.details}, ensure_ascii=False)
    assert len(said.encode()) < 10_000


@pytest.mark.parametrize("info", [None, [], {}, {"id": 7}, {"id": None}, {"hash": "blake3:00"}, {"id": "\ud800"}])
def test_a_reference_without_an_id_is_a_missing_asset(info: Any) -> None:
    with pytest.raises(MissingAsset):
        prepare_raw(put("1", "image", refer(info)), read_rules(), job_id=JOB)


def test_the_editors_own_format_is_named() -> None:
    with pytest.raises(EditorGraph):
        prepare_raw({"nodes": [], "links": [], "last_node_id": 3}, read_rules(), job_id=JOB)


def test_an_honest_graph_is_run_with_what_comfyui_needs_and_no_more() -> None:
    graph = change("2", is_changed=[1], _meta={"title": "\nNegative", "more": nest(60)}, override_display_id="9")
    graph["4"] = {"class_type": "CLIPTextEncode", "inputs": {"text": "/a ../picture of C:\\ and {embedding} [output]", "clip": ["5", 1]}}
    graph["5"] = {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "flux/dev.safetensors"}}
    prepared, assets = prepare_raw(graph, read_rules(), job_id=JOB)
    assert prepared["2"] == {"class_type": "ImageInvert", "inputs": {"image": ["1", 0]}}
    assert prepared["1"]["_meta"] == {"title": "Photo"}
    assert prepared["3"]["inputs"]["filename_prefix"] == f"{JOB}/ComfyUI"
    assert prepared["4"]["inputs"] == graph["4"]["inputs"]
    assert assets == [AssetUse("1", "image", name="photo.png")]
    assert graph["3"]["inputs"]["filename_prefix"] == "ComfyUI", "the caller's graph is left as it was"


def test_a_reference_is_found_by_its_id() -> None:
    _, assets = prepare_raw(put("1", "image", refer({"id": "abc", "file_path": "../../etc/passwd"})), read_rules(), job_id=JOB)
    assert assets == [AssetUse("1", "image", asset_id="abc")]


def test_further_classes_are_held_to_the_same_texts() -> None:
    rules = read_rules().with_classes("MyNode")
    assert prepare_raw(change("2", class_type="MyNode", inputs={"image": ["1", 0], "mode": "a/b"}), rules, job_id=JOB)
    with pytest.raises(InvalidGraph):
        prepare_raw(change("2", class_type="MyNode", inputs={"path": "/etc/passwd"}), rules, job_id=JOB)
