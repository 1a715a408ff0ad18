"""What the server says about itself, its nodes and its models."""

import json
import struct
import uuid
from pathlib import Path
from typing import Any

import pytest

from tests.contract.conftest import StartEngine
from tests.contract.wire import Graph, Wire

RECORDED: dict[str, Any] = json.loads((Path(__file__).parents[1] / "data" / "comfyui" / "image_nodes.json").read_text())


def write_safetensors(path: Path, metadata: dict[str, str]) -> None:
    """A file with a header, one small tensor, and nothing else."""
    header = {"__metadata__": metadata, "x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))


def without_tooltips(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_tooltips(item) for key, item in value.items() if key != "tooltip"}
    return [without_tooltips(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize("class_type", RECORDED)
async def test_nodes_declare_what_was_recorded(wire: Wire, class_type: str) -> None:
    told = (await wire.get(f"/object_info/{class_type}")).body
    if not told:
        pytest.skip(f"the server lacks {class_type}: --base-directory hides ComfyUI's own custom_nodes")
    entry = without_tooltips(told[class_type])
    assert isinstance(entry.pop("display_name"), str)
    assert isinstance(entry.pop("description"), str)
    if class_type.startswith("LoadImage"):
        entry["input"]["required"]["image"][0] = []
    assert entry == RECORDED[class_type]


async def test_the_whole_catalogue_holds_each_node(wire: Wire) -> None:
    catalogue = (await wire.get("/object_info")).body
    assert RECORDED.keys() - {"SaveImageWebsocket"} <= catalogue.keys()
    assert catalogue["EmptyImage"] == (await wire.get("/object_info/EmptyImage")).body["EmptyImage"]
    assert (await wire.get("/object_info/NoSuchNode")).body == {}


async def test_model_folders_have_comfyui_names(wire: Wire) -> None:
    folders = (await wire.get("/models")).body
    assert {"checkpoints", "loras", "vae", "text_encoders", "diffusion_models", "controlnet", "embeddings"} <= set(folders)
    for folder in ("loras", "diffusion_models", "text_encoders", "vae"):
        assert isinstance((await wire.get(f"/models/{folder}")).body, list)
    assert (await wire.get("/models/unet")).status == 404
    assert (await wire.get("/models/nosuch")).status == 404


async def test_system_stats_have_the_recorded_shape(wire: Wire) -> None:
    stats = (await wire.get("/system_stats")).body
    assert stats["system"]["ram_total"] > stats["system"]["ram_free"] > 0
    assert stats["system"]["comfyui_version"].count(".") == 2
    assert isinstance(stats["system"]["argv"], list)
    for device in stats["devices"]:
        assert {"name", "type", "index", "vram_total", "vram_free", "torch_vram_total", "torch_vram_free"} == device.keys()


async def test_the_engine_says_that_it_is_the_small_model(start_engine: StartEngine, wire: Wire) -> None:
    stats = (await Wire(wire.http, start_engine().url).get("/system_stats")).body
    assert stats["system"]["fluxgate_engine"] == "built-in small model"
    assert stats["devices"][0]["type"] == "cpu"


async def test_lists_that_may_be_empty(wire: Wire) -> None:
    for path in ("/embeddings", "/extensions"):
        assert isinstance((await wire.get(path)).body, list)


async def test_a_new_lora_is_listed_at_once_and_gone_when_deleted(wire: Wire, models_directory: Path) -> None:
    name = f"contract/{uuid.uuid4().hex}/style.safetensors"
    path = models_directory / "loras" / name
    write_safetensors(path, {"format": "pt"})
    assert name in (await wire.get("/models/loras")).body
    assert path.name not in (await wire.get("/models/loras")).body
    path.unlink()
    assert name not in (await wire.get("/models/loras")).body


async def test_only_model_files_are_listed(wire: Wire, models_directory: Path) -> None:
    folder = f"contract/{uuid.uuid4().hex}"
    for file in ("half.tmp", "UPPER.SAFETENSORS", ".hidden.safetensors", "notes.txt"):
        write_safetensors(models_directory / "loras" / folder / file, {})
    listed = [name for name in (await wire.get("/models/loras")).body if name.startswith(folder)]
    assert sorted(listed) == [f"{folder}/.hidden.safetensors", f"{folder}/UPPER.SAFETENSORS"]


async def test_many_new_files_are_each_seen_by_the_next_request(wire: Wire, models_directory: Path) -> None:
    folder = f"contract/{uuid.uuid4().hex}"
    for number in range(50):
        write_safetensors(models_directory / "loras" / folder / f"{number}.safetensors", {})
        assert f"{folder}/{number}.safetensors" in (await wire.get("/models/loras")).body


async def test_the_header_of_a_lora_is_served_and_nothing_else(wire: Wire, models_directory: Path) -> None:
    name = f"contract/{uuid.uuid4().hex}.safetensors"
    write_safetensors(models_directory / "loras" / name, {"ss_network_dim": "4"})
    assert (await wire.get("/view_metadata/loras", filename=name)).body == {"ss_network_dim": "4"}
    assert (await wire.get("/view_metadata/loras", filename="absent.safetensors")).status == 404
    assert (await wire.get("/view_metadata/loras", filename="../loras/x.txt")).status == 404
    assert (await wire.get("/view_metadata/loras")).status == 404


def lora_graph(lora_name: str) -> Graph:
    """Loaders -> LoRA -> sampler -> picture; its other files do not exist, so that it is only ever validated."""
    sampler = {"seed": 0, "steps": 1, "cfg": 1, "sampler_name": "euler", "scheduler": "simple", "denoise": 1}
    text = {"class_type": "CLIPTextEncode", "inputs": {"text": "", "clip": ["2", 0]}}
    clip = {"clip_name1": "absent", "clip_name2": "absent", "type": "flux"}
    links = {"model": ["3", 0], "positive": ["4", 0], "negative": ["4", 0], "latent_image": ["5", 0]}
    return {
        "1": {"class_type": "UNETLoader", "inputs": {"unet_name": "absent", "weight_dtype": "default"}},
        "2": {"class_type": "DualCLIPLoader", "inputs": clip},
        "3": {"class_type": "LoraLoaderModelOnly", "inputs": {"model": ["1", 0], "lora_name": lora_name, "strength_model": 1}},
        "4": text,
        "5": {"class_type": "EmptySD3LatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
        "6": {"class_type": "KSampler", "inputs": {**sampler, **links}},
        "7": {"class_type": "VAELoader", "inputs": {"vae_name": "absent"}},
        "8": {"class_type": "VAEDecode", "inputs": {"samples": ["6", 0], "vae": ["7", 0]}},
        "9": {"class_type": "SaveImage", "inputs": {"images": ["8", 0], "filename_prefix": "absent"}},
    }


async def find_lora_error(wire: Wire, lora_name: str) -> str | None:
    answer = await wire.post("/prompt", {"prompt": lora_graph(lora_name)})
    assert answer.status == 400, answer.raw
    errors = answer.body["node_errors"]
    assert errors["1"]["errors"][0]["type"] == "value_not_in_list"
    return errors["3"]["errors"][0]["type"] if "3" in errors else None


async def test_a_lora_is_accepted_by_its_exact_name_while_it_is_there(wire: Wire, models_directory: Path) -> None:
    known = (await wire.get("/object_info")).body
    missing = {node["class_type"] for node in lora_graph("").values()} - known.keys()
    if missing:
        pytest.skip(f"the server lacks the Flux nodes {', '.join(sorted(missing))}")
    name = f"contract/{uuid.uuid4().hex}/style.safetensors"
    path = models_directory / "loras" / name
    assert await find_lora_error(wire, name) == "value_not_in_list"
    write_safetensors(path, {})
    assert name in (await wire.get("/object_info/LoraLoaderModelOnly")).body["LoraLoaderModelOnly"]["input"]["required"]["lora_name"][0]
    assert await find_lora_error(wire, name) is None
    assert await find_lora_error(wire, name.replace("/", "\\")) == "value_not_in_list"
    assert await find_lora_error(wire, path.name) == "value_not_in_list"
    path.unlink()
    assert await find_lora_error(wire, name) == "value_not_in_list"


async def test_the_engine_searches_further_model_folders(start_engine: StartEngine, wire: Wire, tmp_path: Path) -> None:
    write_safetensors(tmp_path / "more" / "loras" / "far.safetensors", {"a": "b"})
    client = Wire(wire.http, start_engine("--models", str(tmp_path / "more")).url)
    assert (await client.get("/models/loras")).body == ["far.safetensors"]
    assert (await client.get("/view_metadata/loras", filename="far.safetensors")).body == {"a": "b"}
