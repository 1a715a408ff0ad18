"""`python -m fluxgate.tunnel URL`: whether event streams come live through what stands between here and the gateway, and which way
does. Jobs are run for it: what counts is when their events were made, which their ids say, against when they arrived."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from typing import Any

from fluxgate.client import Client
from fluxgate.errors import FluxgateError
from fluxgate.following import WAYS, Way

# Events that were made closer together tell nothing of the way.
LEAST_SPREAD_S = 0.5
SMALL: dict[str, Any] = {"prompt": "a red circle on a blue background", "width": 512, "height": 512, "steps": 8, "cache": "off"}


def is_live(seen: Sequence[tuple[float, str]]) -> bool | None:
    """Of (seconds at arrival, event id): whether they came as they were made, or all at once. None: too close to tell."""
    if not seen:
        return None
    made_s = (_made_ms(seen[-1][1]) - _made_ms(seen[0][1])) / 1000
    arrived_s = seen[-1][0] - seen[0][0]
    return arrived_s > made_s / 2 if made_s >= LEAST_SPREAD_S else None


def _made_ms(event_id: str) -> int:
    return int(event_id.partition("-")[0])


def find_way(client: Client, **asked: Any) -> Way:
    """The first way on which a job's events come live; long-poll always does. It becomes the client's."""
    while client.way != WAYS[-1]:
        begun = client.way
        job = client.generate(**(asked or SMALL))
        seen = [(time.monotonic(), event.id) for event in client.stream(job.id) if event.id]
        # Where nothing came in time the client has left that way by itself.
        if client.way == begun and is_live(seen) is not False:
            return begun
        if client.way == begun:
            client.way = WAYS[WAYS.index(begun) + 1]
    return client.way


def main(url: str) -> int:
    try:
        with Client(url) as client:
            print(json.dumps({"url": url, "way": find_way(client)}))
    except FluxgateError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
