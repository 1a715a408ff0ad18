"""`python -m gateway keys create|list|revoke`: keys straight in Redis, for the operator of a gateway that nobody can reach yet."""

from __future__ import annotations

import argparse
import asyncio
import re
from collections.abc import Sequence

from gateway.callers.keys import CALLER_NAME, SCOPES, CallerLimits, KeyStore, mint_key
from gateway.errors import BadRequest
from gateway.jobs.model import now_ms
from gateway.redis_client import connect_redis
from gateway.settings import Settings

LIMITS = ("requests_per_minute", "jobs_in_flight", "gpu_seconds_per_day")


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m gateway keys", description="API keys in the Redis of REDIS_URL.")
    commands = parser.add_subparsers(dest="command", required=True)
    create = commands.add_parser("create", help="make a key and print it, this once")
    create.add_argument("--name", default="key", help="for people")
    create.add_argument("--scopes", default="generate", help=f"comma separated, of {', '.join(SCOPES)}; admin includes the others")
    create.add_argument("--caller", help="share one caller's jobs, LoRAs and limits; without, the key is a caller of its own")
    create.add_argument("--expires-in-days", type=int, help="days after which the key is refused")
    for limit in LIMITS:
        create.add_argument(f"--{limit.replace('_', '-')}", type=int, help=CallerLimits.model_fields[limit].description)
    commands.add_parser("list", help="every key there was")
    commands.add_parser("revoke", help="refuse a key from now on").add_argument("id", help="key_...")
    parsed = parser.parse_args(arguments)
    if parsed.command == "create":
        scopes = parsed.scopes.split(",")
        if wrong := [scope for scope in scopes if scope not in SCOPES]:
            raise BadRequest(f"--scopes names {wrong[0]!r}; allowed is {', '.join(SCOPES)}.")
        if parsed.caller and not re.fullmatch(CALLER_NAME, parsed.caller):
            raise BadRequest(f"--caller is {parsed.caller!r}; allowed is {CALLER_NAME}.")
        parsed.scopes = tuple(dict.fromkeys(scopes))
    return parsed


def run_keys_command(arguments: Sequence[str], settings: Settings) -> int:
    """Do it and print the outcome. Raises FluxgateError; ValidationError for a limit that is none."""
    asyncio.run(_run(_parse(arguments), settings))
    return 0


async def _run(parsed: argparse.Namespace, settings: Settings) -> None:
    redis = connect_redis(settings.redis_url)
    try:
        await {"create": _create, "list": _list, "revoke": _revoke}[parsed.command](KeyStore(redis), parsed)
    finally:
        await redis.aclose(close_connection_pool=True)


async def _create(keys: KeyStore, parsed: argparse.Namespace) -> None:
    days = parsed.expires_in_days
    key, text = mint_key(
        parsed.name, parsed.scopes, caller=parsed.caller, expires_ms=now_ms() + days * 86_400_000 if days is not None else None
    )
    await keys.add(key, CallerLimits(**{limit: getattr(parsed, limit) for limit in LIMITS}))
    print(text)


async def _list(keys: KeyStore, _: argparse.Namespace) -> None:
    for key in sorted((await keys.load()).keys.values(), key=lambda key: key.created_ms):
        print(key.id, key.caller, ",".join(key.scopes), "good" if key.is_good(now_ms()) else "revoked or expired", key.name, sep="\t")


async def _revoke(keys: KeyStore, parsed: argparse.Namespace) -> None:
    key = await keys.revoke(parsed.id)
    print(key.id, "revoked", sep="\t")
