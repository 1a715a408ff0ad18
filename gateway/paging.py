"""Pages of a list: how many items, behind which one, and where the next page begins."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from gateway.errors import BadRequest

# (created_ms, id) of an item: lists are kept newest first.
Position = tuple[int, str]


@dataclass(frozen=True, slots=True)
class Page:
    """Which part of a list is asked for. `cursor` is what an earlier answer said."""

    limit: int
    cursor: str | None

    @property
    def behind(self) -> Position | None:
        """The item that the page begins behind; None: it is the first. Raises BadRequest."""
        return decode_cursor(self.cursor)

    def last_of(self, positions: list[Position]) -> Position | None:
        """Where the next page begins; None when this one was not filled."""
        return positions[-1] if len(positions) == self.limit else None


def present_page(items: Iterable[dict[str, Any]], last: Position | None) -> dict[str, Any]:
    """The answer; `last` is where the next page begins, None: there is none."""
    return {"data": list(items), "next_cursor": encode_cursor(last) if last else None}


def encode_cursor(position: Position) -> str:
    """A page's last item, for the next page to begin behind."""
    return base64.urlsafe_b64encode(f"{position[0]}:{position[1]}".encode()).decode().rstrip("=")


def decode_cursor(cursor: str | None) -> Position | None:
    """The position a cursor was made from. Raises BadRequest."""
    if cursor is None:
        return None
    try:
        created_ms, _, item_id = base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)).decode("ascii").partition(":")
        if abs(int(created_ms)) >= 1 << 53:
            raise ValueError("no time that Redis can compare")
        return int(created_ms), item_id
    except (ValueError, binascii.Error):
        raise BadRequest("The cursor is not one of ours.", details={"parameter": "cursor", "value": cursor[:100]}) from None


def parse_time(text: str | None) -> int | None:
    """Milliseconds since the epoch of `created_after`. Raises BadRequest."""
    if text is None:
        return None
    try:
        moment = datetime.fromisoformat(text)
        if moment.tzinfo is None:
            raise ValueError("no time zone")
        return int(moment.timestamp() * 1000)
    except (ValueError, OverflowError):
        raise BadRequest(
            "created_after is not an RFC 3339 time.",
            details={"parameter": "created_after", "value": text[:100], "allowed": "2026-01-31T12:00:00Z"},
        ) from None
