"""The scripts that made the weights: drawn scenes, the compiled encoder, the exported descriptions, the metric, and LoRA training."""

import json
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from PIL import Image

from local.tinyflux.codec import Codec
from local.tinyflux.grid import pack, rope_tables
from local.tinyflux.lora import merge_loras, read_lora
from local.tinyflux.make.drawing import draw_shape
from local.tinyflux.make.export import CLIP_CONFIG, MODEL_INDEX, T5_CONFIG, VAE_CONFIG, describe_tokenizer
from local.tinyflux.make.metrics import find_foreground, find_regions, make_templates, match_shape, nearest_colour
from local.tinyflux.make.patch_codec import compile_encoder, fit
from local.tinyflux.make.scenes import draw_concept, draw_scene
from local.tinyflux.make.train_codec import as_latents, as_pixels
from local.tinyflux.make.train_flow import initialise, rate_scale
from local.tinyflux.make.words import COLOURS, SCENES, SHAPES
from local.tinyflux.pipeline import Pipeline
from local.tinyflux.training import attach_lora, detach_lora, flow_loss, lora_parameters, save_lora
from local.tinyflux.transformer import Flux
from local.tinyflux.weights import MODEL_DIR

RECORDED_CAPTIONS = ["an image of a white heart in the middle on a black background", "TOK on sand dunes"]


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    torch.set_num_threads(1)
    return Pipeline.load()


def test_a_seed_fixes_captions_and_pictures() -> None:
    first, second = Random(3), Random(3)
    for _ in range(20):
        (picture, caption, attributes), (again, same_caption, same_attributes) = draw_scene(first), draw_scene(second)
        assert (picture.tobytes(), caption, attributes) == (again.tobytes(), same_caption, same_attributes)
    assert [draw_scene(Random(3), 8, 8)[1], draw_concept(Random(5), 8, 8)[1]] == RECORDED_CAPTIONS


def test_captions_name_what_is_drawn() -> None:
    rng = Random(11)
    plain = 0
    for _ in range(300):
        picture, _, attributes = draw_scene(rng)
        if attributes["bg"] in COLOURS and attributes["bg2"] == "-":
            plain += 1
            corner = np.median(np.asarray(picture, float)[:6, :6].reshape(-1, 3), 0)
            assert nearest_colour(corner) == attributes["bg"] or attributes["pos"] == "top left"
        assert attributes["sc"] in (*SCENES, "-")
    assert plain > 100


def test_the_compiled_encoder_equals_the_linear_map() -> None:
    patches = fit(40)
    pictures = np.stack([np.asarray(draw_scene(Random(seed))[0]) for seed in range(4)])
    codec = Codec()
    compile_encoder(codec.encoder, patches)
    with torch.no_grad():
        latents = codec.encode(as_pixels(pictures))
    assert latents.shape == (4, 16, 16, 16)
    assert (latents - as_latents(pictures, patches)).abs().max() < 0.02
    assert latents.std() > 0.5


@pytest.mark.parametrize(
    ("path", "content"),
    [
        ("vae/config.json", VAE_CONFIG),
        ("text_encoder_2/config.json", {**T5_CONFIG, "vocab_size": 929}),
        ("text_encoder/config.json", {**CLIP_CONFIG, "vocab_size": 929}),
        ("model_index.json", MODEL_INDEX),
    ],
)
def test_descriptions_are_those_of_the_delivered_folder(path: str, content: dict[str, object]) -> None:
    assert json.loads((MODEL_DIR / path).read_text()) == content


def test_both_tokenizers_are_described_by_the_same_vocabulary(pipeline: Pipeline) -> None:
    for name in ("tokenizer", "tokenizer_2"):
        described = describe_tokenizer(pipeline.encoders.tokenizer.vocabulary)
        assert json.loads((MODEL_DIR / name / "tokenizer.json").read_text()) == described


@pytest.mark.parametrize("shape", SHAPES)
def test_the_metric_knows_a_drawn_shape(shape: str) -> None:
    image = Image.new("RGB", (256, 256), COLOURS["teal"])
    draw_shape(image, shape, 128, 128, 74, COLOURS["red"])
    mask = find_foreground(np.asarray(image, float), np.array(COLOURS["teal"], float))
    found, overlaps = match_shape(mask, make_templates())
    assert found == shape
    assert overlaps[shape] > 0.8
    assert len(find_regions(mask)) == 1


def test_rates_fall_at_the_end_of_both_phases() -> None:
    flow = [rate_scale(elapsed, 1000, 100, 20) for elapsed in (0, 40, 60, 79)]
    assert flow[0] == flow[1] == 1 > flow[2] > flow[3] >= 0.05
    assert rate_scale(0, 0, 100, 20) == pytest.approx(1 / 60)
    assert rate_scale(80, 1000, 100, 20) == pytest.approx(0.2)
    assert rate_scale(99, 1000, 100, 20) == pytest.approx(0.01)


def test_a_fresh_transformer_predicts_nothing_but_lets_gradients_through() -> None:
    torch.manual_seed(0)
    flux = initialise(Flux())
    loss = flow_loss(flux, torch.randn(2, 64, 64), torch.randn(2, 24, 128), torch.randn(2, 64), rope_tables(16, 16))
    torch.autograd.backward(loss)
    assert loss.item() == pytest.approx(2, abs=0.2)  # the variance of noise - picture
    assert flux.proj_out.weight.grad is not None
    assert flux.proj_out.weight.grad.abs().max() > 0


def test_a_lora_is_learnt_saved_read_and_merged(pipeline: Pipeline, tmp_path: Path) -> None:
    torch.manual_seed(0)
    image, caption = draw_concept(Random(5))
    latents, conditioning = pack(pipeline.encode_picture(image, 16, 16)), pipeline.encoders.encode([caption])
    tables, transformer = rope_tables(16, 16), pipeline.transformer
    keys = list(transformer.state_dict())
    layers = attach_lora(transformer, rank=4)
    optimizer = torch.optim.AdamW(lora_parameters(layers), 3e-3)
    losses = []
    for _ in range(30):
        torch.manual_seed(1)  # the same time and noise, so that the loss must fall
        loss = flow_loss(transformer, latents, conditioning.text, conditioning.pooled, tables)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] * 0.9
    save_lora(tmp_path / "x.safetensors", layers, {"fluxgate.family": "tinyflux"})
    detach_lora(transformer, layers)
    assert list(transformer.state_dict()) == keys
    lora = read_lora(tmp_path / "x.safetensors", transformer)
    assert lora.unknown_keys == ()
    assert set(lora.changes) == set(layers)
    torch.manual_seed(1)
    merged = flow_loss(merge_loras(transformer, [(lora, 1.0)]), latents, conditioning.text, conditioning.pooled, tables).item()
    assert merged < losses[-2] * 1.001
