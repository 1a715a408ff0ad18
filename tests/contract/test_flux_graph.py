"""The shipped workflow's rendered graph is accepted as it is, for every base model and number of LoRAs.

Weights are not needed to be accepted: where a model file is missing the test writes a small one of that name and takes it away again.
"""

import io
import json
import struct
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

import comfy_workflows
from comfy_workflows.catalog import Catalog
from comfy_workflows.render import LoraFile, render
from gateway.comfy.client import ComfyClient, OutputFile
from gateway.errors import InstanceError
from gateway.jobs.model import new_input_file
from tests.contract.wire import Wire

FOLDERS = {"unet": "diffusion_models", "clip_l": "text_encoders", "t5": "text_encoders", "vae": "vae"}
LORAS = ("contract-first.safetensors", "contract-second.safetensors", "contract/third.safetensors")
CATALOG = Catalog.load(Path(comfy_workflows.__file__).parent)


def write_safetensors(path: Path) -> None:
    """A valid file with one small tensor: header length (u64, little-endian), header, bytes."""
    header = json.dumps({"nothing": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))


def draw_png() -> bytes:
    target = io.BytesIO()
    Image.new("RGB", (64, 64), "navy").save(target, "PNG")
    return target.getvalue()


@pytest.fixture
def stocked(models_directory: Path) -> Iterator[Path]:
    """The models folder with a file for every name that the base models and LoRAs of this test use."""
    wanted = [models_directory / FOLDERS[role] / file for model in CATALOG.base_models.values() for role, file in model.files.items()]
    written = [path for path in [*wanted, *(models_directory / "loras" / name for name in LORAS)] if not path.exists()]
    for path in written:
        write_safetensors(path)
    yield models_directory
    for path in written:
        path.unlink(missing_ok=True)
    folder = models_directory / "loras" / "contract"
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


@pytest.mark.parametrize("base_model", ["flux1-dev", "flux1-dev-fp8", "flux1-schnell"])
@pytest.mark.parametrize("count", [0, 1, 3])
async def test_accepts_the_flux_graph_unchanged(wire: Wire, stocked: Path, base_model: str, count: int) -> None:
    workflow = CATALOG.get("flux")
    wish = {"prompt": 'a "fox" {{7*7}} 🦊', "seed": 2**63 - 1, "loras": [{"name": name, "weight": 0.7} for name in LORAS[:count]]}
    filled = workflow.fill(wish, default_base_model=base_model, draw_seed=lambda: 0)
    files = [LoraFile(name=name, file=name, weight=0.7, family="flux1") for name in LORAS[:count]]
    graph = render(workflow, filled, job_id=f"contract-{uuid.uuid4().hex}", loras=files)
    answer = await wire.post("/prompt", {"prompt": graph, "client_id": uuid.uuid4().hex, "prompt_id": str(uuid.uuid4())})
    assert answer.status == 200, answer.body
    assert answer.body["node_errors"] == {}
    assert sum(node["class_type"] == "LoraLoaderModelOnly" for node in graph.values()) == count


@pytest.mark.parametrize(
    ("name", "base_model"), [("flux-img2img", "flux1-dev"), ("flux-fill", "flux1-dev"), ("flux-fill", "flux1-fill-dev")]
)
async def test_accepts_the_graphs_that_take_pictures(wire: Wire, stocked: Path, name: str, base_model: str) -> None:
    workflow = CATALOG.get(name)
    filled = workflow.fill({**workflow.example, "num_images": 2}, default_base_model=base_model, draw_seed=lambda: 0)
    files = {image.name: new_input_file() for image in workflow.images}
    client = ComfyClient(wire.base_url, wire.http)
    for file in files.values():
        await client.put_input(file, draw_png())
    lora = LoraFile(name=LORAS[0], file=LORAS[0], weight=0.7, family="flux1")
    graph = render(workflow, replace(filled, values=filled.values | files), job_id=f"contract-{uuid.uuid4().hex}", loras=[lora])
    answer = await wire.post("/prompt", {"prompt": graph, "client_id": uuid.uuid4().hex, "prompt_id": str(uuid.uuid4())})
    assert answer.status == 200, answer.body
    assert answer.body["node_errors"] == {}


async def test_refuses_a_picture_that_was_not_brought(wire: Wire, stocked: Path) -> None:
    workflow = CATALOG.get("flux-img2img")
    filled = workflow.fill(workflow.example, default_base_model="flux1-dev", draw_seed=lambda: 0)
    graph = render(workflow, replace(filled, values=filled.values | {"image": new_input_file()}), job_id="contract")
    answer = await wire.post("/prompt", {"prompt": graph, "client_id": uuid.uuid4().hex})
    assert answer.status == 400
    errors = [error["type"] for report in answer.body["node_errors"].values() for error in report["errors"]]
    assert errors == ["custom_validation_failed"]


async def test_an_input_gets_its_name_and_can_be_emptied(wire: Wire) -> None:
    client, file = ComfyClient(wire.base_url, wire.http), new_input_file()
    folder, _, name = file.rpartition("/")
    place = OutputFile(name, folder, "input")
    await client.put_input(file, draw_png())
    await client.put_input(file, draw_png())
    assert await client.view(place) == draw_png()
    with pytest.raises(InstanceError, match="instead of"):
        await client.put_input(file, b"another")
    await client.put_input(file, b"another", overwrite=True)
    assert await client.view(place) == b"another"
    await client.remove_input(file, companion=False)
    assert await client.view(place) == b""
    listed = (await wire.get("/object_info/LoadImage")).body["LoadImage"]["input"]["required"]["image"][0]
    assert not [known for known in listed if name in known]


async def test_refuses_the_flux_graph_with_a_lora_that_is_not_there(wire: Wire, stocked: Path) -> None:
    workflow = CATALOG.get("flux")
    wish = {"prompt": "a fox", "loras": [{"name": "absent", "weight": 1.0}]}
    filled = workflow.fill(wish, default_base_model="flux1-dev", draw_seed=lambda: 0)
    file = LoraFile(name="absent", file="absent.safetensors", weight=1.0, family="flux1")
    graph = render(workflow, filled, job_id="contract", loras=[file])
    answer = await wire.post("/prompt", {"prompt": graph, "client_id": uuid.uuid4().hex})
    assert answer.status == 400
    errors = [error["type"] for report in answer.body["node_errors"].values() for error in report["errors"]]
    assert errors == ["value_not_in_list"]
