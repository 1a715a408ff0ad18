"""The log of a running trainer: its lines as they come, the last of them, and no secret in any."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable
from pathlib import Path

TAIL_LINES = 50
LONGEST_LINE = 2000  # characters; the rest of a line is cut
READ_BYTES = 2**20  # at a time
LINE_END = re.compile(rb"\r\n|\n|\r")
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[\x00-\x08\x0b-\x1f\x7f]")
# torch's compiler names some twenty of these at import, which would push what matters out of the tail.
NOISE = re.compile(r"Registered template heuristic")
HIDDEN = "***"
SHORTEST_SECRET = 6  # shorter values would blot out words
SECRET_SHAPES = (
    re.compile(r"\bhf_[A-Za-z0-9]{16,}"),
    re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"),
    re.compile(r"(?<=[?&]X-Amz-Signature=)\w+"),
    re.compile(r"(?i)(?<=bearer )[\w.~+/=-]{8,}"),
    re.compile(r"(?<=://)[^\s/@:]*:[^\s/@]+(?=@)"),
    re.compile(r"(?<=/hook/)[\w-]{16,}"),
)


def hide_secrets(text: str, secrets: Iterable[str] = ()) -> str:
    """The text without these values, and without what looks like a token, a signed URL's signature or a password in a URL."""
    for secret in secrets:
        if len(secret) >= SHORTEST_SECRET:
            text = text.replace(secret, HIDDEN)
    for shape in SECRET_SHAPES:
        text = shape.sub(HIDDEN, text)
    return text


class LogReader:
    """Follows a file that somebody else writes, from its present end. A bar that is drawn over and over counts as one line of the tail."""

    def __init__(self, path: Path, secrets: Iterable[str] = ()) -> None:
        self._file = path.open("rb")
        self._file.seek(0, 2)
        self._secrets = tuple(secrets)
        self._partial = b""
        self._overwritten = False
        self._tail: deque[str] = deque(maxlen=TAIL_LINES)

    def read_lines(self) -> list[str]:
        """What was completed since the last call; also each state of a progress bar, which ends in a carriage return."""
        return self._split(self._file.read(READ_BYTES))

    def _split(self, chunk: bytes) -> list[str]:
        content = self._partial + chunk
        lines: list[str] = []
        start = 0
        for end in LINE_END.finditer(content):
            if end.end() == len(content) and end[0] == b"\r":
                break  # perhaps the half of \r\n
            self._add(content[start : end.start()], lines, is_overwritten=end[0] == b"\r")
            start = end.end()
        self._partial = content[start:]
        if len(self._partial) > READ_BYTES:
            self._add(self._partial, lines, is_overwritten=False)
            self._partial = b""
        return lines

    def read_rest(self) -> list[str]:
        """All that is left, when nobody writes any more."""
        lines: list[str] = []
        while chunk := self._file.read(READ_BYTES):
            lines += self._split(chunk)
        if self._partial:
            self._add(self._partial.rstrip(b"\r"), lines, is_overwritten=False)
            self._partial = b""
        return lines

    def tail(self) -> str:
        return "\n".join(self._tail)

    def close(self) -> None:
        self._file.close()

    def _add(self, raw: bytes, lines: list[str], *, is_overwritten: bool) -> None:
        line = ESCAPES.sub("", raw.decode(errors="replace"))[:LONGEST_LINE].rstrip()
        if not line:
            self._overwritten = self._overwritten and is_overwritten
            return
        was_overwritten, self._overwritten = self._overwritten, is_overwritten
        line = hide_secrets(line, self._secrets)
        lines.append(line)
        if NOISE.search(line):
            return
        if was_overwritten and self._tail:
            self._tail.pop()
        self._tail.append(line)
