"""The shipped workflow's rendered graph is accepted as it is, for every base model and number of LoRAs.

Weights are not needed to be accepted: where a model file is missing the test writes a small one of that name and takes it away again.
"""

import json
import struct
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

import comfy_workflows
from comfy_workflows.catalog import Catalog
from comfy_workflows.render import LoraFile, render
from tests.contract.wire import Wire

FOLDERS = {"unet": "diffusion_models", "clip_l": "text_encoders", "t5": "text_encoders", "vae": "vae"}
LORAS = ("contract-first.safetensors", "contract-second.safetensors", "contract/third.safetensors")
CATALOG = Catalog.load(Path(comfy_workflows.__file__).parent)


def write_safetensors(path: Path) -> None:
    """A valid file with one small tensor: header length (u64, little-endian), header, bytes."""
    header = json.dumps({"nothing": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))


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
