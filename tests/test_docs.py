"""Documentation that fails the build: the generated pages are those of this code, and the commands the README names exist."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main

from docs.generate import PAGES, collect_codes, find_codes, find_stale, read_openapi
from gateway.jobs.model import EventKind
from gateway.settings import Settings

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def test_generated_pages_are_current() -> None:
    stale = find_stale(DOCS)
    assert not stale, f"{', '.join(stale)} are not what the code says now; run `make docs`"


def test_a_changed_page_is_stale(tmp_path: Path) -> None:
    for name in PAGES:
        (tmp_path / name).write_text((DOCS / name).read_text())
    (tmp_path / "settings.md").write_text((DOCS / "settings.md").read_text().replace("`PORT`", "`PROT`"))
    (tmp_path / "routes.md").unlink()
    assert set(find_stale(tmp_path)) >= {"settings.md", "routes.md"}


def find_unsaid(words: Iterator[str] | list[str], page: str) -> list[str]:
    return [word for word in words if f"`{word}`" not in page]


def test_everything_has_its_place_in_the_pages() -> None:
    routes = list(read_openapi()["paths"])
    codes = {code.code for code in collect_codes() if code.code}
    assert not find_unsaid([name.upper() for name in Settings.model_fields], (DOCS / "settings.md").read_text())
    assert not find_unsaid(sorted(codes), (DOCS / "errors.md").read_text())
    assert not find_unsaid([kind.value for kind in EventKind], (DOCS / "events.md").read_text())
    assert not find_unsaid(routes, (DOCS / "routes.md").read_text())
    assert find_unsaid(["PORT", "PROT"], "| `PORT` | 8000 |") == ["PROT"]


@pytest.mark.parametrize(
    ("source", "code"),
    [
        ('class Cold(FluxgateError):\n    code = "too_cold"', "too_cold"),
        ('class Cold(FluxgateError):\n    code: str = "too_cold"', "too_cold"),
        ('raise NotFound(f"no {name}", code="too_cold")', "too_cold"),
        ('raise DeadlinePassed("too_cold", "It froze.")', "too_cold"),
    ],
)
def test_codes_are_found_where_they_are_written(source: str, code: str) -> None:
    assert code in {found.code for found in find_codes(source)}


def test_every_setting_says_what_it_is_for() -> None:
    assert not [name for name, field in Settings.model_fields.items() if not (field.description or "").endswith(".")]


def test_decisions_are_half_a_page_of_context_decision_and_consequences() -> None:
    pages = sorted((DOCS / "decisions").glob("*.md"))
    assert [page.name[:3] for page in pages] == [f"{number:03}" for number in range(1, len(pages) + 1)]
    for page in pages:
        text = page.read_text()
        assert [title for title in ("## Context", "## Decision", "## Consequences") if title not in text] == [], page.name
        assert len(text.split()) <= 500, f"{page.name} is longer than half a page"


# -- commands --------------------------------------------------------------------------------------------------


def read_commands(text: str) -> set[tuple[str, str]]:
    """(`make` or `fluxgate`, its first word) of every command in code: fenced blocks and `inline` pieces."""
    fences = re.findall(r"^```\w*\n(.*?)^```", text, re.S | re.M)
    inline = re.findall(r"(?<!`)`([^`\n]+)`(?!`)", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M))
    lines = [line for piece in [*fences, *inline] for line in piece.splitlines()]
    found = [re.match(r"(?:\$ )?(?:[A-Z_]+=\S+ )*(make|fluxgate) ([a-z][\w-]*)", line.strip()) for line in lines]
    return {(match[1], match[2]) for match in found if match}


def list_commands() -> set[tuple[str, str]]:
    makefile = ROOT / "Makefile"
    targets = re.findall(r"^([a-z][\w-]*):", makefile.read_text(), re.M) if makefile.is_file() else []
    command = typer.main.get_command(importlib.import_module("fluxgate.cli").app)
    return {("make", target) for target in targets} | {("fluxgate", name) for name in getattr(command, "commands", {})}


def test_commands_in_the_docs_exist() -> None:
    pages = [ROOT / "README.md", *DOCS.rglob("*.md")]
    named = {command for page in pages if page.is_file() for command in read_commands(page.read_text())}
    unknown = named - list_commands()
    assert not unknown, f"named in the docs, but not there: {sorted(' '.join(command) for command in unknown)}"


def test_commands_are_read_from_code_only() -> None:
    text = "We make tea. Run `make test`, or:\n```sh\n$ PORT=1 make run\nfluxgate generate 'x' -o y.png\n```\nfluxgate is nice"
    assert read_commands(text) == {("make", "test"), ("make", "run"), ("fluxgate", "generate")}
