"""A receiver of webhooks, as a customer would run one: a real HTTP server that keeps what came and answers as it is told to."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import standardwebhooks

SECRET = "whsec_" + "MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"


@dataclass(frozen=True)
class Received:
    path: str
    headers: dict[str, str]
    body: bytes

    def open(self, secret: str = SECRET) -> dict[str, Any]:
        """What was told, after the library's own check of signature and time. Raises WebhookVerificationError."""
        return dict(standardwebhooks.Webhook(secret).verify(self.body, self.headers))


@dataclass
class Receiver:
    """Answers with `status`, when `gate` is open."""

    port: int = 0
    status: int = 204
    location: str | None = None
    received: list[Received] = field(default_factory=list)
    gate: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.gate.set()

    def url(self, path: str = "/hook") -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    def told(self, job_id: str) -> list[Received]:
        return [one for one in self.received if json.loads(one.body)["id"] == job_id]

    @contextmanager
    def listening(self) -> Iterator[Receiver]:
        """Up while inside; it keeps its port, so that it can be down and up again."""
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                receiver.received.append(Received(self.path, dict(self.headers), body))
                receiver.gate.wait(30)
                self.send_response(receiver.status)
                if receiver.location:
                    self.send_header("Location", receiver.location)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                """Quiet."""

        server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        server.daemon_threads = True
        self.port = server.server_address[1]
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield self
        finally:
            self.gate.set()
            server.shutdown()
            server.server_close()
            thread.join()
