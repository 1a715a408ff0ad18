"""What is hidden of texts that repeat a request, and what is left as it is."""

from __future__ import annotations

import json
import logging

import pytest

from gateway.errors import BadRequest
from gateway.redaction import hide_secrets, hide_user
from gateway.telemetry import JsonFormatter

LONG = "aB3_-" * 8


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"fg_0123456789ab_{LONG} and hf_{LONG}", "fg_0123456789ab_… and hf_…"),
        (f"'whsec_{LONG}+/=='", "'whsec_…'"),
        (f"< Authorization: Bearer {LONG}", "< Authorization: Bearer …"),
        ("https://user:pass@host.example/a/b.png?token=x&y=z#top", "https://…@host.example/a/b.png?…"),
        ("{'image': 'http://h/x?sig=1', 'n': 2}", "{'image': 'http://h/x?…', 'n': 2}"),
        ('"WebSocket /v1/generations/g/ws?ticket=abc" [accepted]', '"WebSocket /v1/generations/g/ws?…" [accepted]'),
        ("redis://:p@w@127.0.0.1:6379/0", "redis://…@127.0.0.1:6379/0"),
        ("redis:/user:pw@host", "redis:/…@host"),
        ("a red fox, is it? yes: bearer of news, mail me@home", "a red fox, is it? yes: bearer of news, mail me@home"),
        ("#1 and fg_short hf_x", "#1 and fg_short hf_x"),
    ],
)
def test_what_is_known_as_a_secret_is_hidden(text: str, shown: str) -> None:
    assert hide_secrets(text) == shown


@pytest.mark.parametrize("given", ["redis://:p/w@host:1/0", "p w@host:1/0", ":pw@@host:1/0"])
def test_an_operators_address_loses_all_before_its_host(given: str) -> None:
    assert hide_user(given) == f"…@{given.rpartition('@')[2]}"


def test_an_error_repeats_no_secret_wherever_it_stands() -> None:
    details = {"value": [{"url": "https://h/x?token=abc"}], "n": 1}
    error = BadRequest("no: https://h/x?token=abc", details=details)
    assert error.body()["error"]["details"] == {"value": [{"url": "https://h/x?…"}], "n": 1}
    assert error.message == "no: https://h/x?…"


def test_a_log_line_stays_json() -> None:
    record = logging.LogRecord("x", logging.INFO, "f", 1, 'said "%s" \\', ("/a?ticket=b\n/c?d",), None)
    assert json.loads(JsonFormatter().format(record))["message"] == 'said "/a?…\n/c?…" \\'
