"""What is refused before anything of a request is looked at: strangers' pages, keys in addresses, heads that are too large.

And what every answer says to browsers. It judges the ASGI scope alone.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any
from urllib.parse import unquote_to_bytes, urlsplit

from gateway.errors import BadRequest, FluxgateError, Forbidden
from gateway.settings import Settings

MAX_HEADERS = 100
MAX_HEAD_BYTES = 32 << 10
_KEY_NAMES = rb"(?:^|&)(?:api_?key|access_token|authorization)="
_KEY_TEXTS = rb"\bfg_[0-9a-f]{12}_|\bhf_[A-Za-z0-9]{20}"
_KEY_IN_QUERY = re.compile(_KEY_NAMES + b"|" + _KEY_TEXTS, re.IGNORECASE)

_HOST = re.compile(r"(?:\[(?P<address>[0-9A-Fa-f:.]{2,45})\]|(?P<name>[A-Za-z0-9._-]{1,253}))(?::[0-9]{1,5})?")

# FastAPI's page takes its script and style from there.
_CDN = "https://cdn.jsdelivr.net"
_DOCS_CSP = (
    f"default-src 'self'; script-src 'self' 'unsafe-inline' {_CDN}; style-src 'self' 'unsafe-inline' {_CDN}; "
    "img-src 'self' data: https://fastapi.tiangolo.com; frame-ancestors 'none'; base-uri 'none'; form-action 'self'"
)
# A page that loads something from elsewhere says so in a header of its own, which stands.
_PAGE_CSP = b"default-src 'self'; img-src 'self' data: blob: http: https:; frame-ancestors 'none'; base-uri 'none'; form-action 'self'"
_DATA_CSP = b"default-src 'none'; frame-ancestors 'none'"
_ALWAYS = ((b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer"), (b"x-frame-options", b"DENY"))
_HSTS = (b"strict-transport-security", b"max-age=31536000")


class HeadTooLarge(FluxgateError):
    status = 431
    code = "head_too_large"


@lru_cache(maxsize=256)
def is_loopback_name(host: str) -> bool:
    """Whether a name or address leads to the machine it is said on, whatever a name server says."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def read_host_name(host: str) -> str | None:
    """The name or address in a Host header, without its port; None when it holds anything else."""
    found = _HOST.fullmatch(host)
    return (found["address"] or found["name"]).lower() if found else None


class Guard:
    """Judges requests by their head. Raises BadRequest, Forbidden, HeadTooLarge."""

    def __init__(self, settings: Settings) -> None:
        public = urlsplit(settings.public_url or "")
        self._hosts = {host.lower() for host in (*settings.allowed_hosts, public.hostname) if host}
        self._is_named = bool(settings.allowed_hosts)
        self._origins = {origin.lower() for origin in settings.cors_origins}
        self._own_origin = f"{public.scheme}://{public.netloc}".lower()
        self._is_secure = public.scheme == "https"

    def check(self, scope: Mapping[str, Any], headers: Mapping[bytes, bytes], *, is_open: bool) -> None:
        """`is_open`: callers need no key, so that a page that reaches us from the operator's browser has all rights."""
        _refuse_large_head(scope["headers"])
        _refuse_two_hosts(scope["headers"])
        _refuse_key_in_query(scope["query_string"])
        self._refuse_other_host(headers.get(b"host", b"").decode("latin-1"), is_open=is_open)
        if is_open:
            self.refuse_other_origin(headers.get(b"origin", b"").decode("latin-1"), headers.get(b"host", b"").decode("latin-1"))

    def _refuse_other_host(self, host: str, *, is_open: bool) -> None:
        """Links of answers are made of it. And a name server that a page's author owns may point his name at this machine: without
        keys the page would be of our own origin."""
        name = read_host_name(host)
        is_ours = name is not None and (is_loopback_name(name) or name in self._hosts)
        # With keys any name will do, unless some are named; an address is what health checks ask by, and no name server's to give.
        is_any = not is_open and name is not None and (not self._is_named or _is_address(name))
        if host and not is_ours and not is_any:
            hint = "Name it in ALLOWED_HOSTS or PUBLIC_URL. With API keys and an empty ALLOWED_HOSTS any name will do."
            raise Forbidden(
                f"This gateway is not called {(name or host)[:100]!r}.", code="foreign_host", hint=hint, details={"value": host[:200]}
            )

    def refuse_other_origin(self, origin: str, host: str) -> None:
        """Browsers say whose page a request or a WebSocket is of; other clients say nothing."""
        if not origin:
            return
        asked = origin.lower()
        own = urlsplit(asked).netloc == host.lower() and asked.startswith(("http://", "https://"))
        if not own and asked != self._own_origin and asked not in self._origins:
            hint = "Name it in CORS_ORIGINS."
            raise Forbidden("Pages of other origins may not ask here.", code="foreign_origin", hint=hint, details={"value": origin[:200]})

    def complete(self, scope: Mapping[str, Any], headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
        """An answer's headers with those that browsers heed."""
        given = list(headers)
        names = dict(given)
        given += _ALWAYS
        if b"content-security-policy" not in names:
            given.append((b"content-security-policy", _choose_csp(scope["path"], names.get(b"content-type", b""))))
        if self._is_secure or scope["scheme"] in ("https", "wss"):
            given.append(_HSTS)
        return given


def _choose_csp(path: str, content_type: bytes) -> bytes:
    if not content_type.startswith(b"text/html"):
        return _DATA_CSP
    return _DOCS_CSP.encode() if path.startswith("/docs") else _PAGE_CSP


def _refuse_large_head(headers: list[tuple[bytes, bytes]]) -> None:
    if len(headers) > MAX_HEADERS or sum(len(name) + len(value) for name, value in headers) > MAX_HEAD_BYTES:
        details = {"allowed": f"{MAX_HEADERS} headers, {MAX_HEAD_BYTES} bytes"}
        raise HeadTooLarge("The request has too many headers, or too large ones.", details=details)


def _refuse_two_hosts(headers: list[tuple[bytes, bytes]]) -> None:
    """What stands before us may have judged the other one."""
    if sum(name == b"host" for name, _ in headers) > 1:
        raise BadRequest("The request has more than one Host header.", details={"parameter": "Host"})


def _refuse_key_in_query(query: bytes) -> None:
    """Addresses end up in logs, histories and referrers."""
    if query and _KEY_IN_QUERY.search(unquote_to_bytes(query)):
        raise BadRequest(
            "A key stands in the address.",
            code="key_in_query",
            hint="Send Authorization: Bearer KEY, and replace this one: addresses are logged by everything on the way.",
        )
