"""What of a text is never repeated, in an error, a log or anything else: keys, and the parts of addresses in which secrets stand."""

from __future__ import annotations

import re
from typing import Any

# Keys of ours, tokens of Hugging Face's, secrets of webhooks: they are known by how they begin. Others by the word before them.
_KEYS = re.compile(r"\b(fg_[0-9a-f]{12}_|hf_|whsec_|bearer +)[A-Za-z0-9_\-+/=.]{16,}", re.IGNORECASE)
# No backslash: a log line is JSON, and keeps the quotes it has escaped.
_USERS = re.compile(r"(\b[a-z][a-z0-9+.\-]*:/{0,2})[^\s/'\"<>\\]*@", re.IGNORECASE)
# Of a URL, and of a path as servers log it.
_QUERIES = re.compile(r"(/[^\s'\"<>\\?#]*)[?#][^\s'\"<>\\]+")
_NAMES = re.compile(r"secret|password|authorization|api_?key|token", re.IGNORECASE)


def hide_secrets(text: str) -> str:
    """The text with `…` for every secret that can be known as one."""
    text = _KEYS.sub(r"\1…", text)
    if "@" in text:
        text = _USERS.sub(r"\1…@", text)
    return _QUERIES.sub(r"\1?…", text) if "?" in text or "#" in text else text


def hide_in(value: Any) -> Any:
    """The same for every text in lists and objects."""
    if isinstance(value, str):
        return hide_secrets(value)
    if isinstance(value, dict):
        return {name: hide_in(part) for name, part in value.items()}
    return [hide_in(part) for part in value] if isinstance(value, list | tuple) else value


def hide_user(address: str) -> str:
    """An address of an operator's, however wrong: what stands before its host may be a password."""
    *before, place = address.rpartition("@")
    return f"…@{place}" if any(before) else address


def names_secret(name: object) -> bool:
    """Whether what is called so is one."""
    return isinstance(name, str) and _NAMES.search(name) is not None
