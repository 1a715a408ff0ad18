"""Why a generation waits, from what instances say of themselves, on a real Redis."""

from __future__ import annotations

import pytest

from gateway.instances import FleetRegistry, InstanceFacts, InstanceRegistry
from gateway.jobs.model import Job, Needs
from gateway.obstacles import find_obstacle
from gateway.redis_client import RedisClient
from tests.job_specs import make_spec

pytest_plugins = ["tests.store_fixtures"]

ABLE = {"KSampler": {"sampler_name": ["euler"]}}
UNABLE = {"KSampler": {"sampler_name": ["dpm"]}}
JOB = Job(spec=make_spec("a", needs=Needs(classes=("KSampler",), choices=(("KSampler", "sampler_name", "euler"),))))


@pytest.mark.parametrize(
    ("fleet", "reason", "named"),
    [
        ({}, "no_instance", []),
        ({"a": ("up", ABLE)}, None, []),
        ({"a": ("up", None)}, None, []),
        ({"a": ("training", ABLE)}, "training", ["a"]),
        ({"a": ("training", ABLE), "b": ("up", ABLE)}, None, []),
        ({"a": ("training", ABLE), "b": ("up", UNABLE)}, "training", ["a"]),
        ({"a": ("down", ABLE), "b": ("training", ABLE), "c": ("training", ABLE)}, "training", ["b", "c"]),
        ({"a": ("down", ABLE), "b": ("draining", ABLE)}, "draining", ["b"]),
        ({"a": ("down", ABLE), "b": ("resting", ABLE)}, "resting", ["b"]),
        ({"a": ("down", None)}, "down", ["a"]),
        ({"a": ("up", UNABLE), "b": ("training", UNABLE)}, "missing", []),
    ],
)
async def test_what_a_job_waits_for(
    fleet: dict[str, tuple[str, dict[str, dict[str, list[str]]] | None]], reason: str | None, named: list[str], redis_client: RedisClient
) -> None:
    registry = InstanceRegistry(redis_client)
    for name, (state, catalog) in fleet.items():
        if catalog is not None:
            await registry.publish_catalog(name, "1", catalog, {})
        await registry.publish(InstanceFacts(id=name, url=f"http://{name}", state=state, catalog_version="1"))
    obstacle = await find_obstacle(JOB, registry)
    assert (obstacle.reason if obstacle else None) == reason
    if obstacle:
        assert obstacle.instances == named
        assert all(name in obstacle.message for name in named)
    if reason == "missing":
        assert obstacle
        assert "KSampler.sampler_name = euler" in obstacle.message


async def test_of_an_unload_and_a_load_the_last_counts(redis_client: RedisClient) -> None:
    fleet = FleetRegistry(redis_client)
    await fleet.want_free(["one", "other"])
    await fleet.keep_models("one")
    assert await fleet.take_free(["one", "other"]) == ["other"]
    await fleet.want_free(["other"])
    assert await fleet.take_free(["one", "other"]) == [], "it is being done"
    await fleet.end_freeing("other")
    assert await fleet.take_free(["one", "other"]) == ["other"]


async def test_what_redis_knows_better_than_a_dispatcher_said_is_told(redis_client: RedisClient) -> None:
    registry, fleet = InstanceRegistry(redis_client), FleetRegistry(redis_client)
    for name in ("loaded", "let-go", "leaving", "gone", "down"):
        said = {"base_model": "long-ago", "loras": ["old"], "slots_used": 7, "state": "down" if name == "down" else "up"}
        await registry.publish(InstanceFacts(id=name, url=f"http://{name}", **said))
    await redis_client.hset("fluxgate:warm:loaded", mapping={"base_model": "now", "loras": '["b", "a"]', "recent": "[]"})
    await redis_client.sadd("fluxgate:slots:leaving", "gen_1")
    for name in ("leaving", "gone", "down"):
        await fleet.remove(name)
    await redis_client.sadd("fluxgate:slots:down", "gen_2")
    seen = {facts.id: (facts.state, facts.base_model, facts.loras, facts.slots_used) for facts in await registry.all()}
    assert seen == {
        "loaded": ("up", "now", ["a", "b"], 0),
        "let-go": ("up", None, [], 0),
        "leaving": ("draining", None, [], 1),
        "down": ("down", None, [], 1),
    }
    assert await registry.watched() == {"loaded", "let-go", "leaving", "gone", "down"}
