"""Fetching from and posting to strangers: what happens on the way, and that what comes is bounded. Over real sockets and real TLS."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest
import trustme
from aiohttp import web

from gateway.errors import UrlFailed, UrlRefused
from gateway.outside.urls import FOREIGN, Outside
from local.child import pick_free_port
from tests.test_errors import descend

# -- on the way ------------------------------------------------------------------------------------------------

Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


@asynccontextmanager
async def stranger(answer: Answer, host: str = "127.0.0.1", port: int = 0, tls: ssl.SSLContext | None = None) -> AsyncIterator[str]:
    """A server that answers everything in one way; its `host:port`."""
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    port = port or pick_free_port()
    await web.TCPSite(runner, host, port, ssl_context=tls).start()
    try:
        yield f"{host}:{port}"
    finally:
        await runner.cleanup()


@asynccontextmanager
async def raw_stranger(answer: bytes, *, drip_s: float = 0.0, is_closing: bool = True) -> AsyncIterator[str]:
    """A server that sends these bytes whatever is asked, one by one where `drip_s` is given."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        try:
            for piece in [answer[i : i + 1] for i in range(len(answer))] if drip_s else [answer]:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(drip_s)
            if not is_closing:
                await reader.read()
        except ConnectionError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield "127.0.0.1:{1}".format(*server.sockets[0].getsockname())
    finally:
        server.close()
        await server.wait_closed()


@pytest.fixture
async def outside() -> AsyncIterator[Outside]:
    """One that may go to this machine, by http."""
    outside = Outside(["127.0.0.0/29"])
    yield outside
    outside.close()


async def give(request: web.Request) -> web.StreamResponse:
    return web.Response(body=b"picture", content_type="image/png")


async def test_what_a_url_gives(outside: Outside, monkeypatch: pytest.MonkeyPatch) -> None:
    """And that nothing of ours goes along: no cookie that was set, no proxy and no password of the environment."""
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    seen = list[web.Request]()

    async def give_with_cookie(request: web.Request) -> web.StreamResponse:
        seen.append(request)
        answer = web.Response(body=b"picture", content_type="image/png")
        answer.set_cookie("who", "you")
        return answer

    async with stranger(give_with_cookie) as host:
        for _ in range(2):
            fetched = await outside.fetch(f"http://{host}/a.png?secret=1", parameter="image", max_bytes=7, content_types=["image/*"])
    assert fetched == (b"picture", "image/png", f"http://{host}/a.png")
    assert [set(request.headers) for request in seen] == [{"Host", "User-Agent", "Accept-Encoding", "Accept", "Connection"}] * 2
    assert seen[0].headers["Host"] == host
    assert seen[0].query_string == "secret=1"


async def test_a_name_is_looked_up_once_and_the_connection_goes_there() -> None:
    """A name that leads somewhere else at each lookup (rebinding) gains nothing by it."""
    lookups = list[str]()

    def look_up(host: str) -> list[str]:
        lookups.append(host)
        return ["127.0.0.2"] if len(lookups) == 1 else ["127.0.0.1"]

    async def betray(request: web.Request) -> web.StreamResponse:
        return web.Response(text="secret")

    outside = Outside(["127.0.0.2/32"], look_up=look_up)
    async with stranger(give, "127.0.0.2") as host, stranger(betray, "127.0.0.1", int(host.split(":")[1])):
        url = f"http://rebinding.example:{host.split(':')[1]}/"
        assert (await outside.fetch(url, parameter="image", max_bytes=100)).content == b"picture"
        assert lookups == ["rebinding.example"]
        with pytest.raises(UrlRefused, match="loopback"):
            await outside.fetch(url, parameter="image", max_bytes=100)
    outside.close()


async def test_tls_sees_the_name_and_not_the_address() -> None:
    authority = trustme.CA()
    server_tls, trust = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH), ssl.create_default_context()
    authority.issue_cert("pictures.example").configure_cert(server_tls)
    authority.configure_trust(trust)
    asked = list[str | None]()
    server_tls.sni_callback = lambda connection, name, context: asked.append(name)
    hosts = list[str]()

    async def note_host(request: web.Request) -> web.StreamResponse:
        hosts.append(request.host)
        return await give(request)

    outside = Outside(["127.0.0.1/32"], look_up=lambda host: ["127.0.0.1"], ssl_context=trust)
    async with stranger(note_host, tls=server_tls) as place:
        port = place.split(":")[1]
        assert (await outside.fetch(f"https://pictures.example:{port}/", parameter="image", max_bytes=100)).content == b"picture"
        assert (asked, hosts) == (["pictures.example"], [f"pictures.example:{port}"])
        with pytest.raises(UrlFailed, match="certificate"):
            await outside.fetch(f"https://other.example:{port}/", parameter="image", max_bytes=100)
    outside.close()


def send_on(location: str) -> Answer:
    async def answer(request: web.Request) -> web.StreamResponse:
        raise web.HTTPFound(location.format(host=request.host)) if location else web.HTTPFound("/")

    return answer


@pytest.mark.parametrize(
    "location",
    [
        "http://169.254.169.254/latest/meta-data/",
        "http://localhost:6379/",
        "https://[::1]/",
        "file:///etc/passwd",
        "//user:pw@{host}/",
        "https://2130706433/",
    ],
)
async def test_a_redirect_is_judged_like_the_first_url(location: str) -> None:
    async with stranger(send_on(location)) as host:
        outside = Outside([host])
        with pytest.raises(UrlRefused):
            await outside.fetch(f"http://{host}/", parameter="image", max_bytes=100)
        outside.close()


async def test_three_redirects_are_followed_and_no_fourth(outside: Outside) -> None:
    async def count_down(request: web.Request) -> web.StreamResponse:
        left = int(request.path[1:])
        if left:
            raise web.HTTPTemporaryRedirect(f"{left - 1}" if left % 2 else f"http://{request.host}/{left - 1}")
        return await give(request)

    async with stranger(count_down) as host:
        fetched = await outside.fetch(f"http://{host}/3", parameter="image", max_bytes=100)
        assert fetched.final_url == f"http://{host}/0"
        with pytest.raises(UrlFailed, match="more than 3 times"):
            await outside.fetch(f"http://{host}/4", parameter="image", max_bytes=100)


# -- what comes ------------------------------------------------------------------------------------------------

BOMB = gzip.compress(bytes(50_000_000))
OK = b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\n"


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (OK + b"Content-Length: 5000\r\n\r\n" + bytes(5000), "larger than 1000 bytes"),
        (OK + b"\r\n" + bytes(100_000), "larger than 1000 bytes"),
        (OK + b"Transfer-Encoding: chunked\r\n\r\n" + b"64\r\n" + bytes(100) + b"\r\n" + b"fff\r\n" + bytes(4095), "larger than"),
        (OK + b"Content-Length: 500\r\n\r\nshort", "broke off"),
        (OK + b"Content-Length: 7\r\n\r\npicture, and much more", "not HTTP"),
        (OK + b"Transfer-Encoding: chunked\r\n\r\n64\r\nshort", "broke off"),
        (OK + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", "broke off"),
        (OK + b"Content-Length: -1\r\n\r\n", "not HTTP"),
        (OK + b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(BOMB) + BOMB, "compressed"),
        (OK + b"Content-Encoding: br, gzip\r\n\r\nx", "compressed"),
        (OK.replace(b"image/png", b"text/html") + b"\r\n<html>", "it is text/html; allowed are image/"),
        (b"HTTP/1.1 200 OK\r\n\r\nwhat is this", "application/octet-stream; allowed are"),
        (OK.replace(b"200 OK", b"404 Not Found") + b"\r\n", "status 404"),
        (OK.replace(b"200 OK", b"206 Partial") + b"\r\nhalf", "status 206"),
        (OK.replace(b"200 OK", b"302 Found") + b"\r\n", "redirects to nowhere"),
        (OK + b"X-Long: " + b"a" * 1_000_000 + b"\r\n\r\n", "not HTTP"),
        (b"SSH-2.0-OpenSSH_9.2p1\r\n", "not HTTP"),
        (b"", "not HTTP"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_what_is_not_as_it_should_be_failed(answer: bytes, said: str, outside: Outside, tmp_path: Path) -> None:
    async with raw_stranger(answer) as host:
        with pytest.raises(UrlFailed, match=said) as failed:
            await outside.fetch(f"http://{host}/?secret", parameter="image", max_bytes=1000, content_types=["image/*"])
        path = tmp_path / "file"
        with pytest.raises(UrlFailed, match=said):
            await outside.fetch_to(path, f"http://{host}/", parameter="i", max_bytes=1000, timeout_s=5, content_types=["image/*"])
    assert failed.value.code == "url_failed"
    assert failed.value.details["value"] == f"http://{host}/"
    assert not path.exists()


@pytest.mark.parametrize(
    ("answer", "drip_s", "is_closing"),
    [
        (OK + b"\r\n" + bytes(10_000), 0.02, True),  # slow loris: it always has one more byte
        (b"HTTP/1.1 200 OK\r\nX-Slow: " + b"a" * 8000, 0.02, True),
        (OK + b"Content-Length: 10\r\n\r\npart", 0.0, False),
        (b"", 0.0, False),
    ],
    ids=["slow body", "slow head", "silent body", "silent"],
)
async def test_time_is_bounded_in_all(answer: bytes, drip_s: float, is_closing: bool, outside: Outside) -> None:
    async with raw_stranger(answer, drip_s=drip_s, is_closing=is_closing) as host:
        with pytest.raises(UrlFailed, match=r"in full in 0\.3 s"):
            await outside.fetch(f"http://{host}/", parameter="image", max_bytes=100_000, timeout_s=0.3)


async def test_nobody_there_failed(outside: Outside) -> None:
    with pytest.raises(UrlFailed, match="cannot be reached"):
        await outside.fetch(f"http://127.0.0.1:{pick_free_port()}/", parameter="image", max_bytes=1)


async def test_a_big_file_goes_to_disk_with_its_hash(outside: Outside, tmp_path: Path) -> None:
    content = bytes(range(256)) * 20_000

    async def give_much(request: web.Request) -> web.StreamResponse:
        return web.Response(body=content)

    path = tmp_path / "file"
    async with stranger(give_much) as host:
        saved = await outside.fetch_to(path, f"http://{host}/", parameter="url", max_bytes=len(content), timeout_s=30)
        assert saved == (len(content), hashlib.sha256(content).hexdigest(), "application/octet-stream", f"http://{host}/")
        with pytest.raises(FileExistsError):
            await outside.fetch_to(path, f"http://{host}/", parameter="url", max_bytes=len(content), timeout_s=30)
    assert path.read_bytes() == content, "a file that was there is left alone"


async def test_a_cancelled_fetch_leaves_no_file(outside: Outside, tmp_path: Path) -> None:
    path = tmp_path / "file"
    is_asked = asyncio.Event()

    async def say_nothing(request: web.Request) -> web.StreamResponse:
        is_asked.set()
        await asyncio.sleep(60)
        return web.Response()

    async with stranger(say_nothing) as host:
        task = asyncio.create_task(outside.fetch_to(path, f"http://{host}/", parameter="url", max_bytes=10_000, timeout_s=30))
        await is_asked.wait()
        assert path.exists()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert not path.exists()


async def test_a_post_follows_nobody_and_reads_nothing(outside: Outside) -> None:
    bodies = list[bytes]()

    async def take(request: web.Request) -> web.StreamResponse:
        bodies.append(await request.read())
        if request.path == "/moved":
            raise web.HTTPTemporaryRedirect("/elsewhere")
        answer = web.StreamResponse(status=202, headers={"Content-Length": "1000000000"})
        await answer.prepare(request)
        return answer

    async with stranger(take) as host:
        common = {"parameter": "webhook", "body": b"{}", "headers": {"Content-Type": "application/json"}, "timeout_s": 5.0}
        assert await outside.post(f"http://{host}/", **common) == 202  # type: ignore[arg-type]
        assert await outside.post(f"http://{host}/moved", **common) == 307  # type: ignore[arg-type]
    assert bodies == [b"{}", b"{}"]
    async with raw_stranger(b"", is_closing=False) as host:
        with pytest.raises(UrlFailed, match="in full in"):
            await outside.post(f"http://{host}/", parameter="webhook", body=b"{}", headers={}, timeout_s=0.2)


# -- the adapter's own -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*descend(aiohttp.ClientError), OSError, TimeoutError, ConnectionResetError, ValueError])
def test_foreign_errors_are_known_to_the_adapter(kind: type[BaseException]) -> None:
    assert issubclass(kind, FOREIGN)
