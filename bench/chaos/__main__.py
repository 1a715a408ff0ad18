"""`python -m bench.chaos --jobs 1000 --seed 1 [--seed 2 ...]`: a storm over a whole deployment, and whether everything is accounted for.

Four engines, two gateways, two dispatchers, Redis and S3 are killed, paused and restarted while jobs come in. The same seed draws the
same requests and the same faults at the same times. Ends with 1 when any promise was broken; the logs are kept then.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import shutil
import sys
import tempfile
import time
from pathlib import Path

from bench.chaos.storm import JOBS_PER_S, describe, run_storm
from local.child import ChildError


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.chaos", description="Kill everything, lose nothing.")
    parser.add_argument("--jobs", type=int, default=1000)
    parser.add_argument("--seed", type=int, action="append", help="repeatable; 1 when absent")
    parser.add_argument("--rate", type=float, default=JOBS_PER_S, help="requests per second")
    parser.add_argument("--verbose", action="store_true", help="tell each fault as it comes")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO if arguments.verbose else logging.WARNING, format="%(message)s")
    wrong = False
    for seed in arguments.seed or [1]:
        folder, start = Path(tempfile.mkdtemp(prefix=f"chaos-{seed}-")), time.monotonic()
        try:
            found = asyncio.run(run_storm(folder, seed, arguments.jobs, arguments.rate))
        except ChildError as error:
            print(f"chaos: {error}", file=sys.stderr)
            return 1
        print(describe(seed, found, time.monotonic() - start), flush=True)
        if found.wrongs:
            wrong = True
            print(f"  logs: {folder}", flush=True)
        else:
            shutil.rmtree(folder)
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
