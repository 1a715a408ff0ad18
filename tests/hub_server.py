"""A server that speaks the Hugging Face routes that are used here, and what it was asked."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

GATED = "black-forest-labs/FLUX.1-dev"
# As huggingface.co answers /api/models/{repository}/auth-check.
ANSWERS = {
    GATED: (403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to model is restricted."}),
    "nobody/nothing": (404, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}),
    "open/model": (200, {}),
    "busy/model": (503, {}),
}
WRONG_TOKEN = "Bearer hf_wrong"


COMMIT = "0" * 39 + "1"


@dataclass
class Hub:
    """`files` by `repository/path`. `cuts`: how many bytes each of the next answers is cut off after; with `stalls` the line stays open."""

    url: str
    asked: list[tuple[str, str | None]] = field(default_factory=list)
    licensed: set[str] = field(default_factory=set)
    files: dict[str, bytes] = field(default_factory=dict)
    fetched: list[tuple[str, str | None]] = field(default_factory=list)  # (file, Range) of every GET
    corrupt: set[str] = field(default_factory=set)
    cuts: list[int] = field(default_factory=list)
    stalls: bool = False
    accounts: dict[str, dict[str, Any]] = field(default_factory=dict)  # what whoami says of a token
    whoami: list[str] = field(default_factory=list)  # tokens it was asked about
    whoami_status: int | None = None  # instead of an answer
    woken: threading.Event = field(default_factory=threading.Event)


class _Handler(BaseHTTPRequestHandler):
    state: Hub

    def do_HEAD(self) -> None:
        self._resolve()

    def do_GET(self) -> None:
        token = self.headers.get("Authorization")
        if "/resolve/" in self.path:
            self._resolve()
            return
        if self.path == "/api/whoami-v2":
            self._say_whose((token or "").removeprefix("Bearer "))
            return
        if not self.path.startswith("/api/models/"):
            # huggingface_hub asks for lists of its own, and lives without.
            self._answer(404, {}, b"")
            return
        repository = self.path.removeprefix("/api/models/").removesuffix("/auth-check")
        self.state.asked.append((repository, token))
        status, headers = ANSWERS[repository]
        if token == WRONG_TOKEN:
            status, headers = 401, {"X-Error-Message": "Invalid credentials in Authorization header"}
        elif token in self.state.licensed:
            status, headers = 200, {}
        self._answer(status, headers, b"")

    def _say_whose(self, token: str) -> None:
        """As the hub does: with what the token may do. One that only has to be somebody's is."""
        self.state.whoami.append(token)
        facts = self.state.accounts.get(token, {"name": "somebody", "type": "user"})
        is_unknown = f"Bearer {token}" == WRONG_TOKEN or (bool(self.state.accounts) and token not in self.state.accounts)
        status = self.state.whoami_status or (401 if is_unknown else 200)
        self._answer(status, {}, json.dumps(facts).encode() if status == 200 else b"")

    def _resolve(self) -> None:
        """`/{owner}/{name}/resolve/{revision}/{path}`, as the hub answers it for a large file."""
        repository, _, rest = self.path.removeprefix("/").partition("/resolve/")
        name = f"{repository}/{rest.partition('/')[2]}"
        if repository == GATED and self.headers.get("Authorization") not in self.state.licensed:
            self._answer(*ANSWERS[GATED], b"")
        elif name not in self.state.files:
            self._answer(404, {"X-Error-Code": "EntryNotFound"}, b"")
        else:
            self._serve(name, self.state.files[name])

    def _serve(self, name: str, whole: bytes) -> None:
        asked = self.headers.get("Range")
        start = int(asked.removeprefix("bytes=").partition("-")[0]) if asked else 0
        body = whole[start:]
        self.send_response(206 if asked else 200)
        headers = {"X-Repo-Commit": COMMIT, "X-Linked-Size": str(len(whole)), "Content-Length": str(len(body)), "Accept-Ranges": "bytes"}
        if asked:
            headers["Content-Range"] = f"bytes {start}-{len(whole) - 1}/{len(whole)}"
        for key, value in {**headers, "ETag": f'"{hashlib.sha256(whole).hexdigest()}"'}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        self.state.fetched.append((name, asked))
        if name in self.state.corrupt:
            body = body[:-1] + bytes([body[-1] ^ 1])
        if self.state.cuts:
            body = body[: self.state.cuts.pop(0)]
            self.close_connection = True
        with contextlib.suppress(OSError):
            self.wfile.write(body)
            self.wfile.flush()
        if self.state.stalls:
            self.state.woken.wait(30)

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
        state.woken.set()
        server.shutdown()
        server.server_close()
        thread.join()
