"""`python -m gateway doctor`: prints what was found. Exit status 1 where there is a fault."""

from __future__ import annotations

import argparse
import asyncio
import json
from collections import Counter
from collections.abc import Sequence

from gateway.doctor.examine import examine
from gateway.settings import Settings


def run_doctor(arguments: Sequence[str], settings: Settings) -> int:
    parser = argparse.ArgumentParser(prog="python -m gateway doctor", description="Look at all that a deployment stands on.")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.add_argument("--url", help="address by which callers reach the gateway, to try its streams; default PUBLIC_URL")
    asked = parser.parse_args(arguments)
    findings = asyncio.run(examine(settings, asked.url))
    counts = Counter(finding.state for finding in findings)
    if asked.json:
        print(json.dumps({"ok": not counts["fault"], "findings": [finding.model_dump() for finding in findings]}, indent=1))
    else:
        print("\n".join(finding.line() for finding in findings))
        print(f"{counts['fault']} faults, {counts['warning']} warnings, {counts['ok']} well, {counts['skipped']} skipped")
    return 1 if counts["fault"] else 0
