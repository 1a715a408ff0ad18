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
