"""What SimpleTuner is given to read. Whether it takes it, tests/simpletuner asks the real one."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.test_trainer_checkpoints import cut, write_checkpoint
from tests.training_parts import make_config
from trainer_worker.checkpoints import OPTIMIZER_NAME, WEIGHTS_NAME
from trainer_worker.launch import Launch, find_secrets, pass_environment
from trainer_worker.trainers.simpletuner import SimpleTunerTrainer
from trainer_worker.trainers.tiny import TinyTrainer

URL = "http://127.0.0.1:1/hook/secret"
PYTHON = Path("/envs/simpletuner/bin/python")


def prepare(folder: Path, **changes: Any) -> tuple[Launch, dict[str, Any], dict[str, Any]]:
    """The launch, config.json, and the entry of the data set."""
    launch = SimpleTunerTrainer(PYTHON).prepare(make_config(folder, **changes), URL)
    config = json.loads(Path(launch.env["CONFIG_PATH"]).read_text())
    data = json.loads(Path(config["data_backend_config"]).read_text())
    assert [entry["dataset_type"] for entry in data[1:]] == ["text_embeds"]
    return launch, config, data[0]


def test_flux_is_described_as_comfyui_will_need_it(tmp_path: Path) -> None:
    launch, config, data = prepare(
        tmp_path, family="flux1", base_path="black-forest-labs/FLUX.1-dev", resolution=1024, precision="int8", rank=16, alpha=16
    )
    expected = {
        "model_family": "flux",
        "model_flavour": "dev",
        "lora_type": "standard",
        "lora_rank": 16,
        "lora_alpha": 16,
        "lora_format": "diffusers",
        "base_model_precision": "int8-quanto",
        "quantize_via": "cpu",
        "resolution_type": "pixel_area",
        "aspect_bucket_alignment": 64,
        "max_train_steps": 6,
        "num_train_epochs": 0,
        "validation_disable": True,
        "report_to": "none",
        "push_to_hub": False,
        "resume_from_checkpoint": "",
    }
    assert {key: config[key] for key in expected} == expected
    assert (data["dataset_type"], data["caption_strategy"], data["repeats"], data["crop"]) == ("image", "textfile", 0, False)
    assert Path(data["instance_data_dir"]) == tmp_path / "data"
    # A repository's files may have to be fetched.
    assert "HF_HUB_OFFLINE" not in launch.env
    assert "--own-tokenizers" not in launch.command


def test_the_small_model_states_no_resolution_type_and_uses_its_own_tokenizers(tmp_path: Path) -> None:
    launch, config, data = prepare(tmp_path)
    assert "resolution_type" not in config
    assert (data["resolution"], data["crop_aspect"]) == (128, "square")
    assert launch.command[0] == str(PYTHON)
    assert launch.command[1] == "-P"
    assert launch.command[-1] == "--own-tokenizers"
    assert launch.env["HF_HUB_OFFLINE"] == "1"


@pytest.mark.parametrize(("family", "name", "flavour"), [("wan", "wan", "t2v-480p-1.3b-2.1"), ("hunyuanvideo", "hunyuanvideo", "t2v-480p")])
def test_video_families_get_a_video_data_set(tmp_path: Path, family: str, name: str, flavour: str) -> None:
    _, config, data = prepare(tmp_path, family=family, base_path="x/y", resolution=480, video_frames=81, sample_prompts=("a",))
    assert (config["model_family"], config["model_flavour"]) == (name, flavour)
    assert config["validation_num_video_frames"] == 81
    assert data["dataset_type"] == "video"
    assert data["video"] == {"num_frames": 81, "min_frames": 81, "bucket_strategy": "aspect_ratio", "frame_interval": 1}
    assert "flux_guidance_mode" not in config


@pytest.mark.parametrize(("family", "offline"), [("flux1", "1"), ("wan", "1"), ("hunyuanvideo", None)])
def test_a_model_in_a_folder_needs_no_network_unless_its_family_fetches_parts(tmp_path: Path, family: str, offline: str | None) -> None:
    launch, _, _ = prepare(tmp_path, family=family, base_path=str(tmp_path))
    assert launch.env.get("HF_HUB_OFFLINE") == offline


def test_a_chosen_flavour_is_kept(tmp_path: Path) -> None:
    assert prepare(tmp_path, family="wan", base_path="x/y", flavour="i2v-14b-2.2-high")[1]["model_flavour"] == "i2v-14b-2.2-high"
    assert prepare(tmp_path, family="flux1", base_path="x/y", flavour="schnell")[1]["flux_fast_schedule"] is True


def test_sample_prompts_get_nicknames(tmp_path: Path) -> None:
    launch, config, _ = prepare(tmp_path, sample_prompts=("a TOK", "b"), sample_every=7)
    assert launch.sample_names == {"sample_1": "a TOK", "sample_2": "b"}
    assert json.loads(Path(config["user_prompt_library"]).read_text()) == launch.sample_names
    assert (config["validation_step_interval"], config["validation_disable_unconditional"]) == (7, True)
    assert "validation_disable" not in config


def test_the_webhook_is_written_for_us_alone(tmp_path: Path) -> None:
    _, config, _ = prepare(tmp_path)
    path = Path(config["webhook_config"])
    assert json.loads(path.read_text()) == {"webhook_type": "raw", "callback_url": URL, "log_level": "info"}
    assert path.stat().st_mode & 0o777 == 0o600


def test_resume_names_the_newest_whole_checkpoint(tmp_path: Path) -> None:
    output_dir = tmp_path / "output"
    for step in (10, 20):
        write_checkpoint(output_dir, step)
    assert prepare(tmp_path, resume=True)[1]["resume_from_checkpoint"] == "checkpoint-20"
    cut(output_dir / "checkpoint-20" / OPTIMIZER_NAME)
    (output_dir / WEIGHTS_NAME).write_bytes(b"of an earlier run")
    assert prepare(tmp_path, resume=True)[1]["resume_from_checkpoint"] == "checkpoint-10"
    assert not (output_dir / WEIGHTS_NAME).exists()
    assert (output_dir / "broken-checkpoint-20").is_dir()
    assert prepare(tmp_path, resume=False)[1]["resume_from_checkpoint"] == ""


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"family": "sdxl"}, "family is 'sdxl'"),
        ({"alpha": 8}, "alpha is 8; it must equal rank"),
        ({"steps": 0}, "steps is 0"),
        ({"learning_rate": 0.0}, "learning_rate is 0"),
        ({"repeats": -1}, "repeats is -1"),
        ({"family": "hunyuanvideo", "video_frames": 48}, "video_frames is 48"),
        ({"family": "wan", "precision": "nf4"}, "precision is 'nf4'; allowed for wan"),
    ],
)
def test_what_would_fail_late_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        prepare(tmp_path, **changes)


def test_the_small_trainer_trains_the_small_model_only(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="family is 'flux1'"):
        TinyTrainer(Path(sys.executable)).prepare(make_config(tmp_path, family="flux1"), URL)


def test_a_trainer_sees_of_our_environment_what_it_needs() -> None:
    own = {
        "PATH": "/bin",
        "CUDA_VISIBLE_DEVICES": "0",
        "HF_TOKEN": "hf_x",
        "AWS_SECRET_ACCESS_KEY": "s",
        "REDIS_URL": "r",
        "NO_PROXY": "lan",
    }
    env = pass_environment(own, {"CONFIG_PATH": "c"})
    assert env == {
        "PATH": "/bin",
        "CUDA_VISIBLE_DEVICES": "0",
        "HF_TOKEN": "hf_x",
        "NO_PROXY": "lan,127.0.0.1,localhost",
        "no_proxy": "lan,127.0.0.1,localhost",
        "PYTHONUNBUFFERED": "1",
        "CONFIG_PATH": "c",
    }
    assert find_secrets(env) == ["hf_x"]
