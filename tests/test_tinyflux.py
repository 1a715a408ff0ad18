"""The small model against recorded pictures, its codec, its schedules, its LoRA reader and its installation."""

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from local.tinyflux.install import INSTALLED_FILES, install_models
from local.tinyflux.lora import merge_loras, read_lora
from local.tinyflux.pipeline import Pipeline, Settings
from local.tinyflux.sampling import choose_solver, draw_noise, native_grid, solve_euler, solve_heun
from local.tinyflux.schedules import SCHEDULES, beta_quantile, plan_sigmas, shift_for_size, trained_sigmas
from local.tinyflux.weights import LORA_DIR, fill, load_transformer

RECORDED = Path(__file__).parent / "data" / "tinyflux"
TOK = LORA_DIR / "tok.safetensors"
NATIVE = Settings(128, 128)


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    torch.set_num_threads(1)
    return Pipeline.load()


def recorded(name: str) -> Image.Image:
    with Image.open(RECORDED / f"{name}.png") as picture:
        return picture.copy()


def largest_difference(picture: Image.Image, name: str) -> int:
    expected = np.asarray(recorded(name), int)
    return int(np.abs(np.asarray(picture, int) - expected).max())


@pytest.mark.parametrize(
    ("name", "prompt", "seed", "settings"),
    [
        ("red_circle", "a red circle on a blue background", 3, NATIVE),
        ("sunset_640x384", "a beautiful sunset over the sea", 5, Settings(640, 384, steps=8)),
        ("ring_cfg_2", "a teal ring in a forest", 6, replace(NATIVE, cfg=2.0, negative="black")),
        ("seed_max_4_steps", "two green squares at night", 2**64 - 1, replace(NATIVE, steps=4, guidance=1.5)),
        ("star_to_circle", "a red circle on a blue background", 3, replace(NATIVE, image=recorded("star_512"), strength=0.6)),
    ],
)
def test_pictures_equal_the_recorded_ones(pipeline: Pipeline, name: str, prompt: str, seed: int, settings: Settings) -> None:
    # One level of difference is another processor's rounding; where they were recorded the bytes are equal.
    assert largest_difference(pipeline.generate([prompt], [seed], settings)[0], name) <= 1


def test_lora_picture_equals_the_recorded_one_and_leaves_the_pipeline_alone(pipeline: Pipeline) -> None:
    plain = pipeline.generate(["TOK on a green background"], [4], NATIVE)[0]
    changed = pipeline.with_loras([(TOK, 1.0)]).generate(["TOK on a green background"], [4], NATIVE)[0]
    assert largest_difference(changed, "tok_lora") <= 1
    assert pipeline.generate(["TOK on a green background"], [4], NATIVE)[0].tobytes() == plain.tobytes() != changed.tobytes()


def test_the_codec_gives_back_what_it_was_given(pipeline: Pipeline) -> None:
    original = recorded("star_512").resize((128, 128))
    latents = pipeline.encode_picture(original, 16, 16)
    decoded = pipeline.codec.decode(latents)[0].clamp(-1, 1).permute(1, 2, 0).numpy() * 127.5 + 127.5
    assert latents.shape == (1, 16, 16, 16)
    assert np.abs(decoded - np.asarray(original, float)).mean() < 8


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("", [1]),
        ("a RED Circle", "a red circle"),
        ("café", "cafe"),
        ("x" * 101, [2, 1]),
        ("\u4e2d", [2, 1]),
        ("red " * 100, "red " * 23),
    ],
)
def test_tokenizer(pipeline: Pipeline, text: str, ids: str | list[int]) -> None:
    tokenizer = pipeline.encoders.tokenizer
    row = tokenizer([text])[0].tolist()
    expected = tokenizer([ids])[0].tolist() if isinstance(ids, str) else ids + [0] * (24 - len(ids))
    assert row == expected
    assert len(row) == 24
    assert 1 in row


def test_noise_of_a_picture_does_not_depend_on_its_batch() -> None:
    eight = draw_noise(7, 8, 16, 20)
    for count in (1, 2, 5):
        assert torch.equal(draw_noise(7, count, 16, 20), eight[:count])
    assert not torch.equal(eight[0], eight[1])


@pytest.mark.parametrize(("size", "grid"), [((512, 512), (16, 16)), ((1024, 512), (12, 22)), ((16, 16384), (512, 4)), ((64, 64), (16, 16))])
def test_native_grid_keeps_the_area(size: tuple[int, int], grid: tuple[int, int]) -> None:
    assert native_grid(*size) == grid


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 4, 20, 50])
def test_schedules_fall_from_one_to_zero(name: str, steps: int) -> None:
    sigmas = plan_sigmas(name, steps)
    extra = 1 if name == "ddim_uniform" else 0
    assert steps + 1 <= len(sigmas) <= steps + 1 + extra
    assert sigmas[-1] == 0
    assert (sigmas[1:] < sigmas[:-1]).all()
    if not extra:
        assert sigmas[0] == pytest.approx(1)


def test_simple_schedule_reads_the_table_of_flux() -> None:
    # sigma(t) = e^1.15 / (e^1.15 + 1 / t - 1) at t = 1, 0.75, 0.5, 0.25
    assert plan_sigmas("simple", 4).tolist() == pytest.approx([1.0, 0.904534, 0.759511, 0.512840, 0.0], abs=1e-5)


def test_partial_denoise_takes_the_end_of_a_longer_plan() -> None:
    assert torch.equal(plan_sigmas("simple", 10, denoise=0.5), plan_sigmas("simple", 20)[-11:])
    assert len(plan_sigmas("simple", 10, denoise=0)) == 0
    assert len(trained_sigmas(20, 0.6)) == 13


def test_beta_quantiles() -> None:
    # median by symmetry; the others satisfy the distribution's own integral, computed here by brute force
    share = np.array([0.01, 0.2, 0.5, 0.8, 0.99])
    u = (np.arange(2_000_000) + 0.5) / 2_000_000
    density = u**-0.4 * (1 - u) ** -0.4
    cumulative = np.cumsum(density) / density.sum()
    assert np.interp(beta_quantile(share), u, cumulative) == pytest.approx(share, abs=1e-3)


def test_shift_of_the_size_rule() -> None:
    assert shift_for_size(1024, 1024, 1.15, 0.5) == pytest.approx(1.15)
    assert shift_for_size(256, 256, 1.15, 0.5) == pytest.approx(0.5)


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'lms'.*euler.*heun"):
        choose_solver("lms")
    with pytest.raises(ValueError, match=r"'kl_optimal'.*simple"):
        plan_sigmas("kl_optimal", 4)


def test_solvers_follow_a_flow_whose_end_is_known() -> None:
    # dx/ds = x has the solution x(0) = x(1) / e; Heun must come nearer than Euler, and Euler only near.
    sigmas = torch.linspace(1, 0, 21)
    errors = []
    for solver in (solve_euler, solve_heun):
        end = solver(lambda x, sigma: x, torch.ones(1), sigmas, lambda *_: None)
        errors.append(abs(end.item() - np.exp(-1)))
    assert errors[1] < errors[0] < 0.02


def test_lora_names_of_all_accepted_kinds_mean_the_same(tmp_path: Path) -> None:
    transformer = load_transformer()
    module = "transformer_blocks.0.attn.to_q"
    flat = module.replace(".", "_")
    torch.manual_seed(0)
    down, up = torch.randn(4, 160), torch.randn(160, 4)
    kinds = [
        (f"transformer.{module}.lora_A.weight", f"transformer.{module}.lora_B.weight"),
        (f"transformer.{module}.lora_A.default.weight", f"transformer.{module}.lora_B.default.weight"),
        (f"transformer.{module}.lora.down.weight", f"transformer.{module}.lora.up.weight"),
        (f"transformer.{module}.lora_down.weight", f"transformer.{module}.lora_up.weight"),
        (f"lycoris_{flat}.lora_down.weight", f"lycoris_{flat}.lora_up.weight"),
    ]
    for number, (down_key, up_key) in enumerate(kinds):
        path = tmp_path / f"{number}.safetensors"
        stem = down_key.rsplit(".", 2)[0] if ".default." not in down_key and ".lora." not in down_key else f"transformer.{module}"
        save_file({down_key: down, up_key: up, f"{stem}.alpha": torch.tensor(2.0)}, path)
        lora = read_lora(path, transformer)
        assert lora.unknown_keys == ()
        weight = merge_loras(transformer, [(lora, 0.5)]).get_parameter(f"{module}.weight")
        assert torch.allclose(weight, transformer.get_parameter(f"{module}.weight") + 0.25 * (up @ down), atol=1e-5)


def test_loras_stack_and_zero_is_none() -> None:
    transformer = load_transformer()
    lora = read_lora(TOK, transformer)
    key = "transformer_blocks.0.attn.to_q.weight"
    twice = merge_loras(transformer, [(lora, 0.5), (lora, 0.5)]).get_parameter(key)
    assert torch.allclose(twice, merge_loras(transformer, [(lora, 1.0)]).get_parameter(key), atol=1e-6)
    assert not torch.equal(twice, transformer.get_parameter(key))
    assert torch.equal(merge_loras(transformer, [(lora, 0.0)]).get_parameter(key), transformer.get_parameter(key))


def test_foreign_lora_keys_are_named_and_ignored(tmp_path: Path) -> None:
    path = tmp_path / "foreign.safetensors"
    tensors = {
        "transformer.transformer_blocks.0.attn.to_q.lora_A.weight": torch.zeros(16, 3072),  # the real Flux's width
        "transformer.transformer_blocks.0.attn.to_q.lora_B.weight": torch.zeros(3072, 16),
        "transformer_blocks.0.attn.to_q.lora_A.weight": torch.zeros(4, 160),  # no prefix
        "foo.alpha": torch.tensor(1.0),
    }
    save_file(tensors, path)
    lora = read_lora(path, load_transformer())
    assert lora.changes == {}
    assert set(lora.unknown_keys) == set(tensors)


def test_other_weights_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "big.safetensors"
    save_file({"double_blocks.0.img_attn.qkv.weight": torch.zeros(2, 2)}, path)
    with pytest.raises(ValueError, match=r"big\.safetensors is not a Flux of the built-in small model"):
        load_transformer(path)
    path.write_bytes(b"\0" * 100)
    with pytest.raises(SafetensorError):
        fill(lambda: torch.nn.Linear(1, 1), path)


def test_installation_links_loadable_files_and_repairs(tmp_path: Path) -> None:
    models = tmp_path / "models"
    (models / "vae").mkdir(parents=True)
    (models / "vae" / "tinyflux_vae.safetensors").write_bytes(b"half a copy")
    install_models(models)
    install_models(models)
    found = {path.relative_to(models).as_posix() for path in models.rglob("*") if not path.is_dir()}
    assert found == set(INSTALLED_FILES)
    assert all(load_file(models / name) for name in INSTALLED_FILES)
    links = [path.lstat().st_ino for path in sorted(models.rglob("*.safetensors"))]
    install_models(models)
    assert links == [path.lstat().st_ino for path in sorted(models.rglob("*.safetensors"))]


def test_the_lora_says_what_it_is_for() -> None:
    with safe_open(TOK, "pt") as file:
        metadata = file.metadata()
    assert metadata == {
        "format": "pt",
        "fluxgate.base_model": "tinyflux",
        "fluxgate.family": "tinyflux",
        "fluxgate.trigger_word": "TOK",
    }


def test_weights_are_those_that_were_measured() -> None:
    sums = {name: hashlib.sha256(path.read_bytes()).hexdigest()[:16] for name, path in INSTALLED_FILES.items()}
    assert sums == {
        "diffusion_models/tinyflux.safetensors": "baa0e6fe1094f175",
        "loras/tok.safetensors": "9e18504c0a607ac0",
        "text_encoders/tinyflux_clip_l.safetensors": "4925fb4f5bdc730c",
        "text_encoders/tinyflux_t5.safetensors": "fcfa8b08a97c551e",
        "vae/tinyflux_vae.safetensors": "13a531267ba359fc",
    }
    assert sum(path.stat().st_size for path in INSTALLED_FILES.values()) < 12_000_000
