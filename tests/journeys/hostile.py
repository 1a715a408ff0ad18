"""All hostile requests, and which of them stand for which hostile thing: `python -m tests.journeys.hostile` prints it."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path

from tests.journeys.hostile_heads import FOREIGN, HEADERS, TICKETS, WIRE
from tests.journeys.hostile_requests import BODIES, FILES, NAMES, OUTSIDE, Row

ROOT = Path(__file__).parents[2]
TABLE_TESTS = "tests/journeys/test_hostile_inputs.py"
SECTIONS: dict[str, list[Row]] = {
    "outside": OUTSIDE,
    "files": FILES,
    "names": NAMES,
    "bodies": BODIES,
    "headers": HEADERS,
    "tickets": TICKETS,
    "foreign": FOREIGN,
}
TABLE = [(section, row) for section, rows in SECTIONS.items() for row in rows]

# -- which rows stand for what: titles of rows (`section: title`, * for any), of WIRE (`wire: title`), or a test elsewhere ---------
WORDS: dict[str, tuple[str, ...]] = {
    "SSRF": ("outside: *",),
    "SSRF by redirects": ("outside: a redirect to *", "tests/test_outside.py::test_a_redirect_is_judged_like_the_first_url"),
    "SSRF by DNS rebinding": ("outside: a rebound name*", "tests/test_edge.py::test_a_rebound_name_is_refused"),
    "SSRF in IPv6 forms": ("outside: *IPv6*", "outside: 6to4 as *", "outside: IPv4 behind NAT64 as *"),
    "SSRF in decimal, octal and hexadecimal forms": (
        *(
            "outside: a decimal *",
            "outside: an octal *",
            "outside: a hexadecimal *",
            "outside: a short *",
            "outside: metadata as a decimal *",
        ),
        "outside: a redirect to decimal",
    ),
    "SSRF to the metadata address": ("outside: metadata*", "outside: a redirect to metadata"),
    "zip bombs": ("files: a zip bomb", "files: a zip that lies about its size"),
    "pixel bombs": ("files: 3.6 billion pixels as picture", "files: a bomb of text as picture", "files: a pixel bomb as an edit's picture"),
    "path tricks in every name": ("names: *", "files: a zip that leads out", "files: a zip with *"),
    "path tricks in raw graphs": ("names: LoadImage of *", "names: SaveImage to *", "names: an output of another"),
    "SVG": ("files: an SVG*",),
    "polyglots": (
        "files: a polyglot *",
        "files: an SVG that says it is a PNG as picture",
        f"{TABLE_TESTS}::test_a_polyglot_reaches_comfyui_as_a_picture_alone",
    ),
    "huge JSON": ("bodies: too large*", "bodies: a number of 5,000 digits", "bodies: JSON that says it is files"),
    "deeply nested JSON": ("bodies: 60,000 lists in one another", "bodies: the same *"),
    "header injection": (
        "headers: lines in *",
        "headers: a page as Host",
        "headers: a path in Host",
        "wire: *header*",
        "wire: two hosts",
        f"{TABLE_TESTS}::test_no_text_of_a_caller_becomes_a_header",
    ),
    "template injection": (
        "bodies: a template as *",
        "tests/journeys/test_hostile_prompts.py::test_it_reaches_the_node_unchanged_and_changes_nothing_else",
    ),
    "foreign ids on every route": ("foreign: *", "tests/journeys/test_isolation.py::test_a_foreign_id_is_as_absent_as_one_that_never_was"),
    "timing of key checks": ("tests/test_key_timing.py::test_every_wrong_key_is_compared_as_the_right_one_is",),
    "key in query": ("headers: a key in the query*", "tests/test_edge.py::test_a_key_in_an_address_is_refused_and_not_logged"),
    "unsigned tickets": ("tickets: an unsigned one*", "tickets: one signed by nobody we know", "tickets: a signature alone"),
    "expired tickets": ("tickets: an expired one*",),
    "replayed tickets": ("tickets: one replayed *", "tickets: a good one again*"),
}


def find_rows(pattern: str) -> list[str]:
    """Ids of the rows, or the test, that a line of WORDS names."""
    if pattern.startswith("tests/"):
        path, _, name = pattern.partition("::")
        return [pattern] if f"def {name}(" in (ROOT / path).read_text() else []
    ids = [f"{section}: {row.title}" for section, row in TABLE] + [f"wire: {title}" for title in WIRE]
    return [row for row in ids if fnmatchcase(row, pattern)]


def main() -> None:
    for word, patterns in WORDS.items():
        found = [row for pattern in patterns for row in find_rows(pattern)]
        print(f"{word}: {len(found)}")
        print("".join(f"    {row}\n" for row in found), end="")
    print(f"{len(TABLE)} requests, {len(WIRE)} that are none")


if __name__ == "__main__":
    main()
