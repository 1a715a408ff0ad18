"""A loopback HTTP server that takes a trainer's webhook calls and keeps them until they are asked for.

It answers before anybody has looked: the trainer waits for each answer. It refuses to know what the payloads mean.
"""

from __future__ import annotations

import json
import queue
import secrets
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

LARGEST_BODY_BYTES = 64 * 2**20  # a validation picture of 1024 px is some 2 MB in base64, a clip some 10
MOST_WAITING = 2000
MOST_WAITING_BYTES = 256 * 2**20
READ_TIMEOUT_S = 5  # SimpleTuner gives up on a call after as long
NOISE = "log.message"  # every log line once more


class WebhookSink:
    """`with WebhookSink() as sink`: give `sink.url` to the trainer, then ask `drain` now and then."""

    def __init__(self) -> None:
        self.secret = secrets.token_urlsafe(24)
        self.dropped = 0  # payloads that came while too many were waiting
        self._waiting: queue.SimpleQueue[tuple[int, dict[str, Any]]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._waiting_bytes = 0
        self._server = SinkServer(self)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.1}, name="webhook-sink", daemon=True)

    @property
    def url(self) -> str:
        """No header can be asked of the trainer, so the path is the secret."""
        return f"http://127.0.0.1:{self._server.server_port}{self.path}"

    @property
    def path(self) -> str:
        return f"/hook/{self.secret}"

    def keep(self, payload: dict[str, Any], size_bytes: int) -> None:
        with self._lock:
            is_full = self._waiting.qsize() >= MOST_WAITING or self._waiting_bytes + size_bytes > MOST_WAITING_BYTES
            if is_full:
                self.dropped += 1
                return
            self._waiting_bytes += size_bytes
            self._waiting.put((size_bytes, payload))

    def drain(self) -> list[dict[str, Any]]:
        """The payloads that came since the last call, oldest first; returns at once."""
        payloads: list[dict[str, Any]] = []
        while True:
            try:
                size_bytes, payload = self._waiting.get_nowait()
            except queue.Empty:
                return payloads
            with self._lock:
                self._waiting_bytes -= size_bytes
            payloads.append(payload)

    def __enter__(self) -> WebhookSink:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class SinkServer(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self, sink: WebhookSink) -> None:
        self.sink = sink
        super().__init__(("127.0.0.1", 0), SinkHandler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A caller that went away in mid-call is no news: the trainer may be ending."""


class SinkHandler(BaseHTTPRequestHandler):
    server: SinkServer
    timeout = READ_TIMEOUT_S

    def do_POST(self) -> None:
        sink = self.server.sink
        if not secrets.compare_digest(self.path.encode(), sink.path.encode()):
            self.refuse(404)
            return
        length = self.headers.get("Content-Length", "")
        if not length.isascii() or not length.isdigit():
            self.refuse(411)
            return
        if int(length) > LARGEST_BODY_BYTES:
            self.refuse(413)
            return
        body = self.rfile.read(int(length))
        try:
            payload = json.loads(body)
        except (ValueError, RecursionError):
            payload = None
        if not isinstance(payload, dict):
            self.refuse(400)
            return
        if payload.get("type") != NOISE:
            sink.keep(payload, len(body))
        self.answer(204)

    def refuse(self, status: int) -> None:
        # What was not read cannot be told from a next call.
        self.close_connection = True
        self.answer(status)

    def answer(self, status: int) -> None:
        self.send_response_only(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Silent: the secret is in the path."""
