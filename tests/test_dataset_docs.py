"""The page on datasets names every problem there is, and none that is not."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCES = ("intake", "archives", "arrivals", "curation", "preflight_rules")
RAISED = r'(?:error|warning|Refused|refuse)\(\s*"(\w+)"|\bcode="(\w+)"|whole = "(\w+)" if .* else "(\w+)"'


def find_codes(source: str) -> set[str]:
    return {code for match in re.findall(RAISED, source) for code in match if code}


def test_codes_are_found_where_they_are_written() -> None:
    source = (
        'raise Refused("too_cold", name)\nwarning(\n    "too_hot", ())\nUnprocessable("x", code="too_wet")\nwhole = "a_b" if x else "c_d"'
    )
    assert find_codes(source) == {"too_cold", "too_hot", "too_wet", "a_b", "c_d"}


def test_the_page_names_every_problem() -> None:
    written = set[str]().union(*(find_codes((ROOT / "gateway" / "datasets" / f"{name}.py").read_text()) for name in SOURCES))
    page = (ROOT / "docs" / "datasets.md").read_text()
    assert len(written) > 35
    assert not {code for code in written if f"`{code}`" not in page}
    assert not set(re.findall(r"^\| `(\w+)` \|", page, re.M)) - written
