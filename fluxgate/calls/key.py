"""What admins can ask about keys, and everybody about what was used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fluxgate.asking import Ask, Steps, ask_for, drop_answer, page_of, path_of
from fluxgate.wire import Key, Page, drop_none, read_answer, reads


def keys() -> Steps[list[Key]]:
    """Every key there was, the newest first."""
    return (yield from page_of("keys", Page[Key])).data


def create_key(
    name: str = "key",
    *,
    scopes: Sequence[str] = ("generate",),
    caller: str | None = None,
    expires_at: str | None = None,
    limits: Mapping[str, int] | None = None,
) -> Steps[Key]:
    """Make a key; `key` of the answer is its text, shown this once. `limits` become those of the whole caller."""
    body = drop_none({"name": name, "scopes": list(scopes), "caller": caller, "expires_at": expires_at, "limits": limits})
    return ask_for(Ask("POST", "/v1/keys", json=body, is_repeatable=False), reads(Key))


def change_key(key_id: str, *, limits: Mapping[str, int | None] | None = None, **fields: Any) -> Steps[Key]:
    """Change what is given: name, scopes, expires_at (None: never), and limits (None: the settings' again)."""
    body = {**fields, **({"limits": dict(limits)} if limits is not None else {})}
    return ask_for(Ask("PATCH", path_of("keys", key_id), json=body), reads(Key))


def revoke_key(key_id: str) -> Steps[None]:
    """Refuse a key from now on. Its jobs go on."""
    return ask_for(Ask("DELETE", path_of("keys", key_id)), lambda answer: drop_answer(read_answer(answer)))


def usage(*, days: int = 7) -> Steps[dict[str, Any]]:
    """What the caller used, by day, and its limits."""
    return ask_for(Ask("GET", "/v1/usage", query={"days": days}), lambda answer: dict(read_answer(answer)))
