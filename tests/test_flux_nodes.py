"""The graph nodes of the small model: pictures, seeds, LoRAs, sizes, previews, interruption, and ComfyUI's own declarations."""

import hashlib
import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors import SafetensorError

from local.engine.flux_nodes import FLUX_NODES
from local.engine.nodes import Interrupted, describe_node
from tests.flux_bench import Bench

RED_ON_BLUE = "a red circle on a blue background"
CATALOGUE = json.loads((Path(__file__).parent / "data" / "tinyflux" / "object_info.json").read_text())
FILE_INPUTS = {"unet_name", "clip_name1", "clip_name2", "vae_name", "lora_name"}
PRINT_A_PICTURE = """
import sys, hashlib
from pathlib import Path
from tests.flux_bench import Bench
picture = Bench.build(Path(sys.argv[1])).paint('a red circle on a blue background', seed=5, steps=3)[0]
print(hashlib.sha256(picture.tobytes()).hexdigest())
"""


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench.build(tmp_path_factory.mktemp("engine"))


@pytest.fixture
def watched(bench: Bench) -> Bench:
    """The same folders with an empty record."""
    return Bench(bench.folders)


def colour(picture: Image.Image, box: tuple[float, float, float, float]) -> tuple[float, float, float]:
    """Median red, green, blue of a box given in shares of the sides."""
    width, height = picture.size
    left, top, right, bottom = box
    cut = picture.crop((int(left * width), int(top * height), int(right * width), int(bottom * height)))
    red, green, blue = np.median(np.asarray(cut, float).reshape(-1, 3), axis=0)
    return float(red), float(green), float(blue)


def is_red(rgb: tuple[float, float, float]) -> bool:
    return rgb[0] > 150 and rgb[1] < 100 and rgb[2] < 100


def is_blue(rgb: tuple[float, float, float]) -> bool:
    return rgb[2] > 150 and rgb[0] < 110 and rgb[1] < 150


@pytest.mark.parametrize("seed", [1, 2, 3, 4, 5, 6])
def test_a_red_circle_on_a_blue_background(bench: Bench, seed: int) -> None:
    picture = bench.paint(RED_ON_BLUE, seed)[0]
    assert is_red(colour(picture, (0.4, 0.4, 0.6, 0.6)))
    for corner in ((0.02, 0.02, 0.15, 0.15), (0.85, 0.85, 0.98, 0.98), (0.02, 0.85, 0.15, 0.98), (0.85, 0.02, 0.98, 0.15)):
        assert is_blue(colour(picture, corner))


def test_the_custom_sampler_paints_what_the_ksampler_paints(bench: Bench) -> None:
    model, positive = bench.model(), bench.run("FluxGuidance", conditioning=bench.text(RED_ON_BLUE), guidance=3.5)
    latent = bench.run(
        "SamplerCustomAdvanced",
        noise=bench.run("RandomNoise", noise_seed=5),
        guider=bench.run("BasicGuider", model=model, conditioning=positive),
        sampler=bench.run("KSamplerSelect", sampler_name="euler"),
        sigmas=bench.run("BasicScheduler", model=model, scheduler="simple", steps=3, denoise=1.0),
        latent_image=bench.run("EmptySD3LatentImage", width=128, height=128, batch_size=1),
    )
    assert bench.decode(latent)[0].tobytes() == bench.paint(RED_ON_BLUE, 5, steps=3)[0].tobytes()


def test_the_size_rule_changes_the_schedule_of_a_model(bench: Bench) -> None:
    shifted = bench.run("ModelSamplingFlux", model=bench.model(), max_shift=1.15, base_shift=0.5, width=256, height=256)
    assert bench.paint(RED_ON_BLUE, 5, 3, model=shifted)[0].tobytes() != bench.paint(RED_ON_BLUE, 5, 3)[0].tobytes()
    same = bench.run("ModelSamplingFlux", model=bench.model(), max_shift=1.15, base_shift=0.5, width=1024, height=1024)
    sigmas = [bench.run("BasicScheduler", model=m, scheduler="simple", steps=4, denoise=1.0) for m in (same, bench.model())]
    assert sigmas[0].tolist() == pytest.approx(sigmas[1].tolist())


def test_the_same_seed_gives_the_same_bytes_in_another_process(bench: Bench) -> None:
    command = [sys.executable, "-c", PRINT_A_PICTURE, str(bench.folders.base)]
    there = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent).stdout.strip()
    here = [hashlib.sha256(bench.paint(RED_ON_BLUE, seed, 3)[0].tobytes()).hexdigest() for seed in (5, 5, 6)]
    assert here[0] == here[1] == there
    assert here[2] != there


def test_a_picture_does_not_depend_on_its_batch(bench: Bench) -> None:
    four = [picture.tobytes() for picture in bench.paint(RED_ON_BLUE, 9, steps=3, batch=4)]
    assert len(set(four)) == 4
    for batch in (1, 2, 3):
        assert [picture.tobytes() for picture in bench.paint(RED_ON_BLUE, 9, steps=3, batch=batch)] == four[:batch]


def test_lora_strength(bench: Bench) -> None:
    prompt, seed = "TOK on a green background", 4
    plain = bench.paint(prompt, seed, 4)[0]
    assert bench.paint(prompt, seed, 4, model=bench.model(0.0))[0].tobytes() == plain.tobytes()
    full = bench.paint(prompt, seed, 4, model=bench.model(1.0))[0]
    assert np.abs(np.asarray(full, float) - np.asarray(plain, float)).mean() > 5
    stacked = bench.paint(prompt, seed, 4, model=bench.model(0.5, 0.25))[0]
    assert np.abs(np.asarray(stacked, int) - np.asarray(bench.paint(prompt, seed, 4, model=bench.model(0.75))[0], int)).max() <= 2


def test_unmatched_lora_keys_are_logged_and_broken_files_fail_at_the_loader(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    import torch
    from safetensors.torch import save_file

    loras = bench.folders.base / "models" / "loras"
    save_file({"foo.lora_A.weight": torch.zeros(1, 1)}, loras / "foreign.safetensors")
    (loras / "broken.safetensors").write_bytes(b"\xff" * 20)
    load: Callable[[str, float], Any] = lambda name, strength: bench.run(  # noqa: E731
        "LoraLoader", model=bench.model(), clip=None, lora_name=name, strength_model=strength, strength_clip=1.0
    )
    with caplog.at_level(logging.WARNING):
        load("foreign.safetensors", 1.0)
    assert "lora key not loaded: foo.lora_A.weight" in caplog.messages
    with pytest.raises(SafetensorError):
        load("broken.safetensors", 1.0)
    assert load("broken.safetensors", 0.0).loras == ()


@pytest.mark.parametrize("size", [(16, 16), (512, 512), (640, 384), (384, 640), (1024, 1024), (24, 2048)])
def test_pictures_have_exactly_the_asked_size(bench: Bench, size: tuple[int, int]) -> None:
    latent = bench.run("EmptySD3LatentImage", width=size[0], height=size[1], batch_size=2)
    pictures = bench.paint(RED_ON_BLUE, 1, steps=1, latent_image=latent)
    assert [picture.size for picture in pictures] == [size, size]
    assert {picture.mode for picture in pictures} == {"RGB"}


def test_negative_text_acts_only_with_cfg(bench: Bench) -> None:
    negative = bench.text("a blue background")
    plain = bench.paint(RED_ON_BLUE, 1, 6)[0]
    assert bench.paint(RED_ON_BLUE, 1, 6, negative=negative)[0].tobytes() == plain.tobytes()
    away = bench.paint(RED_ON_BLUE, 1, 6, negative=negative, cfg=2.0)[0]
    zeroed = bench.paint(RED_ON_BLUE, 1, 6, negative=bench.run("ConditioningZeroOut", conditioning=negative), cfg=2.0)[0]
    assert len({plain.tobytes(), away.tobytes(), zeroed.tobytes()}) == 3


def test_guidance_acts_and_defaults_to_three_and_a_half(bench: Bench) -> None:
    bare = bench.text(RED_ON_BLUE)
    usual = bench.paint(RED_ON_BLUE, 1, 3)[0]
    assert bench.paint(RED_ON_BLUE, 1, 3, positive=bare)[0].tobytes() == usual.tobytes()
    weak = bench.run("FluxGuidance", conditioning=bare, guidance=1.0)
    assert bench.paint(RED_ON_BLUE, 1, 3, positive=weak)[0].tobytes() != usual.tobytes()


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m", "ddim"])
@pytest.mark.parametrize("scheduler", ["simple", "normal", "sgm_uniform", "beta"])
def test_samplers_and_schedulers_paint_the_prompt(bench: Bench, sampler: str, scheduler: str) -> None:
    picture = bench.paint(RED_ON_BLUE, 1, steps=10, sampler_name=sampler, scheduler=scheduler)[0]
    assert is_red(colour(picture, (0.45, 0.45, 0.55, 0.55)))
    assert is_blue(colour(picture, (0.02, 0.02, 0.12, 0.12)))


def test_names_without_an_implementation_are_refused(bench: Bench) -> None:
    with pytest.raises(ValueError, match=r"'uni_pc' is not implemented .* euler"):
        bench.run("KSamplerSelect", sampler_name="uni_pc")
    with pytest.raises(ValueError, match=r"'linear_quadratic' is not implemented .* simple"):
        bench.paint(RED_ON_BLUE, 1, 1, scheduler="linear_quadratic")
    with pytest.raises(ValueError, match=r"'sdxl' is not implemented"):
        bench.run("DualCLIPLoader", clip_name1="a", clip_name2="b", type="sdxl")


def test_every_step_is_reported_with_a_preview_when_asked(watched: Bench) -> None:
    silent = watched.paint(RED_ON_BLUE, 1, steps=4, batch=2)[0]
    assert watched.steps == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert watched.pictures == [None] * 4
    watched.previews = True
    shown = watched.paint(RED_ON_BLUE, 1, steps=4)[0]
    last = watched.pictures[-1]
    assert last is not None
    assert last.size == (128, 128)
    assert last.tobytes() == shown.tobytes() == silent.tobytes()  # the last prediction is the picture
    assert is_red(colour(last, (0.45, 0.45, 0.55, 0.55)))


def test_an_interruption_stops_before_the_next_pass(watched: Bench) -> None:
    watched.stop_after = 2
    with pytest.raises(Interrupted):
        watched.paint(RED_ON_BLUE, 1, steps=50)
    assert watched.steps == [(1, 50), (2, 50)]


def test_a_picture_is_kept_by_weak_and_changed_by_strong_denoise(watched: Bench) -> None:
    original = watched.paint(RED_ON_BLUE, 1)[0].resize((259, 256))
    latent = watched.run("VAEEncode", pixels=[original], vae=watched.vae)
    assert watched.decode(latent)[0].size == (256, 256)  # 259 is cut to a multiple of 8, as ComfyUI does
    untouched = watched.decode(latent)[0]
    distances = []
    for denoise in (0.0, 0.3, 1.0):
        changed = watched.paint("a yellow star on a green background", 2, 10, latent_image=latent, denoise=denoise)[0]
        distances.append(np.abs(np.asarray(changed, float) - np.asarray(untouched, float)).mean())
    assert distances[0] == 0
    assert 0 < distances[1] < distances[2] / 2


def test_a_mask_confines_the_change(bench: Bench) -> None:
    latent = bench.run("VAEEncode", pixels=[bench.paint(RED_ON_BLUE, 1)[0]], vae=bench.vae)
    right_half = Image.new("L", (128, 128))
    right_half.paste(255, (64, 0, 128, 128))
    masked = bench.run("SetLatentNoiseMask", samples=latent, mask=[right_half])
    before = np.asarray(bench.decode(latent)[0], float)
    after = np.asarray(bench.paint("a green meadow", 2, 10, latent_image=masked)[0], float)
    change = np.abs(after - before).mean((0, 2))
    assert change[96:].mean() > 20
    assert change[:32].mean() < 2


def test_eight_bit_weights_change_the_picture_a_little(bench: Bench) -> None:
    rounded = bench.run("UNETLoader", unet_name="tinyflux.safetensors", weight_dtype="fp8_e4m3fn")
    picture = bench.paint(RED_ON_BLUE, 1, model=rounded)[0]
    assert picture.tobytes() != bench.paint(RED_ON_BLUE, 1)[0].tobytes()
    assert is_red(colour(picture, (0.45, 0.45, 0.55, 0.55)))


def test_two_encoders_of_one_kind_are_refused(bench: Bench) -> None:
    name = "tinyflux_t5.safetensors"
    with pytest.raises(ValueError, match="both T5"):
        bench.run("DualCLIPLoader", clip_name1=name, clip_name2=name, type="flux")


@pytest.mark.parametrize("name", CATALOGUE)
def test_declarations_equal_the_recorded_ones(bench: Bench, name: str) -> None:
    described = json.loads(json.dumps(describe_node(name, FLUX_NODES[name], bench.folders)))
    for declared in (described["input"], CATALOGUE[name]["input"]):
        for key in FILE_INPUTS & declared["required"].keys():
            declared["required"][key][0] = "the files of this machine"
    assert {key: described[key] for key in CATALOGUE[name]} == CATALOGUE[name]


def test_nodes_are_listed_without_torch() -> None:
    code = "import sys; import local.engine.flux_nodes; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)
