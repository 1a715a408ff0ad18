"""The Lua scripts beside this file: each change of more than one key is one of them, with what all share before it."""

from __future__ import annotations

from importlib.resources import files

from gateway.redis_client import RedisClient, Script


def load_scripts(redis: RedisClient, *names: str) -> tuple[Script, ...]:
    """The scripts of these names, to be called with `args`."""
    folder = files("gateway.jobs") / "lua"
    prelude = (folder / "_prelude.lua").read_text()
    return tuple(Script(redis, prelude + (folder / f"{name}.lua").read_text()) for name in names)
