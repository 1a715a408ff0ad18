"""The catalog: what is shipped, what a deployment adds, and that every kind of broken folder is named when it is loaded."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from comfy_workflows.base_models import read_base_models
from comfy_workflows.catalog import PACKAGE_FOLDER, Catalog
from comfy_workflows.errors import BrokenWorkflow, UnknownBaseModel, UnknownWorkflow, WorkflowError

FLUX = PACKAGE_FOLDER / "flux"


def test_the_package_ships_flux_and_its_base_models() -> None:
    catalog = Catalog.load()
    flux = catalog.get("flux")
    assert catalog.names() == ["flux", "flux-fill", "flux-img2img"]
    assert (flux.families, flux.lora_node, flux.max_loras) == (("flux1", "tinyflux"), "LoRA", 8)
    assert flux.fitting_base_models() == ["flux1-dev", "flux1-dev-fp8", "flux1-schnell", "tinyflux"]
    assert catalog.get("flux-img2img").fitting_base_models() == flux.fitting_base_models()
    assert catalog.get("flux-fill").fitting_base_models() == sorted(catalog.base_models)
    parts = [(FLUX / file).read_bytes() for file in ("graph.json", "bindings.toml", "example.json")]
    assert flux.version == hashlib.sha256(b"\0".join(parts)).hexdigest()[:12]
    assert {name for name, parameter in flux.parameters.items() if parameter.consumer == "gateway"} == {"output_format", "quality"}
    dev = catalog.base_model("flux1-dev")
    assert (dev.family, dev.steps, dev.guidance_scale, dev.gated) == ("flux1", 20, 3.5, True)
    assert all({"unet", "clip_l", "t5", "vae"} == known.files.keys() for known in catalog.base_models.values())


def test_unknown_names_are_refused_with_the_nearest() -> None:
    catalog = Catalog.load()
    with pytest.raises(UnknownWorkflow) as workflow:
        catalog.get("flx")
    assert (workflow.value.code, workflow.value.details) == (
        "workflow_not_found",
        {"value": "flx", "allowed": ["flux", "flux-fill", "flux-img2img"], "nearest": "flux"},
    )
    assert workflow.value.hint == "did you mean 'flux'?"
    with pytest.raises(UnknownBaseModel) as base_model:
        catalog.base_model("zzz")
    assert (base_model.value.code, base_model.value.details["nearest"]) == ("base_model_not_found", None)
    assert base_model.value.hint == "known: flux1-dev, flux1-dev-fp8, flux1-fill-dev, flux1-schnell, tinyflux"


def test_later_folders_add_and_replace(tmp_path: Path) -> None:
    for name in ("portrait", "flux"):
        shutil.copytree(FLUX, tmp_path / name)
    (tmp_path / "notes").mkdir()
    bindings = tmp_path / "flux" / "bindings.toml"
    bindings.write_text(bindings.read_text().replace("Flux: text to image", "Ours"))
    (tmp_path / "base_models.toml").write_text(
        '[ours]\ntitle = "Ours"\nfamily = "flux1"\nfiles = { unet = "u", clip_l = "c", t5 = "t", vae = "v" }\n'
        'size_bytes = 5\nsource = "here"\nlicence = "ours"\nsteps = 8\nguidance_scale = 1\n'
    )
    catalog = Catalog.load(PACKAGE_FOLDER, tmp_path)
    assert catalog.names() == ["flux", "flux-fill", "flux-img2img", "portrait"]
    assert catalog.get("flux").title == "Ours"
    assert {"ours", "tinyflux"} <= set(catalog.get("portrait").fitting_base_models())
    filled = catalog.get("flux").fill({"prompt": "x"}, default_base_model="ours", draw_seed=lambda: 0)
    assert filled.values["steps"] == 8


def edit(name: str, old: str, new: str) -> Callable[[Path], None]:
    """A way to break a folder: one replacement in one of its files, which must have been there."""

    def apply(folder: Path) -> None:
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new, 1))

    return apply


def write(name: str, content: str | bytes) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return apply


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


EDITOR_FORMAT = json.dumps({"last_node_id": 3, "nodes": [{"id": 1, "type": "KSampler"}], "links": [], "version": 0.4})
PROMPT_BODY = json.dumps({"prompt": {"1": {"class_type": "A", "inputs": {}}}, "client_id": "x"})

# (how the folder is broken, what the problem says, a part of the hint if there is one)
BREAKS: dict[str, tuple[Callable[[Path], None], str, str | None]] = {
    "no graph": (remove("graph.json"), "graph.json: No such file", "graph.json, bindings.toml and example.json"),
    "no bindings": (remove("bindings.toml"), "bindings.toml: No such file", "a workflow is"),
    "no example": (remove("example.json"), "example.json: No such file", "a workflow is"),
    "graph not json": (write("graph.json", "{"), "graph.json: not JSON: Expecting property name", None),
    "graph not utf-8": (write("graph.json", b'{"\xff": 1}'), "graph.json: not JSON", None),
    "graph too deep": (write("graph.json", "[" * 100_000), "graph.json: not JSON", None),
    "graph a list": (write("graph.json", "[]"), "must be an object of nodes", "Export (API)"),
    "graph empty": (write("graph.json", "{}"), "must be an object of nodes", "Export (API)"),
    "editor format": (write("graph.json", EDITOR_FORMAT), "the editor's own format", "Workflow -> Export (API)"),
    "prompt body": (write("graph.json", PROMPT_BODY), "the body of a POST to /prompt", '"prompt"'),
    "node without class": (edit("graph.json", '"class_type": "VAELoader"', '"class": "VAELoader"'), "node 10", "Export (API)"),
    "dangling link": (
        edit("graph.json", '"26",', '"99",'),
        "node 13 \"Sampler\" (KSampler), input 'positive': ['99', 0] points to no node",
        None,
    ),
    "cycle": (edit("graph.json", '"clip": [\n        "11"', '"clip": [\n        "26"'), "its inputs lead back to itself", None),
    "example not json": (write("example.json", "x"), "example.json: not JSON", None),
    "example a list": (write("example.json", "[]"), "example.json: must be an object", None),
    "bindings not toml": (write("bindings.toml", "title = "), "bindings.toml: Invalid value (at end of document)", None),
    "bindings not utf-8": (write("bindings.toml", b"\xff"), "bindings.toml: 'utf-8'", None),
    "no title": (edit("bindings.toml", "title = ", "titel = "), "bindings.toml: title: Field required", None),
    "unknown key": (edit("bindings.toml", "outputs = ", "output = "), "bindings.toml: output: Extra inputs", None),
    "bad parameter": (edit("bindings.toml", "multiple_of = 16", "step = 16"), "bindings.toml: parameters.width.step: Extra inputs", None),
    "bad default": (edit("bindings.toml", "default = 1024", "default = 1000"), "the default 1000 is not allowed", None),
    "reserved parameter": (
        edit("bindings.toml", "[parameters.quality]", "[parameters.webhook]"),
        "parameters.webhook: Value error, the name",
        None,
    ),
    "bad default expression": (
        edit("bindings.toml", "{{ base_model.steps }}", "{{ base_model.stes }}"),
        "parameters.steps.default: ",
        None,
    ),
    "default out of range": (
        edit("bindings.toml", "{{ base_model.steps }}", "{{ base_model.steps * 9 }}"),
        "parameters.steps: for base model 'flux1-dev' the default 180 is not allowed",
        None,
    ),
    "vanished title": (
        edit("bindings.toml", '"Sampler.seed"', '"Samplr.seed"'),
        "'Samplr.seed': no node has the title 'Samplr'",
        "in the editor",
    ),
    "ambiguous title": (
        edit("graph.json", '"title": "Decode"', '"title": "Sampler"'),
        "the title 'Sampler' is ambiguous: nodes 8 (VAEDecode), 13 (KSampler)",
        "rename",
    ),
    "vanished output": (edit("bindings.toml", 'outputs = ["Save"]', 'outputs = ["Sve"]'), "no node has the title 'Sve'", "in the editor"),
    "vanished lora": (edit("bindings.toml", 'node = "LoRA"', 'node = "Style"'), "no node has the title 'Style'", "in the editor"),
    "lora node no loader": (edit("bindings.toml", 'node = "LoRA"', 'node = "VAE"'), "LoRA node 10 (VAELoader) loads no LoRA", None),
    "lora not connected": (edit("graph.json", '"model": [\n        "12",\n        0\n      ]', '"model": 5'), "connect its model", None),
    "unknown input": (edit("bindings.toml", '"Sampler.seed"', '"Sampler.sed"'), "has no input 'sed'; the nearest is 'seed'", None),
    "bound link": (
        edit("bindings.toml", '"Sampler.seed"', '"Sampler.model"'),
        "input 'model' of node 'Sampler' is a link to node 40",
        None,
    ),
    "bound lora file": (edit("bindings.toml", '"Sampler.seed"', '"LoRA.lora_name"'), "is set from the request's loras", None),
    "target without dot": (edit("bindings.toml", '"Sampler.seed"', '"Sampler"'), 'a binding is written "Node title.input"', None),
    "unknown name": (edit("bindings.toml", "{{ seed }}", "{{ sede }}"), "reads 'sede', which is no parameter; the nearest is 'seed'", None),
    "statement": (edit("bindings.toml", "{{ seed }}", "{% if seed %}1{% endif %}"), "holds a {% %} statement", None),
    "bad syntax": (edit("bindings.toml", "{{ seed }}", "{{ seed"), "does not compile", None),
    "bound twice": (edit("bindings.toml", "[bindings]", '[bindings]\n"Sampler.seed" = 5'), "Cannot overwrite a value", None),
    "unbound parameter": (
        edit("bindings.toml", 'consumer = "gateway"', ""),
        'parameters.output_format: no binding reads it; bind it, or declare consumer = "gateway"',
        None,
    ),
}


@pytest.mark.parametrize("kind", sorted(BREAKS))
def test_every_kind_of_broken_folder_is_named(kind: str, tmp_path: Path) -> None:
    break_folder, says, hint = BREAKS[kind]
    shutil.copytree(FLUX, tmp_path / "broken")
    shutil.copy(PACKAGE_FOLDER / "base_models.toml", tmp_path)
    break_folder(tmp_path / "broken")
    with pytest.raises(BrokenWorkflow) as caught:
        Catalog.load(tmp_path)
    assert caught.value.code == "broken_workflow"
    assert caught.value.details["workflow"] == "broken"
    assert any(says in problem for problem in caught.value.details["problems"]), caught.value.details["problems"]
    assert hint is None or hint in str(caught.value.hint)


def test_all_bad_bindings_are_reported_at_once(tmp_path: Path) -> None:
    shutil.copytree(FLUX, tmp_path / "broken")
    edit("bindings.toml", '"Sampler.seed"', '"Sampler.sed"')(tmp_path / "broken")
    edit("bindings.toml", "{{ steps }}", "{{ stps }}")(tmp_path / "broken")
    with pytest.raises(BrokenWorkflow, match=r"\(and 1 more\)") as caught:
        Catalog.load(tmp_path)
    assert len(caught.value.details["problems"]) == 2


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[x", "base_models.toml: "),
        ("x = 5", "base_models.toml: x: "),
        ("[tiny]\nsteps = 0", "base_models.toml: tiny.title: Field required"),
    ],
)
def test_a_broken_base_models_file_is_named(text: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "base_models.toml"
    path.write_text(text)
    with pytest.raises(WorkflowError, match=says):
        read_base_models(path)


def test_an_input_whose_name_has_dots_can_be_bound(tmp_path: Path) -> None:
    shutil.copytree(FLUX, tmp_path / "broken")
    graph = json.loads((FLUX / "graph.json").read_text())
    graph["9"]["inputs"]["a.b"] = "dotted"
    (tmp_path / "broken" / "graph.json").write_text(json.dumps(graph))
    edit("bindings.toml", "[bindings]", '[bindings]\n"Save.a.b" = "{{ job_id }}"')(tmp_path / "broken")
    shutil.copy(PACKAGE_FOLDER / "base_models.toml", tmp_path)
    workflow = Catalog.load(tmp_path).get("broken")
    assert ("9", "a.b") in {(binding.node_id, binding.input) for binding in workflow.bindings}
