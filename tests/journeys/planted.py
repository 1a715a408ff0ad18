"""Secrets that are planted in a deployment, and where traces of them are looked for: answers, logs and other files, Redis, pictures."""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from secrets import token_hex
from typing import Any

import httpx
import redis
from PIL import Image

Place = str


def _draw(beginning: str) -> str:
    return f"{beginning}{token_hex(20)}"


@dataclass
class Planted:
    """(what it is, the secret) of all that nobody but its owner may read anywhere."""

    secrets: list[tuple[str, bytes]] = field(default_factory=list)

    def draw(self, name: str, beginning: str = "planted") -> str:
        """A new one."""
        return self.keep(name, _draw(beginning))

    def keep(self, name: str, secret: str) -> str:
        """One that somebody else drew."""
        self.keep_bytes(name, secret.encode())
        return secret

    def keep_bytes(self, name: str, secret: bytes) -> None:
        assert len(secret) >= 20, f"{name} is too short to be told from chance"
        self.secrets.append((name, secret))

    def find(self, places: Mapping[Place, bytes] | Iterator[tuple[Place, bytes]]) -> set[tuple[str, Place]]:
        """(what, where) of each trace."""
        pairs = places.items() if isinstance(places, Mapping) else places
        return {(name, place) for place, said in pairs for name, secret in self.secrets if secret in said}


@dataclass
class Heard:
    """All that a gateway answered, by `METHOD path status`."""

    answers: dict[Place, bytes] = field(default_factory=dict)

    def note(self, answer: httpx.Response) -> None:
        answer.read()
        place = f"{answer.request.method} {answer.request.url.path} {answer.status_code} #{len(self.answers)}"
        self.answers[place] = str(dict(answer.headers)).encode() + answer.content

    def client(self, url: str, key: str | None) -> httpx.Client:
        """A caller all of whose answers are noted."""
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return httpx.Client(base_url=url, headers=headers, timeout=60.0, event_hooks={"response": [self.note]})


def _unpack(value: bytes) -> bytes:
    """Also what the queue of the trainer keeps, which is compressed."""
    with suppress(zlib.error):
        return value + zlib.decompress(value)
    return value


def read_redis(url: str) -> Iterator[tuple[Place, bytes]]:
    """Every value, by `key` or `key field`."""
    with redis.Redis.from_url(url) as connection:
        for raw in connection.scan_iter():
            assert isinstance(raw, bytes)
            name, kind = raw.decode(errors="replace"), connection.type(raw).decode()
            yield "the names of keys", raw
            for place, value in _read_key(connection, raw, kind):
                yield f"{name} {place}".strip(), _unpack(value)


def _read_key(connection: Any, name: bytes, kind: str) -> Iterator[tuple[str, bytes]]:
    if kind == "string":
        yield "", connection.get(name) or b""
    elif kind == "hash":
        for key, value in connection.hgetall(name).items():
            yield key.decode(errors="replace"), key + b" " + value
    elif kind == "list":
        yield "", b"\n".join(connection.lrange(name, 0, -1))
    elif kind == "set":
        yield "", b"\n".join(connection.smembers(name))
    elif kind == "zset":
        yield "", b"\n".join(connection.zrange(name, 0, -1))
    else:
        assert kind == "stream", f"{name!r} is a {kind}, which nobody reads here"
        for _, fields in connection.xrange(name):
            yield "", b"\n".join(part for pair in fields.items() for part in pair)


def read_files(folder: Path, *without: str) -> Iterator[tuple[Place, bytes]]:
    """Every file below, pictures with the texts in them unpacked; `without` what begins so."""
    for path in folder.rglob("*"):
        place = str(path.relative_to(folder))
        if path.is_file() and not place.startswith(without):
            body = path.read_bytes()
            yield place, body + read_texts(body)


def read_texts(body: bytes) -> bytes:
    """What a picture says beside its pixels, compressed texts and EXIF too; nothing for what is no picture."""
    said: dict[str, Any] = {}
    with suppress(OSError, SyntaxError, ValueError), Image.open(io.BytesIO(body)) as image:
        image.load()
        said = {"info": image.info, "exif": dict(image.getexif())}
    return repr(said).encode()
