"""Accounts of a hub's, as it describes them to whoever has their token."""

from __future__ import annotations

from typing import Any

Json = dict[str, Any]


def token_of(name: str) -> str:
    return f"hf_{name.replace('-', '')}{'x' * 30}"


def account(name: str, role: str = "read", **more: Any) -> Json:
    """As the hub describes a user and the token."""
    return {"type": "user", "name": name, "orgs": [], "auth": {"type": "access_token", "accessToken": {"role": role}}, **more}


def fine_grained(*scoped: str, everywhere: tuple[str, ...] = ()) -> Json:
    token = {"role": "fineGrained", "fineGrained": {"global": list(everywhere), "scoped": [{"entity": {}, "permissions": list(scoped)}]}}
    return {"auth": {"type": "access_token", "accessToken": token}}


ACCOUNTS = {
    token_of("ann"): account("ann"),
    token_of("bob"): account("Bob", "write"),
    token_of("fine"): account("eve", **fine_grained("repo.content.read")),
    token_of("member"): account("carl", orgs=[{"name": "Org-of-Ours"}]),
    token_of("stranger"): account("stranger"),
    token_of("blind"): account("ann", **fine_grained("inference.serverless.write", everywhere=("discussion.write",))),
    token_of("nothing"): account("ann", "none"),
    token_of("organisation"): account("ann", type="org"),
    token_of("odd"): account("ann:bob"),
}
