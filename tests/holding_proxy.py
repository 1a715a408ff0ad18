"""A proxy as tunnels are: it hands requests on, and holds the bodies of some methods back until they are whole."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx

PATIENCE_S = 60.0


class HoldingProxy(ThreadingHTTPServer):
    """In front of `target`. `asked` are the (method, path) that came; `dropped` answers are thrown away behind the gateway's back."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, target: str, holds: tuple[str, ...] = ()) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.target, self.holds = target, holds
        self.asked: list[tuple[str, str]] = []
        self.dropped = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that goes away while its answer is held is what this is about."""


class _Handler(BaseHTTPRequestHandler):
    server: HoldingProxy

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.asked.append((self.command, self.path))
        headers = {name: value for name, value in self.headers.items() if name.lower() not in ("host", "connection", "accept-encoding")}
        with httpx.stream(self.command, self.server.target + self.path, headers=headers, content=body, timeout=PATIENCE_S) as answer:
            is_held = self.command in self.server.holds
            pieces = [answer.read()] if is_held else answer.iter_bytes()
            if self.server.dropped:
                self.server.dropped -= 1
                answer.read()
                self.close_connection = True
                return
            self.send_response(answer.status_code)
            self.send_header("Content-Type", answer.headers.get("content-type", ""))
            self.end_headers()
            for piece in pieces:
                self.wfile.write(piece)
                self.wfile.flush()

    do_POST = do_GET

    def log_message(self, format: str, *args: object) -> None:
        """Silence: the tests read `asked`."""


@contextmanager
def proxied(target: str, *holds: str) -> Iterator[HoldingProxy]:
    proxy = HoldingProxy(target, holds)
    thread = threading.Thread(target=proxy.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.shutdown()
        thread.join()
        proxy.server_close()
