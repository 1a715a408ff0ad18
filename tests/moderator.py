"""A moderation endpoint as an operator would run one, and a function for `MODERATION=tests.moderator:judge`. Both refuse the same."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from PIL import Image, ImageStat

Json = dict[str, Any]
WORD = "forbidden"


def judge(case: Json) -> Json:
    """Refuses texts with the word, and pictures that are red."""
    if case["stage"] == "prompt":
        return {"allowed": not any(WORD in text for text in case["texts"]), "reason": "that word", "categories": ["words"]}
    with Image.open(io.BytesIO(case["picture"]["bytes"])) as picture:
        red, green, blue = ImageStat.Stat(picture.convert("RGB")).mean
    return {"allowed": not red > 200 > 100 > green + blue, "reason": "too red", "categories": ["red"]}


@dataclass
class Moderator:
    """`answers`: what it says instead of a verdict, one after the other: (status, body, seconds until it says it).

    `blind` to colours it refuses every picture.
    """

    url: str
    asked: list[Json] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    answers: list[tuple[int, bytes, float]] = field(default_factory=list)
    blind: bool = False

    def of(self, stage: str) -> list[Json]:
        return [case for case in self.asked if case["stage"] == stage]


@contextmanager
def running_moderator() -> Iterator[Moderator]:
    state = Moderator("")

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            case = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if case.get("picture"):
                case["picture"]["bytes"] = base64.b64decode(case["picture"]["base64"])
            state.asked.append(case)
            state.headers.append(dict(self.headers))
            verdict = {"allowed": False, "reason": "any", "categories": []} if state.blind and case.get("picture") else judge(case)
            status, body, pause_s = state.answers.pop(0) if state.answers else (200, json.dumps(verdict).encode(), 0.0)
            time.sleep(pause_s)
            with suppress(ConnectionError):
                self.send_response(status)
                if status == 302:
                    self.send_header("Location", state.url)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    state.url = f"http://127.0.0.1:{server.server_port}/judge"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
