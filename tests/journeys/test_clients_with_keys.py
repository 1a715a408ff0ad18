"""The clients of others where keys are asked for: who is let in, who may bring graphs, and that nobody finds another's things."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest
from comfy_sdk import Comfy, Forbidden, NotFound, Unauthorized

from local.services import Gateway
from tests.callers import as_caller, make_key
from tests.conftest import OpenGateway

ADMIN_KEY = "the-operators-own-key-of-this-test"
GRAPH: dict[str, Any] = {
    "3": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": 255}},
    "9": {"class_type": "SaveImage", "inputs": {"images": ["3", 0], "filename_prefix": "ComfyUI"}},
}


@pytest.fixture(scope="module")
def gateway(open_gateway: OpenGateway) -> Iterator[Gateway]:
    with open_gateway(ADMIN_KEY=ADMIN_KEY) as gateway:
        yield gateway


@pytest.fixture(scope="module")
def artist_key(gateway: Gateway) -> str:
    """A key that may generate, and no more."""
    with as_caller(gateway.url, ADMIN_KEY) as admin:
        return str(make_key(admin, "generate", name="artist")["key"])


@pytest.fixture(autouse=True)
def _point_the_sdk_at_us(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMFY_BASE_URL", gateway.url)


def test_graphs_of_ones_own_need_an_admins_key(artist_key: str) -> None:
    with Comfy(api_key=ADMIN_KEY) as admin, Comfy(api_key=artist_key) as artist, Comfy(api_key="fx_wrong") as stranger, Comfy() as nobody:
        assert admin.run(admin.workflows.from_json(GRAPH)).status == "succeeded"
        with pytest.raises(Forbidden):
            artist.submit(artist.workflows.from_json(GRAPH))
        for other in (stranger, nobody):
            with pytest.raises(Unauthorized):
                other.submit(other.workflows.from_json(GRAPH))


def test_nobody_finds_what_is_anothers(artist_key: str) -> None:
    with Comfy(api_key=ADMIN_KEY) as admin, Comfy(api_key=artist_key) as artist:
        job = admin.run(admin.workflows.from_json(GRAPH))
        output = job.outputs[0]
        asset = admin.assets.from_bytes(output.to_bytes(), filename="mine.png")
        asset.commit()
        assert list(artist.list_jobs()) == []
        absent: list[Any] = [
            lambda: artist.jobs.get(job.id),
            lambda: artist.assets.get(output.id),
            lambda: artist.assets.get(asset.id or ""),
            lambda: artist.assets.delete(asset.id or ""),
        ]
        for look in absent:
            with pytest.raises(NotFound):
                look()
        # Equal bytes of another are no sign either: they are sent again.
        same = artist.assets.from_bytes(output.to_bytes(), filename="mine.png")
        same.commit()
        assert same.created_new
        assert same.id != asset.id


def test_openais_client_brings_its_key(gateway: Gateway, artist_key: str) -> None:
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key=artist_key) as client:
        assert client.models.list().data
        assert client.images.generate(prompt="a red circle", size="256x256", extra_body={"steps": 1}).data
        with pytest.raises(openai.AuthenticationError) as caught:
            client.with_options(api_key="fx_wrong").images.generate(prompt="a red circle")
    assert (caught.value.code, caught.value.type) == ("invalid_api_key", "invalid_request_error")
