"""What the launcher decides for machines that people rent, and that its figures are those of the code they are taken from."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from decisions import GB, LOADING_RAM_BYTES, PRECISIONS, QUANTISING_RAM_BYTES, TOLERANCE, Machine, Wish, decide, read_base_models, size_of
from installing import REPOSITORY, list_steps, read_versions
from keeping import Keeper, KeepError
from machine import read_gpu
from programs import Program
from tunnels import read_address

from gateway.models.command import read_models
from gateway.settings import Settings
from gateway.trainings import presets
from local.services import find_rclone_program
from tests.hub_server import running_hub

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "docker" / "colab" / "launch.py"

# As such machines describe themselves; RAM and disk are those that Colab gives.
NO_GPU = Machine(0, 13_609_431_040, 80 * GB)
T4 = Machine(15_843_721_216, 13_609_431_040, 70 * GB, "Tesla T4", has_hf_token=True)
T4_HIGH_RAM = Machine(15_843_721_216, 54_751_703_040, 180 * GB, "Tesla T4", has_hf_token=True)
L4 = Machine(24_152_899_584, 56_862_334_976, 200 * GB, "NVIDIA L4", has_hf_token=True)
A100_40 = Machine(42_474_471_424, 89_641_607_168, 200 * GB, "NVIDIA A100-SXM4-40GB", has_hf_token=True)
A100_80 = Machine(85_093_318_656, 179_000_000_000, 200 * GB, "NVIDIA A100-SXM4-80GB", has_hf_token=True)


@pytest.mark.parametrize(
    ("machine", "base_model", "precision", "lowvram", "lru"),
    [
        (T4, "flux1-dev-fp8", "", True, False),
        (T4_HIGH_RAM, "flux1-dev-fp8", "int4", True, True),
        (L4, "flux1-dev-fp8", "int8", False, True),
        (A100_40, "flux1-dev", "bf16", False, True),
        (A100_80, "flux1-dev", "bf16", False, True),
    ],
    ids=["T4", "T4 with much RAM", "L4", "A100 40 GB", "A100 80 GB"],
)
def test_a_machine_gets_what_fits_it(machine: Machine, base_model: str, precision: str, lowvram: bool, lru: bool) -> None:
    plan = decide(machine, Wish())
    assert not plan.refusal
    assert (plan.base_model, plan.precision, plan.comfyui) == (base_model, precision, True)
    assert ("--lowvram" in plan.comfyui_flags, "--cache-lru" in plan.comfyui_flags) == (lowvram, lru)
    assert (plan.trainer, plan.install_simpletuner) == (("simpletuner", True) if precision else ("off", False))
    assert len(plan.reasons) == 3


def test_without_a_gpu_the_small_model_stands_in() -> None:
    plan = decide(NO_GPU, Wish())
    assert (plan.base_model, plan.comfyui, plan.trainer) == ("tinyflux", False, "tiny")
    assert decide(NO_GPU, Wish(train=False)).trainer == "off"


@pytest.mark.parametrize(
    ("machine", "wish", "said"),
    [
        (Machine(4 * GB, 16 * GB, 100 * GB, "GTX 1650"), Wish(), "GTX 1650 has 4 GB"),
        (Machine(24 * GB, 64 * GB, 20 * GB, "L4"), Wish(), "20 GB are free"),
        (L4, Wish(base_model="sdxl"), "'sdxl'"),
        (Machine(85 * GB, 179 * GB, 200 * GB, "A100"), Wish(base_model="flux1-dev"), "huggingface.co/black-forest-labs/FLUX.1-dev"),
        (Machine(0, 8 * GB, 2 * GB), Wish(), "2 GB are free"),
        (NO_GPU, Wish(base_model="flux1-dev"), "flux1-dev needs a GPU"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_installed(machine: Machine, wish: Wish, said: str) -> None:
    assert said in decide(machine, wish).refusal


def test_what_is_missing_for_more_is_said() -> None:
    without_token = decide(Machine(85 * GB, 179 * GB, 200 * GB, "A100"), Wish())
    assert (without_token.base_model, without_token.trainer) == ("flux1-dev-fp8", "off")
    assert "a Hugging Face token" in without_token.reasons[0]
    assert "HF_TOKEN" in without_token.reasons[2]
    assert "takes 50 GB of RAM" in decide(T4, Wish()).reasons[2]
    little_disk = decide(Machine(24 * GB, 64 * GB, 60 * GB, "L4", has_hf_token=True), Wish())
    assert (little_disk.trainer, little_disk.base_model) == ("off", "flux1-dev-fp8")
    assert "of disk" in little_disk.reasons[2]
    assert decide(A100_80, Wish(train=False)).trainer == "off"
    assert decide(A100_80, Wish(base_model="flux1-dev-fp8")).base_model == "flux1-dev-fp8"


def test_the_figures_are_those_of_trainings() -> None:
    assert presets.FLUX.gpu_bytes == PRECISIONS
    assert (presets.FLUX.loading_ram_bytes, presets.FLUX.quantising_ram_bytes) == (LOADING_RAM_BYTES, QUANTISING_RAM_BYTES)
    assert presets.TOLERANCE == TOLERANCE


def test_base_models_are_those_of_the_one_table() -> None:
    catalogue = read_models(Settings())
    assert set(read_base_models()) == {name for name, model in catalogue.items() if model.sources and model.family == "flux1"}
    assert all(size_of(name) == catalogue[name].size_bytes for name in read_base_models())
    assert decide(A100_80, Wish(base_model="flux1-schnell")).base_model == "flux1-schnell"


@pytest.mark.parametrize("machine", [T4_HIGH_RAM, L4, A100_40, A100_80])
def test_the_trainer_would_decide_the_same(machine: Machine) -> None:
    measured = presets.Machine(
        gpu="present", gpu_total_bytes=machine.gpu_bytes, gpu_free_bytes=machine.gpu_bytes, ram_total_bytes=machine.ram_bytes
    )
    assert presets.choose_preset("flux1", None, measured).precision == decide(machine, Wish()).precision


def test_every_part_gets_an_environment_of_its_own_and_pinned_versions(tmp_path: Path) -> None:
    versions = read_versions((ROOT / "docker" / "versions.env").read_text())
    steps = {step.name: step for step in list_steps(decide(L4, Wish()), L4, tmp_path, versions)}
    assert REPOSITORY == ROOT
    own = [step for step in steps.values() if step.command[0] == sys.executable and "pip" in step.command]
    assert own
    assert all("--target" in step.command for step in own), "nothing goes into the Python that is there"
    assert versions["COMFYUI_VERSION"] in steps["comfyui"].command
    assert {"--nvidia", "--skip-manager"} <= set(steps["comfyui"].command)
    assert f"comfy-cli=={versions['COMFY_CLI_VERSION']}" in steps["comfy-cli"].command
    assert Path(steps["simpletuner"].command[1]).is_file()
    assert steps["simpletuner"].env["TORCH_INDEX"] == versions["SIMPLETUNER_TORCH_INDEX"]
    assert not {"comfyui", "simpletuner"} & {step.name for step in list_steps(decide(NO_GPU, Wish()), NO_GPU, tmp_path, versions)}


def test_the_base_model_is_pulled_by_the_gateways_own_command(tmp_path: Path) -> None:
    versions = read_versions((ROOT / "docker" / "versions.env").read_text())
    (step,) = (step for step in list_steps(decide(L4, Wish()), L4, tmp_path, versions) if step.name == "base-model")
    program, *arguments = step.command
    assert program == str(tmp_path / "gateway" / "bin" / "python")
    model = read_models(Settings())["flux1-dev-fp8"]
    with running_hub() as hub:
        hub.files.update({f"{source.repository}/{source.path}": role.encode() * 100 for role, source in model.sources.items()})
        env = {**os.environ, **step.env, "HF_ENDPOINT": hub.url}
        subprocess.run([sys.executable, *arguments], env=env, check=True, capture_output=True, timeout=60)
    models = tmp_path / "ComfyUI" / "models"
    placed = {role: (models / source.folder / model.files[role]).read_bytes() for role, source in model.sources.items()}
    assert placed == {role: role.encode() * 100 for role in model.files}


def test_a_bare_python_says_what_it_would_do(tmp_path: Path) -> None:
    described = tmp_path / "machine.json"
    described.write_text(json.dumps({"gpu_bytes": L4.gpu_bytes, "ram_bytes": L4.ram_bytes, "disk_free_bytes": L4.disk_free_bytes}))
    # Without site-packages: nothing but the standard library.
    command = [sys.executable, "-S", str(LAUNCH), "--dry-run", "--machine", str(described), "--folder", str(tmp_path / "run")]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    plan = json.loads(done.stdout)
    assert (done.returncode, plan["base_model"], plan["trainer"]) == (0, "flux1-dev-fp8", "off"), done.stderr
    assert not (tmp_path / "run").exists()


def test_what_the_programs_of_others_say_is_read() -> None:
    assert read_gpu("23034, NVIDIA L4\n") == (24_152_899_584, "NVIDIA L4")
    assert read_gpu("") == read_gpu("No devices were found") == (0, "")
    banner = "INF |  Your quick Tunnel has been created! |\nINF |  https://big-red-circle.trycloudflare.com  |\n"
    assert read_address("cloudflared", banner) == "https://big-red-circle.trycloudflare.com"
    assert read_address("cloudflared", "INF Requesting new quick Tunnel on trycloudflare.com...") == ""
    started = '{"lvl":"info","msg":"started tunnel","name":"command_line","url":"https://1234.ngrok-free.app"}'
    assert read_address("ngrok", 'no json\n{"msg": "starting"}\n' + started) == "https://1234.ngrok-free.app"


def test_the_state_is_kept_and_brought_back(tmp_path: Path) -> None:
    first, second, drive = tmp_path / "first", tmp_path / "second", tmp_path / "drive"
    keeper = Keeper(find_rclone_program(), first, str(drive))
    with pytest.raises(KeepError, match="never filled"):
        keeper.save()
    assert not keeper.restore(), "there was nothing yet"
    (first / "s3").mkdir()
    (first / "s3" / "picture.png").write_bytes(b"x" * 100)
    (first / "gone.txt").write_text("soon")
    (first / "logs").mkdir()
    (first / "logs" / "a.log").write_text("left out")
    keeper.save()
    (first / "gone.txt").unlink()
    keeper.save()
    assert Keeper(find_rclone_program(), second, str(drive)).restore()
    assert (second / "s3" / "picture.png").read_bytes() == b"x" * 100
    assert not (second / "gone.txt").exists(), "what was deleted stays deleted"
    assert not (second / "logs").exists()


def test_a_state_that_cannot_be_read_is_not_taken_for_none(tmp_path: Path) -> None:
    (tmp_path / "drive").write_text("a file where a folder should be")
    with pytest.raises(FileExistsError):
        Keeper(find_rclone_program(), tmp_path / "state", str(tmp_path / "drive"))
    away = Keeper(find_rclone_program(), tmp_path / "state", "s3://bucket/prefix")
    with pytest.raises(KeepError):
        away.restore()
    assert not any((tmp_path / "state").iterdir()), "a next start asks again"


def test_a_program_that_dies_is_started_again(tmp_path: Path) -> None:
    said = list[str]()
    program = Program("short", [sys.executable, "-c", "print('I am tired')"], tmp_path / "short.log", grace_s=1.0)
    program.start()
    deadline = time.monotonic() + 30
    while (tmp_path / "short.log").read_text().count("I am tired") < 2:
        assert time.monotonic() < deadline
        program.keep_alive(said.append)
        time.sleep(0.05)
    program.stop()
    assert said[0].startswith("short ended with 0, starts again in 2 s: I am tired")
