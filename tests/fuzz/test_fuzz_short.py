"""A few hundred requests made from the OpenAPI document. `make fuzz` makes thousands."""

from __future__ import annotations

from pathlib import Path

from tests.fuzz.__main__ import attack, deployed, list_surprises
from tests.fuzz.left import list_left


def test_no_request_of_the_document_is_answered_otherwise_than_it_says_and_none_leaves_anything(tmp_path: Path) -> None:
    with deployed(tmp_path) as target:
        assert attack(target, 4, 1, "--phases", "fuzzing", "--no-color") == 0
        assert [*list_left(target), *list_surprises(target)] == []
