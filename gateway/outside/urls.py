"""The one way to URLs that callers name. Every hop's name is looked up once, every address of it judged, and the connection goes there.

It sends nothing of ours along (no key, no cookie, no proxy of the environment) and decodes nothing: what comes is bounded as it comes.
"""

from __future__ import annotations

import asyncio
import hashlib
import socket
import ssl
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager, contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from gateway.errors import UrlFailed, UrlRefused
from gateway.outside.addresses import Address, Disallowed, Exemptions, literal_address, parse_url, require_allowed, show_url

MAX_REDIRECTS = 3
REDIRECTS = frozenset({301, 302, 303, 307, 308})
CHUNK_BYTES = 1 << 20
# Nothing for that long is a dead sender, however much time there is in all.
IDLE_S = 30.0
# Names of strangers may take their time to resolve; the threads that wait for them are not those that S3 and Pillow need.
LOOKUP_THREADS = 16
USER_AGENT = "Fluxgate"
FOREIGN = (aiohttp.ClientError, OSError, ValueError)

LookUp = Callable[[str], Sequence[str]]


class Target(NamedTuple):
    """A URL that may be gone to, and where: nowhere else."""

    url: URL
    addresses: tuple[Address, ...]


class Wanted(NamedTuple):
    """What a fetch asks for, and within which bounds. `content_types` None: any."""

    url: str
    parameter: str
    max_bytes: int
    timeout_s: float
    content_types: Collection[str] | None


class Head(NamedTuple):
    content_type: str
    final_url: str


class Fetched(NamedTuple):
    content: bytes
    content_type: str
    final_url: str


class Saved(NamedTuple):
    """What a fetch wrote into a file."""

    size_bytes: int
    sha256: str
    content_type: str
    final_url: str


class _Pinned(AbstractResolver):
    """Answers with the addresses that were judged: no second lookup, so no second answer."""

    def __init__(self, target: Target) -> None:
        self._target = target

    async def resolve(self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC) -> list[ResolveResult]:
        if host != self._target.url.raw_host:
            raise OSError(f"{host} was not looked up")
        return [
            ResolveResult(
                hostname=host,
                host=str(address),
                port=port,
                family=socket.AF_INET if address.version == 4 else socket.AF_INET6,
                proto=0,
                flags=socket.AI_NUMERICHOST,
            )
            for address in self._target.addresses
        ]

    async def close(self) -> None:
        """Nothing is held."""


def look_up(host: str) -> list[str]:
    """The system's answer for a name. Blocks; raises OSError."""
    return sorted({str(entry[4][0]) for entry in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)})


class Outside:
    """Fetches from and posts to strangers. Raises UrlRefused for where it does not go, UrlFailed for what did not come."""

    def __init__(
        self, allow_private: Collection[str] = (), *, look_up: LookUp = look_up, ssl_context: ssl.SSLContext | None = None
    ) -> None:
        """`allow_private`: exempt `HOST:PORT` places and networks. `ssl_context`: whom to trust; by default whom the system trusts."""
        self._exempt, self._look_up = Exemptions(allow_private), look_up
        self._ssl: ssl.SSLContext | bool = ssl_context or True
        self._threads = ThreadPoolExecutor(LOOKUP_THREADS, thread_name_prefix="look-up")

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def check(self, url: str, *, parameter: str, timeout_s: float = 5.0) -> Target:
        """Where the URL leads, if it may be gone to."""
        try:
            parsed = parse_url(url)
            addresses = await self._resolve(parsed, timeout_s)
            require_allowed(parsed, addresses, self._exempt)
        except Disallowed as error:
            raise _refused(parameter, url, str(error)) from error
        except (OSError, UnicodeError) as error:
            raise _failed(parameter, url, "the name of its host does not resolve") from error
        return Target(parsed, addresses)

    async def _resolve(self, url: URL, timeout_s: float) -> tuple[Address, ...]:
        host = url.raw_host or ""
        if (address := literal_address(host)) is not None:
            return (address,)
        async with asyncio.timeout(timeout_s):
            found = await asyncio.get_running_loop().run_in_executor(self._threads, self._look_up, host)
        addresses = tuple(address for text in found if (address := literal_address(text)) is not None)
        if not addresses:
            raise OSError(f"{host} has no address")
        return addresses

    async def fetch(
        self, url: str, *, parameter: str, max_bytes: int, timeout_s: float = 30.0, content_types: Collection[str] | None = None
    ) -> Fetched:
        """What the URL gives, in memory. `content_types`: those allowed, `image/*` for a family; None for any."""
        content, head = bytearray(), Head("", "")
        async with aclosing(self._stream(Wanted(url, parameter, max_bytes, timeout_s, content_types))) as stream:
            async for piece in stream:
                head, chunk = piece
                content += chunk
        return Fetched(bytes(content), *head)

    async def fetch_to(
        self, path: Path, url: str, *, parameter: str, max_bytes: int, timeout_s: float, content_types: Collection[str] | None = None
    ) -> Saved:
        """What the URL gives, in a file that is new. After a failure there is no file; OSError when it cannot be written."""
        digest, size, head = hashlib.sha256(), 0, Head("", "")

        def write(file: BinaryIO, chunk: bytes) -> None:
            file.write(chunk)
            digest.update(chunk)

        with _new_file(path) as file:
            async with aclosing(self._stream(Wanted(url, parameter, max_bytes, timeout_s, content_types))) as stream:
                async for piece in stream:
                    head, chunk = piece
                    await asyncio.to_thread(write, file, chunk)
                    size += len(chunk)
        return Saved(size, digest.hexdigest(), *head)

    async def post(self, url: str, *, parameter: str, body: bytes, headers: Mapping[str, str], timeout_s: float) -> int:
        """The status that was answered; the answer itself is not read, and redirects are not followed."""
        try:
            async with asyncio.timeout(timeout_s):
                target = await self.check(url, parameter=parameter, timeout_s=timeout_s)
                async with self._session(target, timeout_s) as session:
                    async with session.post(target.url, data=body, headers=headers, allow_redirects=False) as response:
                        return response.status
        except FOREIGN as error:
            raise _failed(parameter, url, _describe(error, timeout_s)) from error

    @asynccontextmanager
    async def _session(self, target: Target, timeout_s: float) -> AsyncIterator[aiohttp.ClientSession]:
        """One connection to one place. Nothing is kept for the next, so nothing can be met again in another name."""
        async with aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(resolver=_Pinned(target), use_dns_cache=False, force_close=True, ssl=self._ssl),
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=timeout_s, sock_connect=10, sock_read=IDLE_S),
            headers={"User-Agent": USER_AGENT, "Accept-Encoding": "identity"},
            auto_decompress=False,
            read_bufsize=CHUNK_BYTES,
            trust_env=False,
        ) as session:
            yield session

    async def _stream(self, wanted: Wanted) -> AsyncGenerator[tuple[Head, bytes], None]:
        """The body of the last hop as it comes, each piece with the head. The clock runs over all hops and the reading."""
        end, hop = time.monotonic() + wanted.timeout_s, wanted.url
        try:
            for _ in range(MAX_REDIRECTS + 1):
                target = await self.check(hop, parameter=wanted.parameter)
                async with self._session(target, max(end - time.monotonic(), 0.001)) as session:
                    async with session.get(target.url, allow_redirects=False) as response:
                        if response.status not in REDIRECTS:
                            async for piece in _read(response, wanted):
                                yield piece
                            return
                        hop = _next_hop(target.url, response.headers.get("Location", ""), wanted)
        except FOREIGN as error:
            raise _failed(wanted.parameter, wanted.url, _describe(error, wanted.timeout_s)) from error
        raise _failed(wanted.parameter, wanted.url, f"it redirects more than {MAX_REDIRECTS} times")


@contextmanager
def _new_file(path: Path) -> Iterator[BinaryIO]:
    """A file that was not there before, and is not there after a failure."""
    with path.open("xb") as file:
        try:
            yield file
        except BaseException:  # boundary: whatever ended it, also a cancellation, leaves no half of a file
            path.unlink(missing_ok=True)
            raise


def _next_hop(here: URL, location: str, wanted: Wanted) -> str:
    if not location:
        raise _failed(wanted.parameter, wanted.url, "it redirects to nowhere")
    try:
        return str(here.join(URL(location, encoded=True)))
    except ValueError as error:
        raise _failed(wanted.parameter, wanted.url, "it redirects to what is no URL") from error


async def _read(response: aiohttp.ClientResponse, wanted: Wanted) -> AsyncIterator[tuple[Head, bytes]]:
    """The body in pieces, at least one; what a head declares is not believed."""
    head, seen = _require_head(response, wanted), 0
    yield head, b""
    async for chunk in response.content.iter_chunked(CHUNK_BYTES):
        seen += len(chunk)
        if seen > wanted.max_bytes:
            raise _too_large(wanted)
        yield head, chunk


def _require_head(response: aiohttp.ClientResponse, wanted: Wanted) -> Head:
    kind, allowed = response.content_type, wanted.content_types or ("*/*",)
    why = None
    if response.status != 200:
        why = f"it answered with status {response.status}"
    elif response.headers.get("Content-Encoding", "identity").strip().lower() != "identity":
        why = "it answered with a compressed body that was not asked for"
    elif not {kind, f"{kind.partition('/')[0]}/*", "*/*"} & set(allowed):
        why = f"it is {kind[:100]}; allowed are {', '.join(allowed)}"
    if why:
        raise _failed(wanted.parameter, wanted.url, why)
    if (response.content_length or 0) > wanted.max_bytes:
        raise _too_large(wanted)
    return Head(kind, show_url(str(response.url)))


def _too_large(wanted: Wanted) -> UrlFailed:
    return _failed(wanted.parameter, wanted.url, f"it is larger than {wanted.max_bytes} bytes")


def _describe(error: BaseException, timeout_s: float) -> str:
    """What went wrong, without the words of the foreign error: they name addresses."""
    if isinstance(error, TimeoutError):
        return f"it did not answer in full in {timeout_s:g} s"
    if isinstance(error, aiohttp.ClientConnectorCertificateError | aiohttp.ClientConnectorSSLError):
        return "its certificate is not trusted, or it speaks no TLS"
    if isinstance(error, aiohttp.ClientConnectorError):
        return "it cannot be reached"
    return "its answer broke off or is not HTTP"


def _refused(parameter: str, url: str, why: str) -> UrlRefused:
    return UrlRefused(f"{parameter}: the URL {why}.", details={"parameter": parameter, "value": show_url(url), "reason": why})


def _failed(parameter: str, url: str, why: str) -> UrlFailed:
    return UrlFailed(f"{parameter}: the URL did not work: {why}.", details={"parameter": parameter, "value": show_url(url), "reason": why})
