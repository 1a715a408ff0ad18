"""The official client of the Comfy API v2, unmodified: the examples of its README, sync and async, over two engines."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from comfy_sdk import (
    Comfy,
    OutputReady,
    Preview,
    Progress,
    StatusChange,
)
from PIL import Image

from local.child import pick_free_port
from local.services import Engine, S3Server
from tests.conftest import choose_engine_flags
from tests.deployment import describe_deployment, make_gateway, running

Graph = dict[str, Any]

RED = 0xFF0000
CYAN = (0, 255, 255)


def draw(color: int = RED, size: int = 32, prefix: str = "ComfyUI") -> Graph:
    """A picture of the negative of one colour."""
    return {
        "3": {"class_type": "EmptyImage", "inputs": {"width": size, "height": size, "batch_size": 1, "color": color}},
        "8": {"class_type": "ImageInvert", "inputs": {"image": ["3", 0]}},
        "9": {"class_type": "SaveImage", "inputs": {"images": ["8", 0], "filename_prefix": prefix}},
    }


def draw_slowly(steps: int, delay_ms: int = 20) -> Graph:
    graph = draw()
    graph["5"] = {"class_type": "SlowImage", "inputs": {"images": ["8", 0], "steps": steps, "delay_ms": delay_ms}}
    graph["9"]["inputs"]["images"] = ["5", 0]
    return graph


@pytest.fixture(scope="module")
def gateway_url(redis_server: str, s3_server: S3Server, engine: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A gateway over two engines."""
    with redis.Redis.from_url(redis_server) as connection:
        connection.flushall()
    folder = tmp_path_factory.mktemp("comfy")
    second = Engine(folder, pick_free_port(), flags=choose_engine_flags())
    with running(second):
        gateway = make_gateway(folder, describe_deployment(redis_server, s3_server, f"{engine},{second.url}"))
        with running(gateway):
            yield gateway.url


@pytest.fixture(autouse=True)
def _point_the_sdk_at_us(gateway_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMFY_BASE_URL", gateway_url)


@pytest.fixture
def client() -> Iterator[Comfy]:
    with Comfy() as client:
        yield client


def open_picture(body: bytes) -> Image.Image:
    return Image.open(io.BytesIO(body)).convert("RGB")


# -- the README, section by section ----------------------------------------------------------------------------


def test_a_graph_from_a_file_runs_and_its_output_is_saved(client: Comfy, tmp_path: Path) -> None:
    (tmp_path / "workflow_api.json").write_text(json.dumps(draw()))
    wf = client.workflows.from_file(tmp_path / "workflow_api.json")
    job = client.run(wf)
    for output in job.get_outputs("9"):
        output.to_file(tmp_path / output.name)
    assert open_picture((tmp_path / "ComfyUI_00001_.png").read_bytes()).getpixel((1, 1)) == CYAN


def test_a_graph_from_memory_runs(client: Comfy) -> None:
    wf = client.workflows.from_json(draw())
    wf.set_input("3", "width", 48)
    job = client.run(wf)
    output = job.get_outputs("9")[0]
    data = output.to_bytes()
    assert open_picture(data).size == (48, 32)
    assert (output.type, output.content_type, output.size_bytes, output.job_id) == ("image", "image/png", len(data), job.id)
    assert output.to_bytes(range=(0, 7)) == data[:8]
    stream = io.BytesIO()
    assert output.to_stream(stream) == len(data)
    assert stream.getvalue() == data
    assert output.get_download_url().url.startswith("http")


def test_events_tell_progress_previews_outputs_and_the_end(client: Comfy) -> None:
    job = client.submit(client.workflows.from_json(draw_slowly(steps=40)))
    seen: list[Any] = list(job.events())
    kinds = [type(event) for event in seen]
    assert seen[-1] == StatusChange("succeeded")
    assert kinds.index(OutputReady) < len(seen) - 1
    previews = [event for event in seen if isinstance(event, Preview)]
    assert previews
    assert previews[-1].to_pil().convert("RGB").getpixel((1, 1)) == pytest.approx(CYAN, abs=8)
    steps = [event for event in seen if isinstance(event, Progress) and event.step]
    assert (steps[-1].steps, steps[-1].current_node) == (40, "5")
    assert job.result().outputs[0].id == next(event.output.id for event in seen if isinstance(event, OutputReady))
