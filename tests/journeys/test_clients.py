"""Both Python clients against a real gateway: what the README shows, answers that get lost, and tunnels that hold streams back."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from PIL import Image

from fluxgate import ApiError, Client, Event, Job, Lora
from fluxgate.asking import Ask
from fluxgate.following import Following
from fluxgate.tunnel import find_way, is_live
from local.services import Gateway, S3Server
from tests.deployment import describe_deployment, make_gateway, running
from tests.either_client import KINDS, opened
from tests.holding_proxy import proxied
from tests.journeys.api import wait_until

SMALL = {"width": 256, "height": 256, "steps": 3, "seed": 7}
SLOW = {"workflow": "slow", "steps": 30, "delay_ms": 50}


@pytest.fixture(scope="module")
def gateway(redis_server: str, s3_server: S3Server, engine: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with redis.Redis.from_url(redis_server) as connection:
        connection.flushall()
    gateway = make_gateway(tmp_path_factory.mktemp("gateway"), describe_deployment(redis_server, s3_server, engine))
    with running(gateway):
        yield gateway


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def client(kind: str, gateway: Gateway) -> Iterator[Any]:
    with opened(kind, gateway.url) as client:
        yield client


def open_picture(body: bytes) -> Image.Image:
    return Image.open(io.BytesIO(body)).convert("RGB")


def test_a_picture_is_asked_for_watched_and_read(kind: str, client: Any) -> None:
    # A seed of its own: what the engine remembers it makes without previews.
    asked = {**SMALL, "seed": KINDS.index(kind) + 100}
    job = client.generate("a red circle on a blue background", loras=[Lora(name="tok", weight=0.5)], **asked)
    events: list[Event] = list(client.stream(job.id, previews=True))
    assert {"status", "progress", "preview", "output"} <= {event.kind for event in events}
    done: Job = client.wait(job.id)
    assert (done.status, done.seed, [lora.name for lora in done.loras]) == ("succeeded", asked["seed"], ["tok"])
    assert open_picture(client.download(done.outputs[0])).size == (256, 256)
    assert client.jobs(limit=1).data[0].id == job.id
    assert "class_type" in str(client.graph(job.id))
    client.delete(job.id)
    with pytest.raises(ApiError) as caught:
        client.get(job.id)
    assert caught.value.code == "job_not_found"


def test_a_picture_goes_in_and_comes_out_changed(client: Any, tmp_path: Path) -> None:
    file = tmp_path / "blue.png"
    Image.new("RGB", (256, 256), "#2040c0").save(file)
    upload = client.upload(file)
    assert (upload.status, upload.name, upload.width) == ("ready", "blue.png", 256)
    assert upload.id in [one.id for one in client.uploads().data]
    job = client.generate("a red circle on a blue background", workflow="flux-img2img", image=upload.id, strength=0.5, steps=3, seed=1)
    done = client.wait(job.id)
    assert done.status == "succeeded", done.error
    made = open_picture(client.download(done.outputs[0]))
    assert made.size == (256, 256)
    assert made.tobytes() != open_picture(file.read_bytes()).tobytes()
    client.delete_upload(upload.id)


def test_a_large_file_goes_straight_to_s3(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fluxgate.calls.file.LARGEST_THROUGH_GATEWAY", 10)
    body = io.BytesIO()
    Image.new("RGB", (128, 128), "#c02040").save(body, "PNG")
    upload = client.upload(("red.png", body.getvalue()))
    assert upload.status == "pending"
    done = client.wait(client.generate("a red circle", workflow="flux-img2img", image=upload.id, steps=1).id)
    assert done.status == "succeeded", done.error


def test_a_running_job_is_cancelled(client: Any) -> None:
    job = client.generate(**SLOW)
    assert client.cancel(job.id).status in ("canceling", "canceled")
    assert client.wait(job.id).status == "canceled"


def test_a_batch_is_made_read_and_stopped(client: Any) -> None:
    batch = client.create_batch(workflow="trivial", parameters={"size": 32}, sweep={"color": [1, 2, 3]}, metadata={"for": "us"})
    assert (batch.total, batch.metadata) == (3, {"for": "us"})
    assert [item.index for item in client.batch_items(batch.id)] == [0, 1, 2]
    assert batch.id in [one.id for one in client.batches().data]
    client.cancel_batch(batch.id)
    assert sum(client.get_batch(batch.id).counts.values()) == 3


def test_what_there_is_is_listed(client: Any) -> None:
    assert {"flux", "flux-img2img"} <= {one.name for one in client.workflows()}
    assert "prompt" in client.get_workflow("flux").parameters["properties"]
    assert [one.id for one in client.models() if one.default] == ["tinyflux"]
    assert "tok" in {one.name for one in client.loras()}
    assert client.get_lora("tok").ready_on
    page = client.jobs(limit=1)
    assert client.jobs(limit=1, cursor=page.next_cursor).data[0].id != page.data[0].id


def test_a_lost_answer_makes_no_second_job(kind: str, gateway: Gateway) -> None:
    with proxied(gateway.url) as proxy, opened(kind, proxy.url) as client, Client(gateway.url) as direct:
        before = len(direct.jobs(limit=100).data)
        proxy.dropped = 2
        job = client.generate("a green square", **SMALL)
        assert proxy.asked == [("POST", "/v1/generations")] * 3
        assert [one.id for one in direct.jobs(limit=100).data][: -before or None] == [job.id]
        direct.cancel(job.id)


def test_a_stream_goes_on_across_a_restart_of_the_gateway(kind: str, gateway: Gateway) -> None:
    with opened(kind, gateway.url) as client:
        job = client.generate(**SLOW)
        events = []
        for event in client.stream(job.id):
            events.append(event)
            if len(events) == 5:
                gateway.kill()
                gateway.start()
        gateway.wait_ready()
        assert events[-1].data["status"] == "succeeded"
        ids = [event.id for event in events if event.id]
        assert ids == [event.id for event in client.stream(job.id) if event.id], "each once, in order, none left out"


HELD = pytest.mark.parametrize(("holds", "way"), [((), "get"), (("GET",), "post"), (("GET", "POST"), "poll")])
# Ends when it is told to.
LONG = {"workflow": "slow", "steps": 2000, "delay_ms": 50}


@HELD
def test_events_come_live_through_what_holds_streams_back(
    kind: str, gateway: Gateway, holds: tuple[str, ...], way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(following: Following) -> Ask:
        """Impatient where nothing comes, patient where something does, however slow this machine is."""
        following.first_event_s = 0.3 if following.way.upper() in holds else 30.0
        return ask_on(following)

    ask_on = Following.ask
    monkeypatch.setattr(Following, "ask", ask)
    with proxied(gateway.url, *holds) as proxy, opened(kind, proxy.url) as client, Client(gateway.url) as direct:
        job = client.generate(**LONG)
        stream = client.stream(job.id)
        first = next(event for event in stream if event.kind == "progress")
        assert direct.get(job.id).status == "running", "it was told while it ran"
        direct.cancel(job.id)
        rest = [event for event in stream if event.id]
        assert (client.way, rest[-1].data["status"]) == (way, "canceled")
        ids = [first.id, *(event.id for event in rest)]
        assert ids == sorted(set(ids), key=lambda name: tuple(map(int, name.split("-"))))


class Watched(Client):
    """Its jobs end once it can be told whether their events come live: when many did, or where a proxy `holds` them, when there are."""

    direct: Client
    holds: tuple[str, ...]

    def stream(self, job_id: str, **asked: Any) -> Iterator[Event]:
        if self.way.upper() in self.holds:
            threading.Thread(target=self._end_soon, args=(job_id,)).start()
        seen: list[tuple[float, str]] = []
        for event in super().stream(job_id, **asked):
            seen += [(time.monotonic(), event.id)] if event.id else []
            if is_live(seen) and len(seen) > MANY:
                self.direct.cancel(job_id)
            yield event

    def _end_soon(self, job_id: str) -> None:
        wait_until(lambda: (self.direct.get(job_id).progress.step or 0) > 2 * MANY, "some progress")
        self.direct.cancel(job_id)


MANY = 20


@HELD
def test_a_tunnel_is_tested_by_when_events_arrive(gateway: Gateway, holds: tuple[str, ...], way: str) -> None:
    # So patient that it is the times that tell, not the silence.
    with proxied(gateway.url, *holds) as proxy, Watched(proxy.url, first_event_s=30.0) as client, Client(gateway.url) as direct:
        client.direct, client.holds = direct, holds
        assert find_way(client, **LONG) == client.way == way


def test_events_are_live_when_they_come_as_they_were_made() -> None:
    made = ["1000-0", "2000-0", "3000-0"]
    assert is_live(list(zip((5.0, 6.0, 7.1), made, strict=True)))
    assert is_live(list(zip((7.0, 7.01, 7.02), made, strict=True))) is False
    assert is_live([(7.0, "1000-0"), (7.0, "1200-0")]) is is_live([]) is None
