"""The small HTTP client: kept connections, every way an answer can end or fail to, what is sent again and what never is."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager

import pytest
import uvloop

from gateway.plain_http import MAX_HEAD_BYTES, BrokenAnswer, PlainHost, PlainHttp

Serve = Callable[[bytes, asyncio.StreamWriter], Awaitable[None]]


class Server:
    """Answers the n-th request with the n-th of `script`, and the last of it from then on."""

    def __init__(self, *script: bytes | Serve) -> None:
        self._script = list(script)
        self.requests: list[bytes] = []
        self.connections = 0
        self.writers: list[asyncio.StreamWriter] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.writers.append(writer)
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = next((int(line[16:]) for line in head.split(b"\r\n") if line.startswith(b"Content-Length: ")), 0)
                self.requests.append(head + await reader.readexactly(length))
                answer = self._script.pop(0) if len(self._script) > 1 else self._script[0]
                if isinstance(answer, bytes):
                    writer.write(answer)
                else:
                    await answer(head, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


@asynccontextmanager
async def asking(server: Server, host: str = "127.0.0.1") -> AsyncIterator[PlainHost]:
    listening = await asyncio.start_server(server.serve, host, 0)
    port = listening.sockets[0].getsockname()[1]
    plain = PlainHttp()
    found = plain.host(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")
    assert found is not None
    try:
        yield found
    finally:
        plain.close()
        for writer in server.writers:
            writer.transport.abort()
        listening.close()
        # Transports close at the loop's next turns.
        await asyncio.sleep(0.02)


async def hang_up(head: bytes, writer: asyncio.StreamWriter) -> None:
    writer.transport.abort()


async def say_nothing(head: bytes, writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(30)


OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
CLOSING = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok"


async def test_requests_one_after_the_other_share_a_connection() -> None:
    server = Server(OK)
    async with asking(server) as host:
        for _ in range(3):
            assert await host.request("POST", "/a%20b?c=d", headers={"X-One": "1"}, body=b"{}", timeout_s=5) == (200, b"ok")
        assert server.connections == 1
        lines = server.requests[0].split(b"\r\n")
        assert lines[0] == b"POST /a%20b?c=d HTTP/1.1"
        assert {b"Content-Length: 2", b"X-One: 1"} < set(lines)
        assert lines[-1] == b"{}"


async def test_requests_at_once_have_connections_of_their_own_and_their_own_answers() -> None:
    async def answer_late(head: bytes, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.02)
        said = head.split(b" ")[1]
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(said), said))

    server = Server(answer_late)
    async with asking(server) as host:
        for _ in range(2):
            answers = await asyncio.gather(*(host.request("GET", f"/{n}", timeout_s=5) for n in range(8)))
            assert [answer.body for answer in answers] == [b"/%d" % n for n in range(8)]
        assert server.connections == 8


@pytest.mark.parametrize(
    ("raw", "body", "is_kept"),
    [
        (OK, b"ok", True),
        (CLOSING, b"ok", False),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n1\r\nd\r\n0\r\n\r\n", b"abcd", True),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", b"ok", True),
        (b"HTTP/1.1 204 No Content\r\n\r\n", b"", True),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok", b"ok", False),
    ],
    ids=["length", "close", "chunked", "continue", "empty", "old"],
)
async def test_every_kind_of_answer_is_read_whole_even_byte_by_byte(raw: bytes, body: bytes, is_kept: bool) -> None:
    async def drip(head: bytes, writer: asyncio.StreamWriter) -> None:
        for place in range(len(raw)):
            writer.write(raw[place : place + 1])
            await asyncio.sleep(0)

    server = Server(raw, drip)
    async with asking(server) as host:
        for _ in range(3):
            assert (await host.request("GET", "/", timeout_s=5)).body == body
        assert server.connections == (1 if is_kept else 3)


async def test_an_answer_without_a_length_ends_with_its_connection() -> None:
    async def answer(head: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.0 200 OK\r\n\r\nabc")
        await writer.drain()
        writer.close()

    async with asking(Server(answer)) as host:
        assert await host.request("GET", "/", timeout_s=5) == (200, b"abc")


@pytest.mark.parametrize(
    "raw",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\nok",
        b"HTTP/1.1 200 OK\r\nContent-Le",
        b"HTTP/1.1 100 Continue\r\n\r\n",
        b"garbage\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * (MAX_HEAD_BYTES + 1),
    ],
    ids=["short", "short chunk", "half a head", "continue alone", "garbage", "endless head"],
)
async def test_half_an_answer_is_none(raw: bytes) -> None:
    async def answer(head: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(raw)
        await writer.drain()
        writer.close()

    async with asking(Server(answer, OK)) as host:
        with pytest.raises(BrokenAnswer):
            await host.request("GET", "/", timeout_s=5)
        assert (await host.request("GET", "/", timeout_s=5)).body == b"ok"


@pytest.mark.parametrize(("method", "times"), [("GET", 2), ("PUT", 2), ("POST", 1)])
async def test_what_met_a_closed_connection_is_sent_again_only_where_twice_is_once(method: str, times: int) -> None:
    server = Server(OK, hang_up, OK)
    async with asking(server) as host:
        await host.request(method, "/", body=b"x", timeout_s=5)
        second = host.request(method, "/", body=b"x", timeout_s=5)
        if times == 2:
            assert (await second).body == b"ok"
        else:
            with pytest.raises(ConnectionError):
                await second
        assert len(server.requests) == 1 + times


async def test_a_new_connection_that_breaks_is_not_tried_again() -> None:
    server = Server(hang_up)
    async with asking(server) as host:
        with pytest.raises(ConnectionError):
            await host.request("GET", "/", timeout_s=5)
        assert len(server.requests) == 1


async def test_a_connection_that_the_server_closed_meanwhile_is_not_used() -> None:
    server = Server(OK)
    async with asking(server) as host:
        await host.request("POST", "/", timeout_s=5)
        server.writers[0].close()
        await asyncio.sleep(0.05)
        assert (await host.request("POST", "/", timeout_s=5)).body == b"ok"
        assert server.connections == 2


async def test_more_than_was_asked_for_spoils_the_connection() -> None:
    server = Server(OK + OK, OK)
    async with asking(server) as host:
        assert (await host.request("GET", "/", timeout_s=5)).body == b"ok"
        assert (await host.request("GET", "/", timeout_s=5)).body == b"ok"
        assert server.connections == 2


@pytest.mark.parametrize("bounds", [{"timeout_s": 0.1}, {"timeout_s": 20, "silence_s": 0.1}], ids=["in all", "silence"])
async def test_an_answer_that_does_not_come_is_given_up(bounds: dict[str, float]) -> None:
    async with asking(Server(say_nothing)) as host:
        with pytest.raises(TimeoutError):
            await host.request("GET", "/", **bounds)  # type: ignore[arg-type]


async def test_a_slow_answer_is_no_silence() -> None:
    async def drip(head: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n")
        for _ in range(5):
            await asyncio.sleep(0.1)
            writer.write(b"x")

    async with asking(Server(drip)) as host:
        assert (await host.request("GET", "/", timeout_s=20, silence_s=0.4)).body == b"xxxxx"


async def test_what_was_given_up_leaves_no_answer_behind() -> None:
    async def answer_late(head: bytes, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.2)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nold")

    server = Server(answer_late, OK)
    async with asking(server) as host:
        late = asyncio.create_task(host.request("GET", "/", timeout_s=5))
        await asyncio.sleep(0.05)
        late.cancel()
        with pytest.raises(asyncio.CancelledError):
            await late
        assert (await host.request("GET", "/", timeout_s=5)).body == b"ok"
        assert server.connections == 2


async def test_large_bodies_go_both_ways() -> None:
    body = bytes(range(256)) * 40_000

    async def echo(head: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        await writer.drain()

    server = Server(echo)
    async with asking(server) as host:
        assert (await host.request("PUT", "/", body=body, timeout_s=20)).body == body
        assert server.requests[0].endswith(body)


async def test_nobody_there_is_an_os_error() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        host = PlainHttp().host(f"http://127.0.0.1:{probe.getsockname()[1]}")
        assert host is not None
        with pytest.raises(OSError):
            await host.request("GET", "/", timeout_s=5)


async def test_an_address_of_six_and_a_port_of_its_own() -> None:
    server = Server(OK)
    async with asking(server, "::1") as host:
        assert (await host.request("GET", "/", timeout_s=5)).status == 200
        assert b"\r\nHost: [::1]:" in server.requests[0]


@pytest.mark.parametrize("url", ["https://a/b", "http://user:word@a:8188", "ftp://a", "a:8188"])
def test_what_is_more_than_plain_http_is_left_to_others(url: str) -> None:
    assert PlainHttp().host(url) is None


def test_a_server_is_known_by_its_name_and_port() -> None:
    plain = PlainHttp()
    assert plain.host("http://a:80/x") is plain.host("http://a/y") is not plain.host("http://a:81/x")


@pytest.mark.parametrize(
    "scene",
    [
        test_requests_at_once_have_connections_of_their_own_and_their_own_answers,
        test_an_answer_without_a_length_ends_with_its_connection,
        test_a_new_connection_that_breaks_is_not_tried_again,
        test_a_connection_that_the_server_closed_meanwhile_is_not_used,
        test_more_than_was_asked_for_spoils_the_connection,
        test_what_was_given_up_leaves_no_answer_behind,
        test_large_bodies_go_both_ways,
        test_nobody_there_is_an_os_error,
        test_an_address_of_six_and_a_port_of_its_own,
    ],
)
def test_the_loop_of_production_does_the_same(scene: Callable[[], Coroutine[None, None, None]]) -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(scene())


async def test_time_that_is_up_before_the_request_is_sent_is_a_timeout() -> None:
    server = Server(OK)
    async with asking(server) as host:
        assert await host.request("GET", "/", timeout_s=5) == (200, b"ok")
        for _ in range(2):  # on the kept connection, and on the way to a new one
            with pytest.raises(TimeoutError):
                await host.request("GET", "/", timeout_s=0)
        assert len(server.requests) == 1
