"""The Colab notebook from its first cell to its last against a laptop deployment, and what its cells then show."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from nbclient import NotebookClient
from PIL import Image

from local.services import S3Server
from tests.journeys.studio import Studio, running_studio

# Its functions carry no types.
NBFORMAT: Any = import_module("nbformat")
ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "docker" / "colab" / "fluxgate_colab.ipynb"
CELL_TIMEOUT_S = 120
SIZE = 256
# A training that shows the way, not one that is good.
TRAINING = {"steps": 6, "rank": 4, "learning_rate": 0.003, "batch_size": 5, "resolution": 128, "sample_every": 3, "seed": 1}

Cell = Any


@pytest.fixture(scope="module")
def studio(redis_server: str, s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Studio]:
    with running_studio(redis_server, s3_server, tmp_path_factory.mktemp("studio"), TRAINER="tiny") as running:
        yield running


@pytest.fixture(scope="module")
def cells(studio: Studio) -> list[Cell]:
    """Its code cells, run in order, with their outputs."""
    settings = {"folder": str(ROOT), "picture": {"width": SIZE, "height": SIZE}, "training": TRAINING}
    notebook = NBFORMAT.read(NOTEBOOK, as_version=4)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("FLUXGATE_URL", str(studio.http.base_url).rstrip("/"))
        environment.setenv("FLUXGATE_NOTEBOOK", json.dumps(settings))
        environment.setenv("PYTHONPATH", str(ROOT))
        # A cell that raises ends it here, with its traceback.
        NotebookClient(notebook, timeout=CELL_TIMEOUT_S, kernel_name="python3").execute()
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def find_cell(cells: list[Cell], text: str) -> Cell:
    [found] = [cell for cell in cells if text in cell.source]
    return found


def read_text(cell: Cell) -> str:
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def read_pictures(cell: Cell) -> list[Image.Image]:
    shown = [output.data["image/png"] for output in cell.outputs if "image/png" in output.get("data", {})]
    return [Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB") for picture in shown]


def read_bars(cell: Cell) -> list[str]:
    return [output.data["text/html"] for output in cell.outputs if "<progress" in output.get("data", {}).get("text/html", "")]


def is_mostly(picture: Image.Image, place: tuple[int, int], channel: int) -> bool:
    """Whether that channel (0 red, 1 green, 2 blue) is the strongest there."""
    colour = picture.getpixel(place)
    assert isinstance(colour, tuple)
    return max(range(3), key=lambda index: colour[index]) == channel and colour[channel] > min(colour) + 40


def test_the_notebook_is_committed_without_outputs_and_begins_with_the_policy() -> None:
    notebook = json.loads(NOTEBOOK.read_text())
    NBFORMAT.validate(NBFORMAT.reads(NOTEBOOK.read_text(), as_version=4))
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not [cell["id"] for cell in code if cell["outputs"] or cell["execution_count"] is not None]
    assert "Colab's policy" in "".join(notebook["cells"][0]["source"]), "said before anything runs"


def test_a_picture_of_the_right_colours_is_shown_with_its_bar(cells: list[Cell]) -> None:
    cell = find_cell(cells, "a red circle on a blue background")
    [bar] = read_bars(cell)
    assert "100%" in bar
    assert "succeeded, seed 7" in bar
    [picture] = read_pictures(cell)
    assert picture.size == (SIZE, SIZE)
    assert is_mostly(picture, (SIZE // 2, SIZE // 2), 0), "a red circle"
    assert is_mostly(picture, (8, 8), 2), "on blue"


def test_an_upload_becomes_another_picture(cells: list[Cell]) -> None:
    [picture] = read_pictures(find_cell(cells, "flux-img2img"))
    assert picture.size == (SIZE, SIZE)
    assert is_mostly(picture, (SIZE // 2, SIZE // 2), 0), "still a red circle"


def test_a_training_shows_its_loss_and_its_samples(cells: list[Cell]) -> None:
    assert "10 files; ready to train" in read_text(find_cell(cells, "show_dataset(client"))
    cell = find_cell(cells, "watch_training(client")
    assert "succeeded" in read_bars(cell)[0]
    assert "step 6: TOK on a green background" in read_text(cell)
    curve, *samples = read_pictures(cell)
    assert curve.width > 2 * curve.height
    assert samples
    assert all(sample.width == sample.height for sample in samples)


def test_before_and_after_are_shown_and_the_lora_is_used(cells: list[Cell]) -> None:
    cell = find_cell(cells, "show_before_after(client")
    assert read_text(cell).splitlines() == ["without mytok", "with mytok"]
    before, after = read_pictures(cell)
    assert before.tobytes() != after.tobytes()
    [picture] = read_pictures(find_cell(cells, "Lora(name=training.lora"))
    assert is_mostly(picture, (8, 8), 1), "on green"


def test_models_loras_and_jobs_are_listed(cells: list[Cell]) -> None:
    listed = read_text(find_cell(cells, "for model in client.models():\n"))
    assert "tinyflux" in listed
    assert "mytok" in listed
    assert "succeeded a red circle" in read_text(find_cell(cells, "STOP = False"))
