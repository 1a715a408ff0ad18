"""`python -m comfy_workflows check`: what an author reads, and the exit code."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from comfy_workflows.__main__ import main
from comfy_workflows.catalog import PACKAGE_FOLDER, collect_base_models
from comfy_workflows.folder_check import check_folder
from tests.test_catalog import BREAKS, EDITOR_FORMAT, edit

OBJECT_INFO = Path(__file__).parent / "data" / "object_info.json"


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str]:
    code = main(["check", *map(str, arguments)])
    return code, capsys.readouterr().out


def copy_flux(tmp_path: Path) -> Path:
    return shutil.copytree(PACKAGE_FOLDER / "flux", tmp_path / "mine")


def test_the_command_finds_the_shipped_workflows_sound() -> None:
    command = [sys.executable, "-m", "comfy_workflows", "check", "--object-info", str(OBJECT_INFO)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=PACKAGE_FOLDER.parent)
    assert (done.returncode, done.stderr) == (0, "")
    assert "flux: sound, version " in done.stdout
    assert "flux: note: not on this ComfyUI: flux1-schnell.safetensors (UNETLoader.unet_name)" in done.stdout.splitlines()


def test_a_folder_or_a_folder_of_folders_may_be_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = copy_flux(tmp_path)
    assert run(capsys, folder) == run(capsys, tmp_path)
    code, text = run(capsys, folder, PACKAGE_FOLDER)
    assert code == 0
    assert [line.split(":")[0] for line in text.splitlines()] == ["mine", "flux", "flux-fill", "flux-img2img"]


@pytest.mark.parametrize("kind", sorted(BREAKS))
def test_every_kind_of_broken_folder_is_named_with_exit_code_1(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    break_folder, says, hint = BREAKS[kind]
    folder = copy_flux(tmp_path)
    break_folder(folder)
    code, text = run(capsys, folder)
    assert code == 1
    assert says in text
    assert hint is None or any(line.startswith("mine: what to do: ") and hint in line for line in text.splitlines())


def test_an_export_in_the_editors_format_says_what_to_press(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = copy_flux(tmp_path)
    (folder / "graph.json").write_text(EDITOR_FORMAT)
    code, text = run(capsys, folder)
    assert code == 1
    assert text.splitlines() == [
        "mine: graph.json: is in the editor's own format, which ComfyUI does not run",
        "mine: what to do: export it in API format: in the editor choose the menu Workflow -> Export (API); "
        "in older versions enable the Dev mode options in the settings, then press Save (API Format)",
    ]


# Folders that load, but whose requests or graphs are wrong: (how it is broken, what is said).
WRONG: dict[str, tuple[Callable[[Path], None], str]] = {
    "example out of range": (edit("example.json", '"width": 512', '"width": 500'), "'width' is 500; allowed is"),
    "example unknown name": (edit("example.json", '"width"', '"widht"'), '"widht" is no parameter'),
    "example unknown base model": (edit("example.json", '"seed": 7', '"base_model": "sdxl"'), 'there is no base model "sdxl"'),
    "role without a file": (
        edit("bindings.toml", "files.vae", "files.refiner"),
        "'VAE.vae_name': '{{ base_model.files.refiner }}' does not",
    ),
    "list": (edit("bindings.toml", "{{ steps }}", "{{ [steps] }}"), "'Sampler.steps': gives [20]; an input takes text"),
    "unknown class": (edit("graph.json", '"FluxGuidance"', '"FluxGuidanc"'), "no node class 'FluxGuidanc' (nearest: FluxGuidance)"),
    "wrong link type": (edit("graph.json", '"vae": [\n        "10"', '"vae": [\n        "12"'), "a MODEL of UNETLoader cannot feed a VAE"),
    "out of the node's range": (edit("bindings.toml", "{{ steps }}", "{{ steps * 1000 }}"), "20000 is bigger than the maximum 10000"),
    "wrong type": (edit("bindings.toml", '"Sampler.seed" = "{{ seed }}"', '"Sampler.seed" = "{{ seed }}{{ prompt }}"'), "is not an INT"),
    "not among the choices": (edit("bindings.toml", "{{ sampler }}", "{{ sampler }}x"), '"eulerx" is not one of'),
}


@pytest.mark.parametrize("kind", sorted(WRONG))
def test_what_only_a_request_or_the_node_catalogue_shows_is_named(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    break_folder, says = WRONG[kind]
    folder = copy_flux(tmp_path)
    break_folder(folder)
    code, text = run(capsys, folder, "--object-info", OBJECT_INFO)
    assert code == 1
    assert says in text
    assert "sound" not in text
    assert len([line for line in text.splitlines() if says in line]) == 1


def test_a_missing_model_file_is_a_note_and_not_a_fault() -> None:
    info = json.loads(OBJECT_INFO.read_text())
    report = check_folder(PACKAGE_FOLDER / "flux", collect_base_models(PACKAGE_FOLDER), info)
    assert report.problems == ()
    assert "not on this ComfyUI: tinyflux.safetensors (UNETLoader.unet_name)" in report.notes
    assert not any("flux1-dev.safetensors" in note for note in report.notes)


def test_every_base_model_is_tried(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = copy_flux(tmp_path)
    (folder.parent / "base_models.toml").write_text(
        '[bare]\ntitle = "Bare"\nfamily = "flux1"\nfiles = { unet = "u" }\n'
        'size_bytes = 5\nsource = "x"\nlicence = "x"\nsteps = 8\nguidance_scale = 1\n'
    )
    code, text = run(capsys, folder.parent)
    assert code == 1
    assert "mine: example.json with bare and 0 LoRAs: " in text
    assert "clip_l" in text


def test_a_folder_without_a_workflow_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = run(capsys, tmp_path)
    assert (code, text) == (1, f"{tmp_path}: no workflow here; a workflow is a folder with graph.json, bindings.toml and example.json\n")


def test_a_broken_base_models_file_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy_flux(tmp_path)
    (tmp_path / "base_models.toml").write_text("[x]")
    code, text = run(capsys, tmp_path)
    assert code == 1
    assert "base_models.toml: x.title: Field required" in text


@pytest.mark.parametrize(
    ("content", "says"),
    [(None, "No such file"), ("{", "Expecting"), ('{"nodes": []}', "not an answer of GET /object_info")],
    ids=["missing", "not json", "something else"],
)
def test_a_wrong_catalogue_file_is_exit_code_2(content: str | None, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if content is not None:
        (tmp_path / "info.json").write_text(content)
    assert main(["check", "--object-info", str(tmp_path / "info.json")]) == 2
    assert says in capsys.readouterr().err


def test_a_folder_that_does_not_exist_is_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(tmp_path / "gone")]) == 2
    assert "gone" in capsys.readouterr().err
