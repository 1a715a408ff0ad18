"""The official client of the Comfy API v2, unmodified: the examples of its README, sync and async, over two engines."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis
from comfy_sdk import (
    AsyncComfy,
    Comfy,
    InvalidWorkflow,
    JobFailed,
    MissingAsset,
    NotFound,
    OutputReady,
    Preview,
    Progress,
    StatusChange,
    WorkflowFormatUi,
)
from comfy_sdk.exceptions import ComfyError, IdempotencyKeyReuse
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


def invert_photo() -> Graph:
    return {
        "10": {"class_type": "LoadImage", "inputs": {"image": "photo.png"}},
        "8": {"class_type": "ImageInvert", "inputs": {"image": ["10", 0]}},
        "9": {"class_type": "SaveImage", "inputs": {"images": ["8", 0], "filename_prefix": "ComfyUI"}},
    }


def paint(color: tuple[int, int, int] = (255, 0, 0)) -> bytes:
    target = io.BytesIO()
    Image.new("RGB", (64, 64), color).save(target, "PNG")
    return target.getvalue()


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


def test_getting_started(client: Comfy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("workflow_api.json").write_text(json.dumps(invert_photo()))
    Path("photo.png").write_bytes(paint())
    wf = client.workflows.from_file("workflow_api.json")
    asset = client.assets.from_file("photo.png")
    wf.set_input("10", "image", asset)
    job = client.run(wf)
    for output in job.get_outputs("9"):
        output.to_file(output.name)
    assert open_picture(Path("ComfyUI_00001_.png").read_bytes()).getpixel((1, 1)) == CYAN


def test_a_picture_is_named_as_it_was_uploaded_and_an_output_is_an_input(client: Comfy) -> None:
    client.assets.from_bytes(paint((0, 0, 255)), filename="blue.png").commit()
    graph = invert_photo()
    graph["10"]["inputs"]["image"] = "blue.png"
    [yellow] = client.run(client.workflows.from_json(graph)).outputs
    assert open_picture(yellow.to_bytes()).getpixel((1, 1)) == (255, 255, 0)
    graph["10"]["inputs"]["image"] = {"__type": "core/ASSET", "info": {"id": yellow.id}}
    [blue] = client.run(client.workflows.from_json(graph)).outputs
    assert open_picture(blue.to_bytes()).getpixel((1, 1)) == (0, 0, 255)


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


def test_a_job_is_found_again_by_its_id_with_its_graph_and_labels(client: Comfy) -> None:
    job = client.submit(client.workflows.from_json(draw()), metadata={"client": "acme", "batch": "2026-10-05"}, api_key="comfyui-secret")
    again = client.jobs.get(job.id).wait(timeout=60)
    assert (again.status, again.metadata) == ("succeeded", {"client": "acme", "batch": "2026-10-05"})
    wf = again.get_workflow()
    assert (wf.format, wf.graph["8"]) == ("api", draw()["8"])
    assert "comfyui-secret" not in json.dumps(wf.graph)
    other = client.submit(client.workflows.from_json(draw()), metadata={"client": "other"})
    assert [summary.id for summary in client.list_jobs(metadata={"client": "acme"}, limit=1)] == [job.id]
    assert [summary.id for summary in client.list_jobs(limit=1)][:2] == [other.id, job.id]
    other.wait(timeout=60)


def test_cancel_stops_what_runs_and_leaves_what_has_ended(client: Comfy) -> None:
    job = client.submit(client.workflows.from_json(draw_slowly(steps=2000)))
    for event in job.events():
        if isinstance(event, Progress) and event.step:
            assert job.cancel().status in ("canceling", "canceled")
    assert job.wait(timeout=60).status == "canceled"
    assert (job.cancel().status, job.outputs) == ("canceled", [])
    with pytest.raises(JobFailed):
        job.result()


def test_the_same_idempotency_key_replays(client: Comfy) -> None:
    wf = client.workflows.from_json(draw())
    first = client.submit(wf, idempotency_key="key-1")
    assert client.submit(wf, idempotency_key="key-1").id == first.id
    with pytest.raises(IdempotencyKeyReuse):
        client.submit(client.workflows.from_json(draw(color=1)), idempotency_key="key-1")
    first.wait(timeout=60)


async def test_the_async_client_runs_streams_and_saves(tmp_path: Path) -> None:
    (tmp_path / "workflow_api.json").write_text(json.dumps(draw()))
    async with AsyncComfy() as client:
        wf = client.workflows.from_file(tmp_path / "workflow_api.json")
        job = await client.run(wf)
        await job.outputs[0].to_file(tmp_path / "out.png")
        with open(tmp_path / "out.bin", "wb") as stream:  # noqa: ASYNC230  the README's own line
            await job.outputs[0].to_stream(stream)
        slow = await client.submit(client.workflows.from_json(draw_slowly(steps=20)))
        events = [event async for event in slow.events()]
    assert (tmp_path / "out.png").read_bytes() == (tmp_path / "out.bin").read_bytes()
    assert {type(event) for event in events} == {StatusChange, Progress, Preview, OutputReady}
    assert events[-1] == StatusChange("succeeded")


async def test_many_jobs_over_two_engines_end_well_under_fifty_streams(gateway_url: str) -> None:
    async with AsyncComfy(timeout=60) as client:
        jobs = [await client.submit(client.workflows.from_json(draw_slowly(steps=4, delay_ms=10))) for _ in range(50)]

        async def follow(job: Any) -> tuple[str, int]:
            events = [event async for event in job.events()]
            return events[-1].status, sum(isinstance(event, OutputReady) for event in events)

        told = await asyncio.gather(*map(follow, jobs))
    assert told == [("succeeded", 1)] * 50
    async with httpx.AsyncClient(base_url=gateway_url) as http:
        listed = (await http.get("/v1/generations", params={"workflow": "raw", "limit": 50})).json()["data"]
    assert len({job["instance"] for job in listed}) == 2


def test_what_is_only_previewed_is_an_output_too(client: Comfy) -> None:
    graph = draw()
    graph["9"] = {"class_type": "PreviewImage", "inputs": {"images": ["8", 0]}}
    for _ in range(2):
        # ComfyUI answers the second from its cache, with the same file.
        [output] = client.run(client.workflows.from_json(graph)).get_outputs("9")
        assert open_picture(output.to_bytes()).getpixel((1, 1)) == CYAN


def test_errors_are_those_the_sdk_knows(client: Comfy) -> None:
    def submit(graph: Graph, **more: Any) -> Any:
        return client.submit(client.workflows.from_json(graph), **more)

    with pytest.raises(WorkflowFormatUi):
        submit({"nodes": [], "links": [], "last_node_id": 0})
    with pytest.raises(InvalidWorkflow) as caught:
        submit({**draw(), "8": {"class_type": "LoadLatent", "inputs": {"latent": "../../etc/passwd"}}})
    assert caught.value.details is not None
    assert caught.value.details["node_errors"]["8"][0]["reason"] == "class_not_allowed"
    with pytest.raises(InvalidWorkflow):
        submit({**draw(), "8": {"class_type": "Canny", "inputs": {"image": ["3", 0]}}})  # allowed, but on neither engine
    with pytest.raises(MissingAsset):
        submit({**invert_photo(), "10": {"class_type": "LoadImage", "inputs": {"image": {"__type": "core/ASSET", "info": {"id": "x"}}}}})
    with pytest.raises(InvalidWorkflow):
        submit({**invert_photo(), "10": {"class_type": "LoadImage", "inputs": {"image": "nowhere.png"}}})  # no upload, no choice
    with pytest.raises(ComfyError) as labels:
        submit(draw(), metadata={"a b": "c"})
    assert labels.value.code == "metadata_invalid"
    for absent in (lambda: client.jobs.get("gen_0"), lambda: client.assets.get("gen_0.0"), lambda: client.assets.delete("nobody")):
        with pytest.raises(NotFound):
            absent()
    failed = submit({**draw(), "8": {"class_type": "FailingImage", "inputs": {"images": ["3", 0], "kind": "error"}}})
    with pytest.raises(JobFailed) as ended:
        failed.result()
    error = ended.value.error
    assert error is not None
    assert (error.code, error.node_id, error.class_type) == ("node_execution_error", "8", "FailingImage")
    assert "/srv" not in error.message


def test_an_asset_is_uploaded_once_found_by_its_hash_and_deleted(client: Comfy, tmp_path: Path) -> None:
    content = paint((10, 20, 30))
    (tmp_path / "photo.png").write_bytes(content)
    asset = client.assets.from_file(tmp_path / "photo.png")
    asset.commit()
    again = client.assets.from_bytes(content, filename="photo.png")
    again.commit()
    assert (asset.created_new, again.created_new, again.id) == (True, False, asset.id)
    other = client.assets.from_bytes(content, filename="other.png")
    assert other.commit() != asset.id
    assert httpx.get(asset.get_download_url().url).content == content
    assert client.assets.get(asset.id or "").hash == asset.hash
    asset.delete()
    with pytest.raises(NotFound):
        client.assets.get(again.id or "")
    assert client.assets.get(other.id or "").expires_at is not None


DEEP = b"[" * 50_000 + b"]" * 50_000


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        pytest.param(b"", 422, "invalid_parameter", id="nothing"),
        pytest.param(b"\x00", 400, "invalid_json", id="no JSON"),
        pytest.param(b"[]", 422, "invalid_parameter", id="a list"),
        pytest.param(b"{}", 422, "invalid_workflow", id="no workflow"),
        pytest.param(b'{"workflow": {"1": ' + DEEP + b"}}", 400, "invalid_json", id="deep"),
        pytest.param(
            b'{"workflow": {"1": {"class_type": "X", "inputs": {"a": ' + DEEP[:60] + b"0" + DEEP[-60:] + b"}}}}", 422, None, id="less deep"
        ),
        pytest.param(b'{"workflow": {"\\ud800": {"class_type": "X", "inputs": {}}}}', 422, "invalid_workflow", id="a surrogate"),
        pytest.param(b'{"workflow": {}, "webhook_url": "http://169.254.169.254/"}', 422, "invalid_parameter", id="a field of the future"),
        pytest.param(b'{"workflow": {}, "extra_data": {"auth_token_comfy_org": "x"}}', 422, "invalid_parameter", id="other extra data"),
        pytest.param(b'{"workflow": {}, "metadata": {"a": {"b": "c"}}}', 422, "metadata_invalid", id="labels that are none"),
        pytest.param(b'{"workflow": {}, "metadata": {"a": "\\u202e"}}', 422, "metadata_invalid", id="a label that turns the writing"),
        pytest.param(b'{"workflow": {"1": "' + b"x" * (1 << 20) + b'"}}', 413, "payload_too_large", id="large"),
    ],
)
def test_a_hostile_body_is_refused(gateway_url: str, body: bytes, status: int, code: str | None) -> None:
    for headers in ({}, {"Idempotency-Key": "hostile"}):
        answer = httpx.post(f"{gateway_url}/api/v2/jobs", content=body, headers={"Content-Type": "application/json", **headers})
        assert answer.status_code == status, answer.text
        assert answer.json()["error"]["code"] == (code or answer.json()["error"]["code"])
        assert len(answer.content) < 10_000
