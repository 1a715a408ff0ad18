"""A few hundred requests made from the OpenAPI document. `make fuzz` makes thousands."""

from __future__ import annotations

from pathlib import Path

from tests.fuzz.__main__ import attack, deployed, list_surprises, list_unasked
from tests.fuzz.left import list_left


def test_no_request_of_the_document_is_answered_otherwise_than_it_says_and_none_leaves_anything(tmp_path: Path) -> None:
    with deployed(tmp_path) as target:
        status, cases = attack(target, 2, 1, "--phases", "fuzzing", "--no-color")
        assert (status, cases >= 200) == (0, True)
        assert [*list_unasked(target), *list_left(target), *list_surprises(target)] == []
