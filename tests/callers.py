"""Callers of one gateway that differ by their key alone."""

from __future__ import annotations

from typing import Any

import httpx


def make_key(admin: httpx.Client, *scopes: str, **fields: Any) -> dict[str, Any]:
    """A key as it was answered when it was made; `key` is its text."""
    answer = admin.post("/v1/keys", json={"scopes": list(scopes) or ["generate"], **fields})
    assert answer.status_code == 201, answer.text
    return dict(answer.json())


def as_caller(url: str, key: str | None, **options: Any) -> httpx.Client:
    """A client that sends this key, or none."""
    return httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"} if key else {}, timeout=60.0, **options)
