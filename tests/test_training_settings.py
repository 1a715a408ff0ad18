"""Every field of a training request: what it allows, and where in SimpleTuner's configuration it arrives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from comfy_workflows.catalog import Catalog
from gateway.jobs.model import Job
from gateway.settings import Settings
from gateway.trainings.requests import TrainingRequest, describe_parameters
from tests.job_specs import make_spec
from trainer_worker.plan import plan_training
from trainer_worker.trainers.simpletuner import SimpleTunerTrainer

BASE = {"name": "thing", "dataset": "ds_1"}


def configure(folder: Path, base: str = "flux1-dev", **asked: Any) -> dict[str, Any]:
    """SimpleTuner's config.json for a request, with the entry of its data set under `data`."""
    model = Catalog.load().base_model(base)
    request = TrainingRequest.model_validate({**BASE, "base": base, **asked})
    parameters = describe_parameters(request, model, seed=request.seed if request.seed >= 0 else 99)
    job = Job(spec=make_spec("trn_1", kind="training", workflow="training", base_model=model.name, parameters=parameters))
    launch = SimpleTunerTrainer(Path("/python")).prepare(plan_training(job, Settings(), folder, resume=False), "http://127.0.0.1:1/hook")
    config: dict[str, Any] = json.loads(Path(launch.env["CONFIG_PATH"]).read_text())
    return {
        **config,
        "data": json.loads(Path(config["data_backend_config"]).read_text())[0],
        "prompts": json.loads(Path(config["user_prompt_library"]).read_text()) if "user_prompt_library" in config else {},
    }


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (
            {},
            {"max_train_steps": 1000, "learning_rate": 1e-4, "lora_rank": 16, "lora_alpha": 16, "resolution": 1024, "train_batch_size": 1},
        ),
        ({}, {"lr_scheduler": "constant", "lr_warmup_steps": 0, "optimizer": "adamw_bf16", "gradient_checkpointing": True, "seed": 99}),
        ({"steps": 2500}, {"max_train_steps": 2500}),
        ({"learning_rate": 5e-5}, {"learning_rate": 5e-5}),
        ({"rank": 4}, {"lora_rank": 4, "lora_alpha": 4}),
        ({"rank": 4, "alpha": 4}, {"lora_alpha": 4}),
        ({"resolution": 512}, {"resolution": 512}),
        ({"batch_size": 4}, {"train_batch_size": 4}),
        ({"lr_scheduler": "polynomial", "warmup": 100}, {"lr_scheduler": "polynomial", "lr_warmup_steps": 100}),
        ({"warmup": 100}, {"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 100}),
        ({"optimizer": "optimi-lion"}, {"optimizer": "optimi-lion"}),
        ({"precision": "bf16"}, {"base_model_precision": "no_change"}),
        ({"precision": "int8"}, {"base_model_precision": "int8-quanto", "quantize_via": "cpu"}),
        ({"precision": "int4"}, {"base_model_precision": "int4-quanto"}),
        ({"precision": "nf4"}, {"base_model_precision": "nf4-bnb"}),
        ({"gradient_checkpointing": False}, {"gradient_checkpointing": False}),
        ({"checkpoint_every": 50}, {"checkpoint_step_interval": 50}),
        ({"sample_prompts": ["a TOK", "b"]}, {"prompts": {"sample_1": "a TOK", "sample_2": "b"}, "validation_step_interval": 250}),
        ({"sample_prompts": ["a TOK"], "sample_every": 20, "seed": 5}, {"validation_step_interval": 20, "validation_seed": 5, "seed": 5}),
        ({}, {"validation_disable": True}),
        ({"seed": 7}, {"seed": 7}),
        ({"base": "flux1-schnell"}, {"model_flavour": "schnell", "flux_fast_schedule": True}),
        ({"base": "flux1-dev-fp8"}, {"pretrained_model_name_or_path": "black-forest-labs/FLUX.1-dev"}),
    ],
)
def test_a_field_arrives_in_simpletuners_configuration(tmp_path: Path, asked: dict[str, Any], expected: dict[str, Any]) -> None:
    config = configure(tmp_path, **asked)
    assert {key: config[key] for key in expected} == expected


def test_repeats_arrive_with_the_data(tmp_path: Path) -> None:
    assert configure(tmp_path, repeats=3)["data"]["repeats"] == 3


def test_every_field_is_in_the_table() -> None:
    """Those that say something of the job and not of the training stand here by name."""
    others = {"name", "dataset", "trigger_word", "resume_from", "video_frames", "metadata", "webhook", "repeats"}
    marks = test_a_field_arrives_in_simpletuners_configuration.pytestmark
    asked = {name for mark in marks for changes, _ in mark.args[1] for name in changes}
    assert asked | others == set(TrainingRequest.model_fields)


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        ({"name": "../x"}, "name"),
        ({"steps": 0}, "steps"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"learning_rate": 2}, "learning_rate"),
        ({"rank": 0}, "rank"),
        ({"rank": 999}, "rank"),
        ({"resolution": 1000}, "resolution"),
        ({"batch_size": 0}, "batch_size"),
        ({"repeats": -1}, "repeats"),
        ({"lr_scheduler": "steep"}, "lr_scheduler"),
        ({"warmup": -1}, "warmup"),
        ({"steps": 10, "warmup": 11}, "warmup"),
        ({"optimizer": "adam"}, "optimizer"),
        ({"precision": "fp4"}, "precision"),
        ({"gradient_checkpointing": "often"}, "gradient_checkpointing"),
        ({"checkpoint_every": 0}, "checkpoint_every"),
        ({"sample_prompts": [""]}, "sample_prompts"),
        ({"sample_prompts": ["a"] * 9}, "sample_prompts"),
        ({"sample_prompts": ["a\0"]}, "sample_prompts"),
        ({"sample_every": 0}, "sample_every"),
        ({"seed": -2}, "seed"),
        ({"video_frames": 1}, "video_frames"),
        ({"metadata": {"a": "x" * 20_000}}, "metadata"),
        ({"epochs": 3}, "epochs"),
    ],
)
def test_a_bad_value_names_its_field(asked: dict[str, Any], field: str) -> None:
    with pytest.raises(ValidationError) as refused:
        TrainingRequest.model_validate({**BASE, **asked})
    (fault,) = refused.value.errors()
    assert field in f"{fault['loc']} {fault['msg']}"


def test_metadata_that_is_nested_without_end_is_refused() -> None:
    deep: Any = "x"
    for _ in range(100):
        deep = [deep]
    with pytest.raises(ValidationError, match="64 levels"):
        TrainingRequest.model_validate({**BASE, "metadata": {"a": deep}})
