"""What can go wrong for a caller of the gateway.

FluxgateError
├── ApiError        the gateway refused; `status`, `code`, `hint` and `details` are its own words
└── Unreachable     nothing answered, or no longer
    └── Silent      somebody took the connection and said nothing in time
"""

from __future__ import annotations

from typing import Any


class FluxgateError(Exception):
    """The root. The text is one message for a person; `hint` says what to do about it, where that is known."""

    hint: str | None = None


class ApiError(FluxgateError):
    """The gateway's `{"error": {code, message, hint, details}}`, with its HTTP status."""

    def __init__(self, status: int, code: str, message: str, hint: str | None = None, details: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.hint = hint
        self.details = details or {}


class Unreachable(FluxgateError):
    """The gateway at `url` could not be reached; nobody knows whether it acted, unless the request was `never_sent`."""

    def __init__(self, url: str, reason: str, *, never_sent: bool = False) -> None:
        super().__init__(f"{url} does not answer: {reason}")
        self.url = url
        self.never_sent = never_sent
        self.hint = "Is it running, and is the address right? Set it with --url or FLUXGATE_URL."


class Silent(Unreachable):
    """Connected, and nothing came in time: a dead connection, or a proxy that holds an answer back until it is whole."""
