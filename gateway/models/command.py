"""`python -m gateway models pull|list|verify|gc`: base models in MODELS_DIR, for the operator."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Sequence
from pathlib import Path

import comfy_workflows
from comfy_workflows.base_models import BaseModelInfo
from comfy_workflows.catalog import collect_base_models
from gateway.errors import BadRequest, RedisUnavailable
from gateway.instances import InstanceRegistry
from gateway.models.folder import ModelFolder
from gateway.models.pulls import collect, place_of, pull, say_size, verify
from gateway.outside.hub_files import HubFiles
from gateway.redis_client import connect_redis
from gateway.settings import Settings


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="fluxgate models", description="Base models in ComfyUI's models folder.")
    parser.add_argument("--dir", type=Path, help="the models folder; default MODELS_DIR")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("pull", help="fetch what is missing of base models").add_argument("names", nargs="+", metavar="BASE_MODEL")
    commands.add_parser("list", help="what there is, what is missing, under which licence")
    commands.add_parser("verify", help="read every file that was brought, and compare its hash")
    gc = commands.add_parser("gc", help="remove what was used longest ago until enough is free")
    gc.add_argument("--min-free-bytes", type=int, help="default MODELS_MIN_FREE_BYTES")
    gc.add_argument("--dry-run", action="store_true", help="only say what would go")
    return parser.parse_args(arguments)


def run_models_command(arguments: Sequence[str], settings: Settings) -> int:
    """Do it and say what was done. Exit status 1 where `verify` finds a fault. Raises FluxgateError."""
    parsed = _parse(arguments)
    root = parsed.dir or settings.models_dir
    if root is None:
        raise BadRequest("MODELS_DIR is not set.", hint="Set it to ComfyUI's models folder, or give --dir.")
    folder, models = ModelFolder(root), read_models(settings)
    if parsed.command == "pull":
        _pull(parsed.names, models, folder, settings)
    elif parsed.command == "verify":
        return 0 if verify(folder, print) else 1
    elif parsed.command == "gc":
        floor = settings.models_min_free_bytes if parsed.min_free_bytes is None else parsed.min_free_bytes
        used_ms = asyncio.run(_read_use(settings.redis_url))
        collect(folder, used_ms, settings.default_base_model, floor, print, dry_run=parsed.dry_run)
    else:
        for model in models.values():
            print(_describe(model, folder))
    return 0


def read_models(settings: Settings) -> dict[str, BaseModelInfo]:
    own = Path(comfy_workflows.__file__).parent
    return collect_base_models(own, *([settings.workflows_dir] if settings.workflows_dir else []))


def _pull(names: Sequence[str], models: dict[str, BaseModelInfo], folder: ModelFolder, settings: Settings) -> None:
    if unknown := [name for name in names if name not in models]:
        known = ", ".join(name for name, model in models.items() if model.sources)
        raise BadRequest(f"There is no base model {unknown[0]!r}.", hint=f"Known are {known}.")
    hub = HubFiles(settings.hf_endpoint, settings.hf_token)
    for name in names:
        print(f"{name}: {models[name].title}, {say_size(models[name].size_bytes)}, {models[name].licence}")
        pull(models[name], folder, hub, settings.models_min_free_bytes, print)


def _describe(model: BaseModelInfo, folder: ModelFolder) -> str:
    """Name, how much of it is there, size, licence, and what is missing; tabs between."""
    places = [place_of(model, role) for role in model.sources]
    missing = [name for name in places if not folder.place(name).exists()]
    state = "built in" if not places else "complete" if not missing else "missing" if len(missing) == len(places) else "partly"
    gated = ", gated" if model.gated else ""
    said = (model.name, state, say_size(model.size_bytes), f"{model.licence}{gated}", f"without {', '.join(missing)}" if missing else "")
    return "\t".join(said).rstrip()


async def _read_use(redis_url: str) -> dict[str, int]:
    """When each base model last was at work anywhere. Without Redis they count from when they were brought."""
    redis = connect_redis(redis_url)
    try:
        return await InstanceRegistry(redis).base_models_used()
    except RedisUnavailable:
        return {}
    finally:
        await redis.aclose(close_connection_pool=True)
