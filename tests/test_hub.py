"""Whether a base model may be read, asked of a server that speaks the hub's routes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from pydantic import SecretStr

from gateway.errors import Unprocessable
from gateway.outside.hub import HubAccess
from local.child import pick_free_port
from tests.hub_server import GATED, Hub, running_hub


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running_hub() as hub:
        yield hub


def ask(hub: Hub, token: str | None = "hf_secret") -> HubAccess:
    return HubAccess(hub.url, SecretStr(token) if token else None)


async def test_a_gated_base_is_refused_with_its_licence(hub: Hub) -> None:
    access = ask(hub)
    with pytest.raises(Unprocessable) as refused:
        await access.require(GATED)
    assert refused.value.code == "model_access_denied"
    assert refused.value.details["licence_url"] == f"{hub.url}/{GATED}"
    assert f"{hub.url}/{GATED}" in (refused.value.hint or "")
    assert hub.asked == [(GATED, "Bearer hf_secret")]
    assert "hf_secret" not in str(refused.value.body())


async def test_access_that_was_granted_is_remembered(hub: Hub) -> None:
    hub.licensed.add("Bearer hf_secret")
    access = ask(hub)
    assert [await access.require(GATED) for _ in range(3)] == ["granted"] * 3
    assert await access.require("open/model") == "granted"
    assert [repository for repository, _ in hub.asked] == [GATED, "open/model"]


@pytest.mark.parametrize(
    ("repository", "token", "code"),
    [
        ("nobody/nothing", "hf_secret", "model_not_found"),
        ("open/model", "hf_wrong", "model_access_denied"),
        (GATED, "hf_wrong", "model_access_denied"),
    ],
)
async def test_what_would_fail_late_is_refused(hub: Hub, repository: str, token: str, code: str) -> None:
    with pytest.raises(Unprocessable) as refused:
        await ask(hub, token).require(repository)
    assert refused.value.code == code
    assert token not in str(refused.value.body())


@pytest.mark.parametrize("place", ["/models/flux", "built-in", "./flux", "https://example.com/x/y"])
async def test_a_folder_is_not_asked_for(hub: Hub, place: str) -> None:
    assert await ask(hub).require(place) == "not asked: a folder"
    assert hub.asked == []


async def test_a_hub_that_does_not_answer_refuses_nothing(hub: Hub) -> None:
    assert await ask(hub).require("busy/model") == "not known: the hub answered 503"
    nobody = HubAccess(f"http://127.0.0.1:{pick_free_port()}", None)
    assert await nobody.require(GATED) == "not known: the hub is out of reach"
