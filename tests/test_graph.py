"""Graphs: property tests of the LoRA chain and of pruning, titles, and the check against a recorded node catalogue."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comfy_workflows.errors import BrokenWorkflow
from comfy_workflows.graph import (
    LORA_LOADERS,
    Graph,
    chain_loras,
    check,
    find_by_title,
    find_sinks,
    is_link,
    iterate_links,
    loader_files,
    prune,
)

OBJECT_INFO: dict[str, Any] = json.loads((Path(__file__).parent / "data" / "object_info.json").read_text())

node_ids = st.one_of(st.integers(1, 999).map(str), st.text("abc:-", min_size=1, max_size=4))
files = st.text("abcdefgh/", min_size=1, max_size=8)
lora_lists = st.lists(st.tuples(files, st.floats(-4, 4)), max_size=8)


@st.composite
def graphs_with_lora(draw: st.DrawFn) -> tuple[Graph, str]:
    """A loader, a LoRA node on it, and any number of consumers that read any outputs of either; in any order, with any ids."""
    class_type = draw(st.sampled_from(sorted(LORA_LOADERS)))
    passed = LORA_LOADERS[class_type]
    loader, lora, *users = draw(st.lists(node_ids, min_size=3, max_size=8, unique=True))
    links = st.one_of(
        st.sampled_from([[lora, slot] for slot in range(len(passed))]),
        st.sampled_from([[loader, slot] for slot in range(2)]),
        st.integers(),
    )
    lora_inputs = {name: [loader, slot] for slot, name in enumerate(passed)}
    graph: Graph = {
        loader: {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "x.safetensors"}},
        lora: {"class_type": class_type, "inputs": {"lora_name": "old", **lora_inputs}, "_meta": {"title": "LoRA"}},
    }
    for user in users:
        graph[user] = {"class_type": "Consumer", "inputs": draw(st.dictionaries(st.sampled_from("pqr"), links, max_size=3))}
    return dict(draw(st.permutations(list(graph.items())))), lora


def follow_chain(graph: Graph, link: list[Any], slot_name: str) -> list[tuple[str, float]]:
    """The (file, weight) met from a consumer's link back to the loader, first applied first."""
    met = []
    while graph[link[0]]["class_type"] in LORA_LOADERS:
        inputs = graph[link[0]]["inputs"]
        met.append((inputs["lora_name"], inputs[f"strength_{slot_name}"]))
        link = inputs[slot_name]
    return met[::-1]


@given(graphs_with_lora(), lora_lists)
def test_chain_applies_every_lora_in_list_order_for_every_consumer(case: tuple[Graph, str], loras: list[tuple[str, float]]) -> None:
    graph, lora = case
    chained = chain_loras(graph, lora, loras)
    passed = LORA_LOADERS[graph[lora]["class_type"]]
    for user, name, link in iterate_links(graph):
        if user == lora:
            continue
        now = chained[user]["inputs"][name]
        if link[0] == lora:
            assert follow_chain(chained, now, passed[link[1]]) == loras
            while chained[now[0]]["class_type"] in LORA_LOADERS:
                now = chained[now[0]]["inputs"][passed[now[1]]]
            assert now == graph[lora]["inputs"][passed[link[1]]]
        else:
            assert now == link


@given(graphs_with_lora(), lora_lists)
def test_chain_leaves_no_dangling_link_and_changes_nothing_else(case: tuple[Graph, str], loras: list[tuple[str, float]]) -> None:
    graph, lora = case
    before = copy.deepcopy(graph)
    chained = chain_loras(graph, lora, loras)
    assert graph == before
    assert all(link[0] in chained for _, _, link in iterate_links(chained))
    assert sum(node["class_type"] in LORA_LOADERS for node in chained.values()) == len(loras)
    for node_id in graph.keys() - {lora}:
        literals = {name: value for name, value in graph[node_id]["inputs"].items() if not is_link(value)}
        assert literals.items() <= chained[node_id]["inputs"].items()
        assert chained[node_id]["inputs"].keys() == graph[node_id]["inputs"].keys()
    titles = [node["_meta"]["title"] for node in chained.values() if "_meta" in node]
    assert len(set(titles)) == len(loras)


@given(graphs_with_lora(), lora_lists, st.data())
def test_prune_keeps_exactly_what_the_outputs_need(case: tuple[Graph, str], loras: list[tuple[str, float]], data: st.DataObject) -> None:
    graph = chain_loras(*case, loras)
    outputs = data.draw(st.sets(st.sampled_from(sorted(graph))))
    before = copy.deepcopy(graph)
    pruned = prune(graph, output_ids=outputs)
    assert graph == before
    assert outputs <= pruned.keys()
    assert all(pruned[node_id] == graph[node_id] for node_id in pruned)
    assert all(link[0] in pruned for _, _, link in iterate_links(pruned))
    read = {link[0] for _, _, link in iterate_links(pruned)}
    assert pruned.keys() == outputs | read


def test_prune_finds_outputs_by_class_and_keeps_the_order() -> None:
    graph = make_graph() | {"77": {"class_type": "VAELoader", "inputs": {"vae_name": "ae.safetensors"}}}
    assert list(prune(graph, output_classes=["SaveImage"])) == ["1", "9"]
    assert find_sinks(graph) == ["9", "77"]


def test_results_share_nothing_with_the_argument() -> None:
    graph = make_graph()
    prune(graph, output_ids=["9"])["9"]["inputs"]["images"][1] = 5
    assert graph == make_graph()


@pytest.mark.parametrize(
    ("class_type", "inputs", "users_slot", "message"),
    [
        ("CLIPLoader", {}, 0, "loads no LoRA"),
        ("LoraLoaderModelOnly", {"lora_name": "x"}, 0, "connect its model"),
        ("LoraLoader", {"model": ["1", 0]}, 0, "connect its clip"),
        ("LoraLoaderModelOnly", {"model": ["1", 0]}, 1, "gives only model"),
    ],
)
def test_a_lora_node_that_cannot_be_chained_is_named(class_type: str, inputs: dict[str, Any], users_slot: int, message: str) -> None:
    graph: Graph = {
        "1": {"class_type": "UNETLoader", "inputs": {}},
        "2": {"class_type": class_type, "inputs": inputs},
        "3": {"class_type": "KSampler", "inputs": {"model": ["2", users_slot]}},
    }
    with pytest.raises(BrokenWorkflow, match=rf"node 2 \({class_type}\).*{message}"):
        chain_loras(graph, "2", [("a", 1.0)])


def make_graph() -> Graph:
    return {
        "1": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": 0}, "_meta": {"title": "Canvas"}},
        "9": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "x"}, "_meta": {"title": "Save"}},
    }


def test_titles_are_found_and_vanished_or_ambiguous_ones_are_named() -> None:
    graph = make_graph()
    assert find_by_title(graph, "Save") == "9"
    with pytest.raises(BrokenWorkflow, match=r"no node has the title 'Sav'; the nearest is 'Save'"):
        find_by_title(graph, "Sav")
    with pytest.raises(BrokenWorkflow, match=r"the titles are: 'Canvas', 'Save'"):
        find_by_title(graph, "xyz")
    graph["9"]["_meta"]["title"] = "Canvas"
    with pytest.raises(BrokenWorkflow, match=r"'Canvas' is ambiguous: nodes 1 \(EmptyImage\), 9 \(SaveImage\)") as caught:
        find_by_title(graph, "Canvas")
    assert "rename" in str(caught.value.hint)


def test_a_sound_graph_has_no_problem() -> None:
    assert check(make_graph(), OBJECT_INFO) == []


def set_input(graph: Graph, node_id: str, name: str, value: Any) -> Graph:
    graph[node_id]["inputs"][name] = value
    return graph


SAMPLER = {"seed": 1, "steps": 20, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
LATENT = {"class_type": "EmptySD3LatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}}


def make_sampler(**changes: Any) -> Graph:
    """A sampler whose links are missing; it feeds the output by way of a decoder."""
    return {
        "2": LATENT,
        "3": {"class_type": "KSampler", "inputs": {**SAMPLER, "latent_image": ["2", 0], **changes}},
        "4": {"class_type": "VAEDecode", "inputs": {"samples": ["3", 0], "vae": ["5", 0]}},
        "5": {"class_type": "VAELoader", "inputs": {"vae_name": "ae.safetensors"}},
        "9": {"class_type": "SaveImage", "inputs": {"images": ["4", 0], "filename_prefix": "x"}},
    }


@pytest.mark.parametrize(
    ("name", "value", "code", "says"),
    [
        ("width", 0, "value_smaller_than_min", "0 is smaller than the minimum 1"),
        ("width", 999999, "value_bigger_than_max", "16384"),
        ("width", "abc", "invalid_input_type", '"abc" is not an INT'),
        ("width", None, "invalid_input_type", "null"),
        ("width", ["1"], "bad_linked_input", "a link is"),
        ("width", ["77", 0], "bad_link", "points to no node"),
        ("width", [1, 0], "bad_link", "points to no node"),
        ("width", ["1", -1], "bad_link", "points to no node"),
        ("width", ["1", 0], "cycle", "1 <- 1"),
    ],
)
def test_values_and_links_that_comfyui_refuses(name: str, value: Any, code: str, says: str) -> None:
    problems = check(set_input(make_graph(), "1", name, value), OBJECT_INFO)
    assert [(problem.node_id, problem.title, problem.class_type, problem.code) for problem in problems] == [
        ("1", "Canvas", "EmptyImage", code)
    ]
    assert says in problems[0].message
    assert "node 1" in str(problems[0])


@pytest.mark.parametrize("value", ["64", 64.7, True])
def test_values_that_comfyui_converts_are_fine(value: Any) -> None:
    assert check(set_input(make_graph(), "1", "width", value), OBJECT_INFO) == []


@pytest.mark.parametrize(
    ("graph", "code", "node_id", "input_name"),
    [
        ({}, "prompt_no_outputs", None, None),
        ({"1": make_graph()["1"]}, "prompt_no_outputs", None, None),
        (set_input(make_graph(), "9", "images", ["1", 3]), "bad_link", "9", "images"),
        (set_input(make_graph(), "9", "images", "x"), "link_missing", "9", "images"),
        (set_input(make_graph() | {"2": LATENT}, "9", "images", ["2", 0]), "return_type_mismatch", "9", "images"),
        (
            make_graph() | {"9": {"class_type": "SaveImage", "inputs": {"images": ["1", 0]}}},
            "required_input_missing",
            "9",
            "filename_prefix",
        ),
        (make_graph() | {"2": {"class_type": "NoSuchNode", "inputs": {}}}, "unknown_class", "2", None),
        (make_graph() | {"2": {"inputs": {}}}, "invalid_prompt", "2", None),
        (make_graph() | {"2": {"class_type": "VAELoader"}}, "invalid_prompt", "2", None),
        (make_graph() | {"2": "text"}, "invalid_prompt", "2", None),
    ],
)
def test_each_kind_of_problem_is_found_at_its_place(graph: Graph, code: str, node_id: str | None, input_name: str | None) -> None:
    assert [(problem.code, problem.node_id, problem.input) for problem in check(graph, OBJECT_INFO)] == [(code, node_id, input_name)]


def test_choices_and_every_missing_link_are_reported_together() -> None:
    problems = check(make_sampler(sampler_name="eular"), OBJECT_INFO)
    assert {(problem.code, problem.input) for problem in problems} == {
        ("value_not_in_list", "sampler_name"),
        ("required_input_missing", "model"),
        ("required_input_missing", "positive"),
        ("required_input_missing", "negative"),
    }
    assert any("(nearest: euler)" in problem.message for problem in problems)


def test_a_longer_cycle_is_named_with_its_nodes() -> None:
    graph: Graph = {
        "1": {"class_type": "ImageScale", "inputs": {"image": ["2", 0]}},
        "2": {"class_type": "ImageScale", "inputs": {"image": ["1", 0]}},
    }
    (problem,) = check(graph, OBJECT_INFO)
    assert problem.code == "cycle"
    assert {"1", "2"} <= set(problem.message.split())


def test_nodes_that_no_output_needs_are_judged_by_class_alone() -> None:
    dangling = {"class_type": "KSampler", "inputs": {"steps": -5}}
    assert check(make_graph() | {"2": dangling}, OBJECT_INFO) == []


@pytest.mark.parametrize("declared", [[["png", "webp"], {"default": "png"}], [["png", "webp"]], ["COMBO", {"options": ["png", "webp"]}]])
def test_both_ways_of_declaring_choices_are_read(declared: list[Any]) -> None:
    info = {"Save": {"input": {"required": {"format": declared}}, "output": [], "output_node": True}}
    assert check({"1": {"class_type": "Save", "inputs": {"format": "webp"}}}, info) == []
    (problem,) = check({"1": {"class_type": "Save", "inputs": {"format": "gif"}}}, info)
    assert (problem.code, problem.message) == ("value_not_in_list", '"gif" is not one of: png, webp')


@pytest.mark.parametrize(
    "declared",
    [[["a.png"], {"image_upload": True}], ["COMBO", {"remote": {"route": "/x"}}], ["COMBO", {"multiselect": True, "options": []}]],
)
def test_lists_that_comfyui_does_not_check_accept_anything(declared: list[Any]) -> None:
    info = {"Load": {"input": {"required": {"image": declared}}, "output": [], "output_node": True}}
    assert check({"1": {"class_type": "Load", "inputs": {"image": "new.png"}}}, info) == []


def test_wildcards_unions_and_dynamic_inputs_accept_links() -> None:
    info = {
        "Any": {"input": {}, "output": ["*", "MASK,IMAGE", "MODEL"]},
        "Out": {
            "input": {"required": {"a": ["IMAGE"], "b": ["IMAGE,LATENT"], "c": ["*"], "d": ["COMFY_AUTOGROW_V3", {}]}},
            "output": [],
            "output_node": True,
        },
    }
    inputs = {"a": ["1", 0], "b": ["1", 1], "c": ["1", 2]}
    assert check({"1": {"class_type": "Any", "inputs": {}}, "2": {"class_type": "Out", "inputs": inputs}}, info) == []
    problems = check({"1": {"class_type": "Any", "inputs": {}}, "2": {"class_type": "Out", "inputs": {**inputs, "b": ["1", 2]}}}, info)
    assert [problem.code for problem in problems] == ["return_type_mismatch"]


def test_loader_files_names_each_model_file_once() -> None:
    graph = make_sampler() | {
        "6": {"class_type": "VAELoader", "inputs": {"vae_name": "ae.safetensors"}},
        "7": {"class_type": "UpscaleModelLoader", "inputs": {"model_name": "not-there.pth"}},
        "8": {"class_type": "LoadImage", "inputs": {"image": "a.png"}},
    }
    assert loader_files(graph, OBJECT_INFO) == [
        ("VAELoader", "vae_name", "ae.safetensors"),
        ("UpscaleModelLoader", "model_name", "not-there.pth"),
    ]
