"""What a serving process asks of the system and of the interpreter at its start."""

from __future__ import annotations

import gc
import resource
from contextlib import suppress

# Objects more than before until the collector looks at the youngest: with 700, the usual, futures of waiting streams outlive two looks
# and each few seconds a whole collection walks half a million objects of 5,000 streams: 0.4 s in which nothing is relayed.
YOUNG_OBJECTS = 50_000


def allow_many_files() -> None:
    """As many open sockets as the system lets us have: each event stream is one, and the usual limit is 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        # macOS calls its hard limit infinite and then refuses it; what is allowed already will have to do.
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def collect_rarely() -> None:
    """What was made by now lives as long as the process: never look at it again, and at the rest when it has grown."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS, 20, 50)
