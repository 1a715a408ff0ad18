"""`python -m bench [NAME ...] [--share 0.25]`: runs benches one after the other and prints their tables; without names, all.

Everything they need is started and ended here; COMFYUI_URL replaces the built-in engine by a real ComfyUI. Give it a
TMPDIR on a tmpfs (/dev/shm): where many files were deleted lately, ext4 is slow to make new ones, and benches delete many.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path

import aiohttp

from bench import costs, gap, instances, keys, memory, overhead, relay
from bench.caller import BenchFailure
from local.child import ChildError

BENCHES: dict[str, Callable[[Path, float], Awaitable[None]]] = {
    "overhead": overhead.run,
    "keys": keys.run,
    "gap": gap.run,
    "costs": costs.run,
    "memory": memory.run,
    "relay": relay.run,
    "instances": instances.run,
}


async def run_all(names: list[str], share: float) -> None:
    for name in names:
        print(f"== {name}, against {os.environ.get('COMFYUI_URL') or 'the built-in engine'}", flush=True)
        with tempfile.TemporaryDirectory(prefix=f"bench-{name}-") as folder:
            await BENCHES[name](Path(folder), share)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Benches that print ratios of one run on one machine.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHES)}; all when absent")
    parser.add_argument("--share", type=float, default=1.0, help="share of the usual number of jobs, for a quick look")
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.names if name not in BENCHES]:
        parser.error(f"there is no bench {unknown[0]!r}; there are {', '.join(BENCHES)}")
    try:
        asyncio.run(run_all(arguments.names or list(BENCHES), arguments.share))
    except KeyboardInterrupt:
        return 130
    except (ChildError, BenchFailure, aiohttp.ClientError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
