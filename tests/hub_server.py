"""A server that speaks the Hugging Face routes that are used here, and what it was asked."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

GATED = "black-forest-labs/FLUX.1-dev"
# As huggingface.co answers /api/models/{repository}/auth-check.
ANSWERS = {
    GATED: (403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to model is restricted."}),
    "nobody/nothing": (404, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}),
    "open/model": (200, {}),
    "busy/model": (503, {}),
}
WRONG_TOKEN = "Bearer hf_wrong"


@dataclass
class Hub:
    url: str
    asked: list[tuple[str, str | None]] = field(default_factory=list)
    licensed: set[str] = field(default_factory=set)


class _Handler(BaseHTTPRequestHandler):
    state: Hub

    def do_GET(self) -> None:
        token = self.headers.get("Authorization")
        if self.path == "/api/whoami-v2":
            self._answer(401 if token == WRONG_TOKEN else 200, {}, b'{"name": "somebody", "type": "user"}')
            return
        repository = self.path.removeprefix("/api/models/").removesuffix("/auth-check")
        self.state.asked.append((repository, token))
        status, headers = ANSWERS[repository]
        if token == WRONG_TOKEN:
            status, headers = 401, {"X-Error-Message": "Invalid credentials in Authorization header"}
        elif token in self.state.licensed:
            status, headers = 200, {}
        self._answer(status, headers, b"")

    def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Type": "application/json", "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Silent."""


@contextmanager
def running_hub() -> Iterator[Hub]:
    class Handler(_Handler):
        pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Handler.state = state = Hub(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
