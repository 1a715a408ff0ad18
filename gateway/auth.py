"""Who is calling. With no keys set, on loopback, everybody is the one local caller."""

from __future__ import annotations

from dataclasses import dataclass

from gateway.errors import FluxgateError
from gateway.settings import Settings

SCOPES = ("generate", "train", "admin")


@dataclass(frozen=True, slots=True)
class Caller:
    """Owner of jobs, LoRAs and uploads. `scopes` says what it may do."""

    id: str
    scopes: frozenset[str]


LOCAL = Caller("local", frozenset(SCOPES))


class UnsafeBinding(FluxgateError):
    code = "unsafe_binding"


def refuse_unsafe_binding(settings: Settings) -> None:
    """A gateway without keys that others can reach would run anybody's graphs: raise UnsafeBinding before it listens."""
    if not settings.is_loopback:
        raise UnsafeBinding(
            f"HOST={settings.host} can be reached from outside and no API keys are set.",
            hint="Listen on HOST=127.0.0.1, behind a proxy that authenticates.",
            details={"parameter": "HOST", "value": settings.host, "allowed": "127.0.0.1, ::1, localhost"},
        )
