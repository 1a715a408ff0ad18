"""Rendering: values land on their leaf byte for byte, nothing else changes, LoRAs chain, ids may change, families must fit."""

import copy
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comfy_workflows.catalog import PACKAGE_FOLDER, Catalog, Filled, Workflow, collect_base_models
from comfy_workflows.errors import BrokenWorkflow, FamilyMismatch
from comfy_workflows.expressions import Expression, ExpressionError
from comfy_workflows.graph import Graph, check, find_by_title, is_link
from comfy_workflows.render import LoraFile, render
from comfy_workflows.workflow import load_workflow

CATALOG = Catalog.load()
FLUX = CATALOG.get("flux")
OBJECT_INFO: dict[str, Any] = json.loads((Path(__file__).parent / "data" / "object_info.json").read_text())
# A URL-safe id, as the gateway makes them.
JOB_ID = "gen_01JD"

HOSTILE = [
    "[1, 2]",
    "7",
    "true",
    "None",
    "{{7*7}}",
    '"}}',
    '", "class_type": "Evil',
    "{% for x in range(9) %}{% endfor %}",
    "{{ base_model.__class__.__mro__ }}",
    "{# gone? #}",
    '["12", 0]',
    "a\nb\r\n\tc\\n",
    "  spaces stay  ",
    "שלום عالم \u202e rtl",
    "🦊👩‍👩‍👧 é e\u0301",
    "</script><b>&amp;",
    "\x7f\x01\ufeff\u2028",
    "x" * 10_000,
]


def fill(workflow: Workflow = FLUX, base_model: str = "flux1-dev", **params: Any) -> Filled:
    return workflow.fill({"prompt": "a fox", **params}, default_base_model=base_model, draw_seed=lambda: 11)


def read(graph: Graph, title: str, name: str) -> Any:
    return graph[find_by_title(graph, title)]["inputs"][name]


@pytest.mark.parametrize("prompt", HOSTILE, ids=range(len(HOSTILE)))
def test_a_hostile_prompt_arrives_byte_for_byte_and_changes_nothing_else(prompt: str) -> None:
    plain = render(FLUX, fill(), job_id=JOB_ID)
    graph = render(FLUX, fill(prompt=prompt), job_id=JOB_ID)
    arrived = json.loads(json.dumps(graph))["6"]["inputs"].pop("text")
    assert arrived == prompt
    assert graph["6"]["inputs"].pop("text") == prompt
    plain["6"]["inputs"].pop("text")
    assert graph == plain


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=200))
def test_any_prompt_arrives_as_that_string(prompt: str) -> None:
    graph = render(FLUX, fill(prompt=prompt, negative_prompt=prompt), job_id=JOB_ID)
    assert [read(graph, title, "text") for title in ("Prompt", "Negative prompt")] == [prompt, prompt]


def test_every_parameter_lands_on_its_node() -> None:
    params: dict[str, Any] = {
        "negative_prompt": "blur",
        "width": 512,
        "height": 768,
        "steps": 9,
        "guidance_scale": 2.5,
        "true_cfg_scale": 3,
        "seed": 5,
        "num_images": 2,
    }
    graph = render(FLUX, fill(**params, sampler="heun", scheduler="beta", base_model="flux1-dev-fp8"), job_id=JOB_ID)
    expected = {
        ("Prompt", "text"): "a fox",
        ("Negative prompt", "text"): "blur",
        ("Canvas", "width"): 512,
        ("Canvas", "height"): 768,
        ("Canvas", "batch_size"): 2,
        ("Sampler", "steps"): 9,
        ("Sampler", "cfg"): 3.0,
        ("Sampler", "seed"): 5,
        ("Sampler", "sampler_name"): "heun",
        ("Sampler", "scheduler"): "beta",
        ("Guidance", "guidance"): 2.5,
        ("Negative guidance", "guidance"): 2.5,
        ("Base model", "unet_name"): "flux1-dev-fp8.safetensors",
        ("Text encoders", "clip_name1"): "clip_l.safetensors",
        ("Text encoders", "clip_name2"): "t5xxl_fp8_e4m3fn.safetensors",
        ("VAE", "vae_name"): "ae.safetensors",
        ("Save", "filename_prefix"): f"{JOB_ID}/image",
    }
    assert {place: read(graph, *place) for place in expected} == expected
    assert set(expected) == {(FLUX.graph[binding.node_id]["_meta"]["title"], binding.input) for binding in FLUX.bindings}


def test_rendering_twice_gives_the_same_graph_and_leaves_the_workflow_alone() -> None:
    before = copy.deepcopy(FLUX.graph)
    loras = [LoraFile("a", "a.safetensors", 0.5, "flux1")]
    first, second = (render(FLUX, fill(), job_id=JOB_ID, loras=loras) for _ in range(2))
    assert first == second
    first["13"]["inputs"]["model"][0] = "changed"
    first["12"]["_meta"]["title"] = "changed"
    assert FLUX.graph == before


@pytest.mark.parametrize("base_model", FLUX.fitting_base_models())
@pytest.mark.parametrize("lora_count", [0, 1, 3, 8])
def test_the_flux_graph_passes_the_recorded_node_catalogue(base_model: str, lora_count: int) -> None:
    loras = [LoraFile(f"l{number}", f"cust/l{number}.safetensors", number / 4 - 1) for number in range(lora_count)]
    graph = render(FLUX, fill(base_model=base_model), job_id=JOB_ID, loras=loras)
    assert check(graph, install(CATALOG.base_models[base_model].files, [lora.file for lora in loras])) == []
    chain = [node["inputs"] for node in graph.values() if node["class_type"] == "LoraLoaderModelOnly"]
    assert [(inputs["lora_name"], inputs["strength_model"]) for inputs in chain] == [(lora.file, lora.weight) for lora in loras]


@pytest.mark.parametrize("name", ["flux-img2img", "flux-fill"])
@pytest.mark.parametrize("lora_count", [0, 2])
def test_the_graphs_that_take_pictures_pass_it_for_every_base_model(name: str, lora_count: int) -> None:
    workflow = CATALOG.get(name)
    loras = [LoraFile(f"l{number}", f"l{number}.safetensors", 1.0, family="flux1") for number in range(lora_count)]
    for base_model in workflow.fitting_base_models():
        if lora_count and base_model == "tinyflux":
            continue
        request = {**workflow.example, "base_model": base_model}
        filled = workflow.fill(request, default_base_model=base_model, draw_seed=lambda: 0)
        files = {image.name: f"fluxgate/{image.name}.png" for image in workflow.images}
        graph = render(workflow, replace(filled, values=filled.values | files), job_id=JOB_ID, loras=loras)
        assert check(graph, install(CATALOG.base_models[base_model].files, [lora.file for lora in loras])) == []
        loaded = [node["inputs"]["image"] for node in graph.values() if node["class_type"].startswith("LoadImage")]
        assert sorted(loaded) == sorted(files.values())


def test_a_lora_fits_the_families_a_base_model_names() -> None:
    fill = CATALOG.get("flux-fill")
    request = {**fill.example, "base_model": "flux1-fill-dev"}
    filled = fill.fill(request, default_base_model="", draw_seed=lambda: 0)
    assert render(fill, filled, job_id=JOB_ID, loras=[LoraFile("a", "a.safetensors", 1.0, family="flux1")])
    with pytest.raises(FamilyMismatch):
        render(fill, filled, job_id=JOB_ID, loras=[LoraFile("a", "a.safetensors", 1.0, family="tinyflux")])


def install(files: Mapping[str, str], loras: list[str]) -> dict[str, Any]:
    """The recorded catalogue as an instance with exactly these files would answer it."""
    info = copy.deepcopy(OBJECT_INFO)
    for class_type, name, choices in (
        ("UNETLoader", "unet_name", [files["unet"]]),
        ("DualCLIPLoader", "clip_name1", [files["clip_l"], files["t5"]]),
        ("DualCLIPLoader", "clip_name2", [files["clip_l"], files["t5"]]),
        ("VAELoader", "vae_name", [files["vae"]]),
        ("LoraLoaderModelOnly", "lora_name", loras),
    ):
        info[class_type]["input"]["required"][name][0] = choices
    return info


def test_the_untouched_export_passes_the_recorded_node_catalogue() -> None:
    assert check(FLUX.graph, install(CATALOG.base_models["flux1-dev"].files, ["style.safetensors"])) == []


def test_every_offered_sampler_and_scheduler_is_one_that_comfyui_recorded() -> None:
    declared = OBJECT_INFO["KSampler"]["input"]["required"]
    assert set(FLUX.parameters["sampler"].choices) == set(declared["sampler_name"][0])
    assert set(FLUX.parameters["scheduler"].choices) == set(declared["scheduler"][0])


def test_a_lora_of_another_family_is_refused_with_both_names() -> None:
    loras = [LoraFile("ok", "a", 1.0, "flux1"), LoraFile("unknown", "b", 1.0, None), LoraFile("dots", "c", 1.0, "tinyflux")]
    with pytest.raises(FamilyMismatch) as caught:
        render(FLUX, fill(), job_id=JOB_ID, loras=loras)
    assert caught.value.message == "LoRA \"dots\" belongs to family 'tinyflux', but base model 'flux1-dev' needs 'flux1'"
    assert caught.value.details == {"parameter": "loras", "value": "dots", "family": "tinyflux", "allowed": ["flux1"]}
    assert "family 'tinyflux'" in str(caught.value.hint)
    assert render(FLUX, fill(), job_id=JOB_ID, loras=loras[:2])


def write_folder(folder: Path, graph: Graph, bindings: str, example: Mapping[str, Any]) -> Workflow:
    folder.mkdir(exist_ok=True)
    (folder / "graph.json").write_text(json.dumps(graph))
    (folder / "bindings.toml").write_text(bindings)
    (folder / "example.json").write_text(json.dumps(example))
    return load_workflow(folder, collect_base_models(PACKAGE_FOLDER))


FLUX_BINDINGS = (PACKAGE_FOLDER / "flux" / "bindings.toml").read_text()


@given(st.permutations(sorted(FLUX.graph)))
def test_a_reexport_with_other_ids_renders_the_same(tmp_path_factory: pytest.TempPathFactory, ids: list[str]) -> None:
    # The editor also counts on from the highest id it ever gave, so the new ids need not be the old ones.
    new_ids = {old: f"{new}7" for old, new in zip(FLUX.graph, ids, strict=True)}
    graph = rename(FLUX.graph, new_ids)
    again = write_folder(tmp_path_factory.mktemp("export") / "flux", graph, FLUX_BINDINGS, FLUX.example)
    params: dict[str, Any] = {"prompt": "b", "steps": 3}
    assert render(again, fill(again, **params), job_id=JOB_ID) == rename(render(FLUX, fill(**params), job_id=JOB_ID), new_ids)
    assert again.version != FLUX.version


def rename(graph: Graph, new_ids: Mapping[str, str]) -> Graph:
    def rename_inputs(inputs: dict[str, Any]) -> dict[str, Any]:
        return {name: [new_ids[value[0]], value[1]] if is_link(value) else value for name, value in inputs.items()}

    return {new_ids[old]: {**node, "inputs": rename_inputs(node["inputs"])} for old, node in graph.items()}


SMALL: Graph = {
    "1": {
        "class_type": "EmptyImage",
        "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": 0},
        "_meta": {"title": "The v1.5 canvas"},
    },
    "9": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "x"}, "_meta": {"title": "Save"}},
}


def test_a_small_workflow_without_models_has_neither_base_model_nor_loras(tmp_path: Path) -> None:
    bindings = """
        title = "Blank"
        [parameters.size]
        type = "integer"
        default = 64
        [bindings]
        "The v1.5 canvas.width" = "{{ size }}"
        "The v1.5 canvas.height" = "{{ size // 2 }}"
        "The v1.5 canvas.color" = 255
        "Save.filename_prefix" = "{{ job_id }}/{{ base_model.name }}-{{ lora_count }}"
    """
    workflow = write_folder(tmp_path / "blank", SMALL, bindings, {"size": 32})
    assert set(workflow.request_model.model_fields) == {"size"}
    filled = workflow.fill({"size": 128}, default_base_model="tinyflux", draw_seed=lambda: 0)
    graph = render(workflow, filled, job_id=JOB_ID)
    assert graph["1"]["inputs"] == {"width": 128, "height": 64, "batch_size": 1, "color": 255}
    assert graph["9"]["inputs"]["filename_prefix"] == f"{JOB_ID}/tinyflux-0"
    with pytest.raises(BrokenWorkflow, match="has no LoRA node"):
        render(workflow, filled, job_id=JOB_ID, loras=[LoraFile("a", "a", 1.0)])


def test_model_and_clip_are_both_chained_and_unused_nodes_are_gone(tmp_path: Path) -> None:
    graph: Graph = {
        "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "x.safetensors"}, "_meta": {"title": "Checkpoint"}},
        "2": {
            "class_type": "LoraLoader",
            "inputs": {"model": ["1", 0], "clip": ["1", 1], "lora_name": "x", "strength_model": 1, "strength_clip": 1},
            "_meta": {"title": "LoRA"},
        },
        "3": {"class_type": "CLIPTextEncode", "inputs": {"text": "x", "clip": ["2", 1]}, "_meta": {"title": "Prompt"}},
        "4": {"class_type": "Out", "inputs": {"model": ["2", 0], "positive": ["3", 0]}, "_meta": {"title": "Out"}},
        "5": {"class_type": "VAELoader", "inputs": {"vae_name": "x"}, "_meta": {"title": "Unused"}},
    }
    bindings = """
        title = "Checkpoint"
        outputs = ["Out"]
        [parameters.prompt]
        type = "string"
        [bindings]
        "Prompt.text" = "{{ prompt }}"
        [loras]
        node = "LoRA"
    """
    workflow = write_folder(tmp_path / "checkpoint", graph, bindings, {"prompt": "x"})
    bare = render(workflow, fill(workflow), job_id=JOB_ID)
    assert sorted(bare) == ["1", "3", "4"]
    assert (bare["3"]["inputs"]["clip"], bare["4"]["inputs"]["model"]) == (["1", 1], ["1", 0])
    chained = render(workflow, fill(workflow), job_id=JOB_ID, loras=[LoraFile("a", "a", 0.5), LoraFile("b", "b", 2.0)])
    assert sorted(chained) == ["1", "2", "3", "4", "6"]
    assert chained["6"]["inputs"] == {"model": ["2", 0], "clip": ["2", 1], "lora_name": "b", "strength_model": 2.0, "strength_clip": 2.0}
    assert (chained["3"]["inputs"]["clip"], chained["4"]["inputs"]["model"]) == (["6", 1], ["6", 0])
    assert [chained[key]["_meta"]["title"] for key in ("2", "6")] == ["LoRA", "LoRA 2"]


@pytest.mark.parametrize(
    ("expression", "says"),
    [
        ("{{ [size, 0] }}", "an input takes text, a number or a boolean"),
        ("{{ {'a': size} }}", "an input takes text, a number or a boolean"),
        ("{{ none }}", "gives null"),
        ("{{ size / 0 }}", "division by zero"),
        ("{{ size * 1e308 }}", "which JSON cannot hold"),
        ("{{ 1e308 * 10 * size }}", "which JSON cannot hold"),
        ("{{ (1e308 + 1e308) + size }}", "does not evaluate"),
        ("{{ 9999999999 * 9999999999 * size }}", "no number ComfyUI takes"),
        ("{{ 'x' * (size * 1000000000) }}", "* takes numbers"),
        ("{{ '%999999999d' % size }}", "% takes numbers"),
        ("{{ base_model.files.controlnet }}", "has no attribute 'controlnet'"),
        ("{{ base_model.__class__.__mro__ }}", "unsafe"),
        ("x{{ base_model.nothing }}{{ size }}", "nothing"),
    ],
)
def test_an_expression_that_cannot_be_set_is_named_with_its_binding(tmp_path: Path, expression: str, says: str) -> None:
    bindings = f"""
        title = "Blank"
        [parameters.size]
        type = "integer"
        default = 64
        [bindings]
        "The v1.5 canvas.width" = "{{{{ size }}}}"
        "The v1.5 canvas.height" = "{expression}"
    """
    workflow = write_folder(tmp_path / "blank", SMALL, bindings, {})
    filled = workflow.fill({}, default_base_model="tinyflux", draw_seed=lambda: 0)
    with pytest.raises(BrokenWorkflow, match=r"bindings\.toml: 'The v1\.5 canvas\.height'") as caught:
        render(workflow, filled, job_id=JOB_ID)
    assert says in caught.value.message


@pytest.mark.parametrize(
    ("source", "value"),
    [
        ("{{ a }}", "{{ b }}"),
        ("{{- a -}}", "{{ b }}"),
        (" {{ a }}", " {{ b }}"),
        ("{{ a }}{{ a }}", "{{ b }}{{ b }}"),
        ("{{ a }}/x\n", "{{ b }}/x\n"),
        ("{{ n + 1 }}", 8),
        ("{{ n / 2 if n > 5 else 0 }}", 3.5),
        ("{{ n > 5 }}", True),
        ("{{ result }}", "named like Jinja's own"),
        ("{{ result ~ n }}", "named like Jinja's own7"),
        ("{% raw %}{{ a }}{% endraw %}", "{{ a }}"),
    ],
)
def test_an_expression_gives_its_value_and_text_around_it_a_string(source: str, value: Any) -> None:
    found = Expression(source).evaluate({"a": "{{ b }}", "b": "never", "n": 7, "result": "named like Jinja's own"})
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("source", ["{{ a", "{% if a %}x{% endif %}", "{% set x = 1 %}{{ x }}", "{{ a | nosuchfilter }}", "{{ }}"])
def test_statements_and_broken_syntax_do_not_compile(source: str) -> None:
    with pytest.raises(ExpressionError):
        Expression(source)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("{{ base_model.files.update(a=1) }}", "a call"),
        ("{{ n.__class__() }}", "a call"),
        ("{{ 10 ** 10 ** 10 }}", "a power"),
        ("{{ n | center(1000000000) }}", "center"),
        ("{{ a" + "[0]" * 300 + " }}", "inside one another"),
        ("{{ a" + " | trim" * 100 + " }}", "inside one another"),
        ("{{ " + "(" * 400 + "1" + ")" * 400 + " }}", "recursion"),
        ("{{ " + "-" * 900 + "1 }}", "inside one another"),
        ("{{ 1 }}" + "x" * 1000, "at most 1000"),
    ],
)
def test_what_could_run_long_or_reach_out_does_not_compile(source: str, says: str) -> None:
    with pytest.raises(ExpressionError, match=re.escape(says)):
        Expression(source)


@pytest.mark.parametrize(
    ("source", "value"),
    [("{{ (n / 3) | round(2) }}", 2.33), ("{{ n | round(-1000000000) }}", 7), ("{{ n % 4 }}", 3), ("{{ ' A ' | trim | lower }}", "a")],
)
def test_filters_that_stay_small_are_there(source: str, value: Any) -> None:
    assert Expression(source).evaluate({"n": 7}) == value


@pytest.mark.parametrize("source", ["{{ missing }}", "{{ missing + 1 }}", "x{{ missing }}", "{{ range(5) }}", "{{ lipsum() }}"])
def test_undefined_names_are_errors_and_jinjas_globals_are_not_there(source: str) -> None:
    with pytest.raises(ExpressionError):
        Expression(source).evaluate({})
