"""Accepted LoRA files in a real ComfyUI: it patches as many layers as the report says, and leaves no key unloaded.

COMFYUI_PYTHON and COMFYUI_PATH name an installed one, whose own loader is called (minutes of arithmetic on a CPU).
COMFYUI_URL with COMFYUI_MODELS_DIR names a running one, whose log is read.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.contract.wire import Graph, Wire
from tests.lora_files import DIFFUSERS, GOOD, make_pairs, write_file, write_raw
from trainer_worker.lora import inspect_lora
from trainer_worker.lora_flux import FLUX1, TINYFLUX, Family, map_bfl_layers, map_diffusers_layers
from trainer_worker.lora_publish import publish_lora

ROOT = Path(__file__).parents[2]
LOADER = Path(__file__).parent / "comfyui_lora_loader.py"
NOT_LOADED = "lora key not loaded"
Loaded = list[dict[str, Any]]


def load_in_comfyui(files: list[Path], family: Family = FLUX1) -> Loaded:
    """ComfyUI's own loader on a Flux of the family's whole depth: layers patched, weights changed, lines logged, for each file."""
    if not {"COMFYUI_PYTHON", "COMFYUI_PATH"} <= os.environ.keys():
        pytest.skip("COMFYUI_PYTHON and COMFYUI_PATH name no installed ComfyUI")
    size = (str(family.hidden), str(family.double_blocks), str(family.single_blocks))
    command = [os.environ["COMFYUI_PYTHON"], str(LOADER), os.environ["COMFYUI_PATH"], *size, *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    loaded: Loaded = json.loads(done.stdout.splitlines()[-1])
    return loaded


def publish_all(folder: Path) -> tuple[list[Path], list[Path]]:
    """(the good files as they came, as they were published)"""
    sources, published = [], []
    for number, good in enumerate(GOOD):
        (folder / str(number)).mkdir()
        sources.append(good.write(folder / str(number)))
        published.append(publish_lora(sources[-1], folder, f"n{number}", metadata={"trigger_word": "TOK"}).path)
    return sources, published


def test_comfyui_patches_every_layer_that_is_reported(tmp_path: Path) -> None:
    sources, published = publish_all(tmp_path)
    loaded = load_in_comfyui(sources + published)
    before, after = loaded[: len(GOOD)], loaded[len(GOOD) :]
    for good, path, came, went in zip(GOOD, published, before, after, strict=True):
        report = inspect_lora(path)
        assert went == {"patched": report.coverage.patched, "changed": good.layers, "log": []}, good.title
        assert came["patched"] == good.before, f"{good.title}: what ComfyUI makes of it unconverted has changed"
        ignored = [line for line in came["log"] if line.startswith(NOT_LOADED)]
        assert bool(ignored) == (good.converts or good.left_out > 0), good.title


@pytest.mark.parametrize("family", [FLUX1, TINYFLUX], ids=lambda family: family.name)
def test_comfyui_knows_every_layer_of_the_map(family: Family, tmp_path: Path) -> None:
    """All layers at once, in both vocabularies: ComfyUI knows every name of the map, and every shape fits."""
    sides = [("transformer.", map_diffusers_layers(family)), ("diffusion_model.", map_bfl_layers(family))]
    files = [
        write_file(tmp_path / f"{number}.safetensors", make_thin_pairs(layers, prefix)) for number, (prefix, layers) in enumerate(sides)
    ]
    for (_, layers), loaded in zip(sides, load_in_comfyui(files, family), strict=True):
        early = [layer for layer in layers if not re.search(r"_blocks\.[1-9]", layer)]
        assert loaded == {"patched": len(layers), "changed": len(early), "log": []}


def make_thin_pairs(layers: dict[str, tuple[int, int]], prefix: str) -> dict[str, tuple[str, list[int], bytes]]:
    """Rank 1 and a single number everywhere: a file of every layer in a few MB."""
    pairs = {}
    for layer, (outputs, inputs) in layers.items():
        pairs[f"{prefix}{layer}.lora_A.weight"] = ("BF16", [1, inputs], b"\x80\x3f" * inputs)
        pairs[f"{prefix}{layer}.lora_B.weight"] = ("BF16", [outputs, 1], b"\x80\x3f" * outputs)
    return pairs


# -- a running ComfyUI -----------------------------------------------------------------------------------------


@pytest.fixture
def models() -> Path:
    if not {"COMFYUI_URL", "COMFYUI_MODELS_DIR"} <= os.environ.keys():
        pytest.skip("COMFYUI_URL and COMFYUI_MODELS_DIR name no running ComfyUI whose models folder can be written to")
    return Path(os.environ["COMFYUI_MODELS_DIR"])


@pytest.fixture
def unet(models: Path) -> Iterator[str]:
    """A Flux of one block of each kind, all zeros: 1.1 GB of holes, which take no disk."""
    shapes: dict[str, tuple[int, ...]] = {}
    for layer, (outputs, inputs) in map_bfl_layers(Family("small", 3072, 1, 1, 4096, 768, takes_bfl=True, adapters=frozenset())).items():
        shapes |= {f"{layer}.weight": (outputs, inputs), f"{layer}.bias": (outputs,)}
    norms = [f"double_blocks.0.{side}_attn.norm" for side in ("img", "txt")] + ["single_blocks.0.norm"]
    shapes |= {f"{norm}.{part}_norm.scale": (128,) for norm in norms for part in ("query", "key")}
    header: dict[str, object] = {}
    start = 0
    for key, shape in shapes.items():
        end = start + 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[key] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
        start = end
    (models / "diffusion_models").mkdir(exist_ok=True)
    path = write_raw(models / "diffusion_models" / f"contract-{uuid.uuid4().hex}.safetensors", header)
    with path.open("r+b") as stream:
        stream.truncate(path.stat().st_size + start)
    yield path.name
    path.unlink()


async def load_in_graph(wire: Wire, unet: str, names: list[str]) -> str:
    """What ComfyUI logs while a graph loads the model and the LoRAs one after the other."""
    graph: Graph = {"1": {"class_type": "UNETLoader", "inputs": {"unet_name": unet, "weight_dtype": "default"}}}
    for number, name in enumerate(names, 2):
        inputs = {"model": [str(number - 1), 0], "lora_name": name, "strength_model": 1.0}
        graph[str(number)] = {"class_type": "LoraLoaderModelOnly", "inputs": inputs}
    graph["99"] = {"class_type": "PreviewAny", "inputs": {"source": [str(len(names) + 1), 0]}}
    before = await read_log(wire)
    prompt_id, _ = await wire.run(graph)
    assert (await wire.history_of(prompt_id))["status"]["status_str"] == "success"
    seen = {entry["t"] for entry in before}
    return "".join(entry["m"] for entry in await read_log(wire) if entry["t"] not in seen)


async def read_log(wire: Wire) -> list[dict[str, str]]:
    """The last lines of its log, each with the time it was written."""
    entries: list[dict[str, str]] = (await wire.get("/internal/logs/raw")).body["entries"]
    return entries


async def test_a_running_comfyui_leaves_no_key_unloaded(wire: Wire, models: Path, unet: str, tmp_path: Path) -> None:
    _, published = publish_all(tmp_path)
    placed = []
    try:
        for path in published:
            placed.append(models / "loras" / f"contract-{uuid.uuid4().hex}-{path.name}")
            path.rename(placed[-1])
        log = await load_in_graph(wire, unet, [path.name for path in placed])
        assert NOT_LOADED not in log
        assert "NOT LOADED" not in log
        assert "ERROR" not in log
        # The same reading does find the lines of a file that was not converted.
        ignored = write_file(models / "loras" / f"contract-{uuid.uuid4().hex}.safetensors", make_pairs(DIFFUSERS, "unet."))
        placed.append(ignored)
        log = await load_in_graph(wire, unet, [ignored.name])
        assert log.count(NOT_LOADED) == 2 * len(DIFFUSERS)
    finally:
        for path in placed:
            path.unlink()
