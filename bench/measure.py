"""Numbers and their tables: percentiles, CPU time of processes, aligned columns. It knows no server."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Summary:
    """Of a series, in its own unit."""

    p50: float
    p95: float
    p99: float
    mean: float
    largest: float


def summarize(values: Sequence[float]) -> Summary:
    """Nearest-rank percentiles. Raises ValueError for an empty series."""
    if not values:
        raise ValueError("nothing was measured")
    ordered = sorted(values)
    return Summary(_pick(ordered, 0.5), _pick(ordered, 0.95), _pick(ordered, 0.99), sum(ordered) / len(ordered), ordered[-1])


def _pick(ordered: Sequence[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def read_cpu_s(pid: int) -> float | None:
    """CPU seconds a process has used so far, its threads included; None where the system has no /proc."""
    stat = Path(f"/proc/{pid}/stat")
    if not stat.exists():
        return None
    # The program's name stands in brackets and may hold spaces; user and system ticks are fields 14 and 15.
    fields = stat.read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def read_rss_bytes(pid: int) -> int | None:
    """Memory a process has in RAM; None where the system has no /proc."""
    statm = Path(f"/proc/{pid}/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else None


def read_busy_s() -> float | None:
    """CPU seconds the whole machine has worked so far, over all cores; None where the system has no /proc."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return None
    # user nice system idle iowait irq softirq steal, in ticks; waiting for a disk is no work.
    ticks = [int(field) for field in stat.read_text().split("\n", 1)[0].split()[1:9]]
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as needed; the first to the left, the others to the right."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    lines = [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width) for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in (header, *rows)
    ]
    return "\n".join(line.rstrip() for line in lines)
