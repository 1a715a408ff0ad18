"""The whole examination: every check, side by side, whatever is broken."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import aiohttp

from comfy_workflows.catalog import Catalog as Workflows
from gateway.doctor.comfy import examine_instances, examine_reports
from gateway.doctor.door import examine_door, examine_stream
from gateway.doctor.finding import Finding, skip
from gateway.doctor.hub import examine_hub
from gateway.doctor.loras import examine_loras
from gateway.doctor.redis import examine_redis
from gateway.doctor.s3 import examine_s3
from gateway.doctor.trainer import examine_trainer
from gateway.errors import RedisUnavailable
from gateway.instances import FleetRegistry, InstanceRegistry
from gateway.redis_client import RedisClient, connect_redis
from gateway.runtime import load_catalog
from gateway.settings import Settings


async def examine(settings: Settings, url: str | None = None) -> list[Finding]:
    """Every finding, in the order of a job's way. `url`: by which callers reach the gateway; default PUBLIC_URL. Raises BrokenWorkflow."""
    workflows, redis = load_catalog(settings), connect_redis(settings.redis_url)
    try:
        async with aiohttp.ClientSession() as session:
            found = await asyncio.gather(
                examine_redis(redis),
                examine_s3(settings, session),
                _examine_fleet(settings, workflows, session, redis),
                examine_hub(settings, workflows),
                examine_trainer(settings, workflows, redis),
                examine_door(settings, redis),
                examine_stream(url or settings.public_url, session),
            )
    finally:
        await redis.aclose(close_connection_pool=True)
    return [finding for findings in found for finding in findings]


async def _examine_fleet(settings: Settings, workflows: Workflows, session: aiohttp.ClientSession, redis: RedisClient) -> list[Finding]:
    """Instances and their folder of LoRAs; of dispatchers elsewhere, which alone reach theirs, what they report."""
    if settings.dispatcher == "off" and "comfyui_urls" not in settings.model_fields_set:
        try:
            return examine_reports(await InstanceRegistry(redis).all())
        except RedisUnavailable:
            return [skip("comfyui", "its dispatchers are elsewhere, and Redis is out of reach")]
    urls = await _find_instances(settings, redis)
    looked = await asyncio.gather(examine_instances(settings, workflows, session, urls), examine_loras(settings, session, urls))
    return [finding for findings in looked for finding in findings]


async def _find_instances(settings: Settings, redis: RedisClient) -> Sequence[str]:
    """Those of the settings, changed by what admins said at run time."""
    try:
        return [member.url for member in (await FleetRegistry(redis).wanted(settings.comfyui_urls)).values()]
    except RedisUnavailable:
        return settings.comfyui_urls
