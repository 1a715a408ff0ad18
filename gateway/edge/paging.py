"""Pages of a list: how many items, behind which one, and where the next page begins."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol, TypeVar

from gateway.errors import BadRequest

# (created_ms, id) of an item: lists are kept newest first.
Position = tuple[int, str]
# Records that one request looks at: a filter that few of very many fit is answered in several pages, some of which may be empty.
MOST_LOOKED_AT = 1000
AT_ONCE = 100


class Identified(Protocol):
    @property
    def id(self) -> str: ...


T = TypeVar("T", bound=Identified)


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


async def look_through(
    page: Page,
    read_index: Callable[[Position | None, int], Awaitable[list[Position]]],
    load_many: Callable[[Iterable[str]], Awaitable[list[T]]],
    takes: Callable[[T], bool],
    after_ms: int | None = None,
) -> tuple[list[T], Position | None]:
    """The newest records behind the page's cursor that are wanted and younger than `after_ms`, and where to go on; None at the end."""
    position, found = page.behind, list[T]()
    for _ in range(MOST_LOOKED_AT // AT_ONCE):
        positions = await read_index(position, AT_ONCE)
        records = {record.id: record for record in await load_many([record_id for _, record_id in positions])}
        for position in positions:
            if after_ms is not None and position[0] <= after_ms:
                return found, None
            if (record := records.get(position[1])) is not None and takes(record):
                found.append(record)
                if len(found) == page.limit:
                    return found, position
        if len(positions) < AT_ONCE:
            return found, None
    return found, position


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
