"""Whose a Hugging Face token is: how often the hub is asked, what is kept of the answer, and what it means for doctor and start."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator

import pytest

from gateway.auth import Doorkeeper, Rates, UnsafeBinding, refuse_unsafe_binding
from gateway.callers import hub_tokens
from gateway.callers.hub_tokens import HubTokens, read_user
from gateway.callers.keys import KeyStore
from gateway.callers.usage import Usage
from gateway.doctor.door import examine_door
from gateway.doctor.hub import examine_hub
from gateway.errors import HubUnavailable, Unauthorized
from gateway.redis_client import RedisClient, connect_redis
from gateway.runtime import load_catalog
from gateway.settings import Settings
from tests.doctor_parts import require, states
from tests.hub_accounts import ACCOUNTS, token_of
from tests.hub_server import Hub, running_hub


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running_hub() as hub:
        hub.accounts.update(ACCOUNTS)
        yield hub


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[RedisClient]:
    client = connect_redis(redis_url)
    yield client
    await client.aclose(close_connection_pool=True)


def make(redis: RedisClient, hub: Hub, *allowed: str) -> HubTokens:
    return HubTokens(redis, hub.url, allowed, Rates(redis).take)


@pytest.mark.parametrize(
    ("name", "allowed", "user"),
    [
        ("ann", (), "ann"),
        ("ann", ("ANN",), "ann"),
        ("member", ("org-of-ours",), "carl"),
        ("ann", ("org-of-ours",), ""),
        ("fine", (), "eve"),
        ("blind", (), ""),
        ("nothing", (), ""),
        ("organisation", (), ""),
        ("odd", (), ""),
    ],
)
def test_what_the_hub_says_of_a_token_is_read_strictly(name: str, allowed: tuple[str, ...], user: str) -> None:
    assert read_user(ACCOUNTS[token_of(name)], allowed) == user


@pytest.mark.parametrize(
    "facts", [{}, {"name": "ann", "type": "user"}, {"name": "ann", "type": "user", "auth": None}, {"auth": {"accessToken": None}}]
)
def test_an_answer_that_says_less_opens_nothing(facts: dict[str, object]) -> None:
    assert read_user(facts, ()) == ""


async def test_many_at_once_ask_once_and_another_process_not_at_all(redis: RedisClient, hub: Hub) -> None:
    one, other = make(redis, hub), make(redis, hub)
    assert set(await asyncio.gather(*(one.identify(token_of("ann")) for _ in range(20)))) == {"ann"}
    assert await other.identify(token_of("ann")) == "ann"
    assert await one.identify(token_of("nobody")) is None
    assert await other.identify(token_of("nobody")) is None
    assert hub.whoami == [token_of("ann"), token_of("nobody")]
    ttls = [await redis.ttl(key) async for key in redis.scan_iter("fluxgate:hf_token:*")]
    assert sorted(ttls) == pytest.approx([hub_tokens.REFUSED_S, hub_tokens.KEPT_S], abs=5)


async def test_a_good_token_serves_on_while_the_hub_is_away_and_not_when_it_is_taken_back(
    redis: RedisClient, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert await make(redis, hub).identify(token_of("ann")) == "ann"
    later = time.time_ns() // 1_000_000 + (hub_tokens.FRESH_S + 1) * 1000
    monkeypatch.setattr(hub_tokens, "now_ms", lambda: later)
    hub.whoami_status = 500
    assert await make(redis, hub).identify(token_of("ann")) == "ann"
    with pytest.raises(HubUnavailable):
        await make(redis, hub).identify(token_of("bob"))
    hub.whoami_status = None
    del hub.accounts[token_of("ann")]
    assert await make(redis, hub).identify(token_of("ann")) is None
    assert len(hub.whoami) == 4


async def test_guesses_do_not_flood_the_hub_and_known_callers_go_on(redis: RedisClient, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_tokens, "PER_MINUTE", 5)
    tokens = make(redis, hub)
    assert await tokens.identify(token_of("ann")) == "ann"
    said = await asyncio.gather(*(tokens.identify(f"hf_guess{number}{'y' * 30}") for number in range(10)), return_exceptions=True)
    assert (said.count(None), sum(isinstance(one, HubUnavailable) for one in said)) == (4, 6)
    assert len(hub.whoami) == 5
    assert await make(redis, hub).identify(token_of("ann")) == "ann"
    [refused] = {(one.code, one.status) for one in said if isinstance(one, HubUnavailable)}
    assert refused == ("hub_unavailable", 503)
    assert all((one.retry_after_s or 0) >= 1 for one in said if isinstance(one, HubUnavailable))


async def test_without_the_setting_a_token_is_a_wrong_key_and_nobody_is_asked(redis: RedisClient, hub: Hub) -> None:
    settings = Settings(auth="keys", hf_endpoint=hub.url)
    with pytest.raises(Unauthorized):
        await Doorkeeper(settings, KeyStore(redis), Rates(redis), Usage(redis)).identify(f"Bearer {token_of('ann')}")
    assert hub.whoami == []


async def test_the_doctor_and_the_start_know_tokens_for_keys(redis: RedisClient, hub: Hub) -> None:
    with pytest.raises(UnsafeBinding, match="no API keys"):
        refuse_unsafe_binding(Settings(host="0.0.0.0"))
    wide = Settings(host="0.0.0.0", auth="hf", hf_endpoint=hub.url)
    narrow = wide.model_copy(update={"hf_users": ("ann",)})
    for settings in (wide, narrow):
        refuse_unsafe_binding(settings)
    require(await examine_door(wide, redis), "door.keys", "whoever has an account", "HF_USERS", "warning")
    assert states(await examine_door(narrow, redis)) == {"ok"}
    workflows = load_catalog(wide)
    found = {each.check: each.state for each in await examine_hub(wide.model_copy(update={"default_base_model": "tinyflux"}), workflows)}
    assert found["hub.callers"] == "ok"
    hub.whoami_status = 502
    require(await examine_hub(wide, workflows), "hub.callers", "cannot be asked", "HF_ENDPOINT")


def test_users_are_a_list_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_USERS", "ann, our-org ,")
    assert Settings().hf_users == ("ann", "our-org")
