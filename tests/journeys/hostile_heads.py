"""Hostile headers, queries and tickets, ids of others, and what is no request at all; rows as in `hostile_requests.py`."""

from __future__ import annotations

import base64

from tests.journeys.hostile_requests import BATCHES, GENERATIONS, PLAIN, UPLOADS, Row

# -- headers and queries ---------------------------------------------------------------------------------------
HEADERS = [
    Row("no key", "GET", GENERATIONS, 401, "unauthorized", who="nobody"),
    Row("a key in the query", "GET", f"{GENERATIONS}?api_key={{key}}", 400, "key_in_query", who="nobody"),
    Row("a key in the query under another name", "GET", f"{GENERATIONS}?status={{key}}", 400, "key_in_query", who="nobody"),
    Row("a key in the query beside a right one", "GET", f"{GENERATIONS}?access_token={{key}}", 400, "key_in_query"),
    Row("a key in the query of a stream", "GET", "/v1/generations/{job}/events?ticket={key}", 400, "key_in_query", who="nobody"),
    Row("lines in an id", "GET", "/v1/generations/x%0d%0aSet-Cookie:%20a=b", 404, "job_not_found"),
    Row("lines in a LoRA's name", "GET", "/v1/loras/x%0d%0aSet-Cookie:%20a=b", 404, "not_found"),
    Row("lines in a workflow's name", "GET", "/v1/workflows/x%0d%0aSet-Cookie:%20a=b", 404, "workflow_not_found"),
    Row("lines in an asset's hash", "GET", "/api/v2/assets/x%0d%0aSet-Cookie:%20a=b/content", 404, "not_found"),
    Row("a page as Host", "GET", GENERATIONS, 403, "foreign_host", {"headers": {"Host": '"><script>alert(1)</script>'}}),
    Row("a path in Host", "GET", GENERATIONS, 403, "foreign_host", {"headers": {"Host": "evil.example/x"}}),
    Row("a key as password", "GET", GENERATIONS, 401, "unauthorized", {"auth": ("user", "{key}")}, "nobody"),
    Row("a key in a cookie", "GET", GENERATIONS, 401, "unauthorized", {"headers": {"Cookie": "key={key}"}}, "nobody"),
    Row("the right prefix", "GET", GENERATIONS, 401, "unauthorized", {"headers": {"Authorization": "Bearer {prefix}_wrong"}}, "nobody"),
    Row("a key's hash", "GET", GENERATIONS, 401, "unauthorized", {"headers": {"Authorization": "Bearer {hash}"}}, "nobody"),
    Row("a key with more behind it", "GET", GENERATIONS, 401, "unauthorized", {"headers": {"Authorization": "Bearer {key}x"}}, "nobody"),
    Row("bytes for a key", "GET", GENERATIONS, 401, "unauthorized", {"headers": {"Authorization": b"Bearer \xff\xfe"}}, "nobody"),
    Row("an empty Idempotency-Key", "POST", GENERATIONS, 400, "bad_request", {"json": PLAIN, "headers": {"Idempotency-Key": ""}}),
    Row("a long Idempotency-Key", "POST", GENERATIONS, 400, "bad_request", {"json": PLAIN, "headers": {"Idempotency-Key": "x" * 256}}),
    Row(
        "bytes for an Idempotency-Key",
        "POST",
        GENERATIONS,
        400,
        "bad_request",
        {"json": PLAIN, "headers": {"Idempotency-Key": b"\xc2\x85"}},
    ),
    Row("a wait that is none", "POST", GENERATIONS, 400, "bad_request", {"json": PLAIN, "headers": {"Prefer": "wait=-1"}}),
    Row("a cursor of another's making", "GET", f"{GENERATIONS}?cursor=Li4vLi4vZXRj", 400, "bad_request"),
    Row(
        "a cursor beyond all numbers",
        "GET",
        f"{GENERATIONS}?cursor={base64.urlsafe_b64encode(b'9' * 30 + b':x').decode()}",
        400,
        "bad_request",
    ),
    Row("a cursor of bytes", "GET", f"{BATCHES}?cursor=%ff%00", 400, "bad_request"),
    Row("an event that never was", "GET", "/v1/generations/{job}/events", 400, "bad_request", {"headers": {"Last-Event-ID": "0-0\tx"}}),
    Row("lines in an event's id", "GET", "/v1/generations/{job}/events?after=0%0d%0aX:1", 400, "bad_request"),
    Row("a limit without end", "GET", f"{GENERATIONS}?limit=1000000", 400, "invalid_parameter"),
    Row(
        "lines in a type",
        "POST",
        UPLOADS,
        422,
        "invalid_parameter",
        {"json": {"content_type": "image/png\r\nX: 1", "size_bytes": 1, "sha256": "0" * 64}},
    ),
    Row("a page's method", "OPTIONS", GENERATIONS, 405, "method_not_allowed", {"headers": {"Origin": "https://evil.example"}}),
    Row("a method in a header", "GET", "/v1/generations/{job}", 200, "", {"headers": {"X-HTTP-Method-Override": "DELETE"}}),
]

# -- tickets: `{ticket}` is a good one for `{job}`, made of `{payload}` and `{signature}` ----------------------------------------
STREAM = "/v1/generations/{job}/events?wait=0&ticket="
TICKETS = [
    Row("a good one", "GET", f"{STREAM}{{ticket}}", 200, "", who="nobody"),
    Row("a good one again, as browsers connect anew", "GET", f"{STREAM}{{ticket}}", 200, "", who="nobody"),
    Row("an unsigned one", "GET", f"{STREAM}{{payload}}", 401, "invalid_ticket", who="nobody"),
    Row("an unsigned one with a dot", "GET", f"{STREAM}{{payload}}.", 401, "invalid_ticket", who="nobody"),
    Row("one signed by nobody we know", "GET", f"{STREAM}{{payload}}.{'A' * 43}", 401, "invalid_ticket", who="nobody"),
    Row("a signature alone", "GET", f"{STREAM}.{{signature}}", 401, "invalid_ticket", who="nobody"),
    Row("an expired one", "GET", f"{STREAM}{{expired}}", 401, "invalid_ticket", who="nobody"),
    Row("an expired one with a later time", "GET", f"{STREAM}{{payload}}.{{expired_signature}}", 401, "invalid_ticket", who="nobody"),
    Row("one replayed for another job", "GET", f"{STREAM}{{foreign_ticket}}", 401, "invalid_ticket", who="nobody"),
    Row(
        "one replayed for another's job",
        "GET",
        "/v1/generations/{foreign}/events?wait=0&ticket={ticket}",
        401,
        "invalid_ticket",
        who="nobody",
    ),
    Row(
        "one replayed at a training's stream",
        "GET",
        "/v1/trainings/{job}/events?wait=0&ticket={ticket}",
        404,
        "job_not_found",
        who="nobody",
    ),
    Row("one replayed at the job itself", "GET", "/v1/generations/{job}?ticket={ticket}", 401, "unauthorized", who="nobody"),
    Row("one replayed to cancel", "POST", "/v1/generations/{job}/cancel?ticket={ticket}", 401, "unauthorized", who="nobody"),
    Row("one replayed for a further one", "POST", "/v1/generations/{job}/ticket?ticket={ticket}", 401, "unauthorized", who="nobody"),
    Row("one replayed as key", "GET", GENERATIONS, 401, "unauthorized", {"headers": {"Authorization": "Bearer {ticket}"}}, "nobody"),
    Row(
        "one replayed after its key was revoked",
        "GET",
        "/v1/generations/{orphan}/events?wait=0&ticket={orphan_ticket}",
        401,
        "unauthorized",
        who="nobody",
    ),
    Row("one for 24 hours", "POST", "/v1/generations/{job}/ticket", 422, "invalid_parameter", {"json": {"ttl_s": 86_400}}),
    Row("one for another's job", "POST", "/v1/generations/{foreign}/ticket", 404, "job_not_found"),
]

# -- what is another's (tests/journeys/test_isolation.py walks every route) --------------------------------------
FOREIGN = [
    Row("read", "GET", "/v1/generations/{foreign}", 404, "job_not_found"),
    Row("canceled", "POST", "/v1/generations/{foreign}/cancel", 404, "job_not_found"),
    Row("deleted", "DELETE", "/v1/generations/{foreign}", 404, "job_not_found"),
    Row("followed", "GET", "/v1/generations/{foreign}/events", 404, "job_not_found"),
]

# -- requests that no client would write: what leaves the socket, and the status; none gets past the server below us -----------
HOST = b"Host: x\r\nAuthorization: Bearer {key}\r\nContent-Type: application/json\r\n"
POST = b"POST /v1/generations HTTP/1.1\r\n" + HOST
ASKED = b'{"workflow":"trivial"}'
WIRE: dict[str, tuple[bytes, tuple[int, ...]]] = {
    "two lengths": (POST + b"Content-Length: 22\r\nContent-Length: 5\r\n\r\n" + ASKED, (400,)),
    "a length and chunks": (POST + b"Content-Length: 22\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + ASKED, (400,)),
    "chunks in disguise": (POST + b"Transfer-Encoding: xchunked\r\nContent-Length: 22\r\n\r\n" + ASKED, (400,)),
    "a length below zero": (POST + b"Content-Length: -1\r\n\r\n" + ASKED, (400,)),
    "a length in words": (POST + b"Content-Length: 0x16\r\n\r\n" + ASKED, (400,)),
    "a chunk that is no number": (POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n" + ASKED, (400,)),
    "a header with a line of its own": (b"GET /v1/usage HTTP/1.1\r\n" + HOST + b"X: a\r\n b\r\nX-B : c\r\n\r\n", (400,)),
    "two hosts": (b"GET /v1/usage HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n" + HOST + b"\r\n", (400,)),
    "NUL in a header": (b"GET /v1/usage HTTP/1.1\r\n" + HOST + b"X: a\0b\r\n\r\n", (400,)),
    "a header of 1 MB": (b"GET /v1/usage HTTP/1.1\r\n" + HOST + b"X: " + b"a" * 1_000_000 + b"\r\n\r\n", (400, 431)),
    "a path of 1 MB": (b"GET /" + b"a" * 1_000_000 + b" HTTP/1.1\r\n" + HOST + b"\r\n", (400, 404, 414)),
    "no HTTP": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100), (400,)),
}
