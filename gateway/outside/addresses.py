"""Which places of the network a URL named by a caller may lead to. Pure: it judges URLs and addresses, and looks nothing up."""

from __future__ import annotations

import re
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

from yarl import URL

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

MAX_URL_LENGTH = 4096
# What answers must speak TLS and be public. Ports below 1024 that are not 443 belong to other services.
HTTPS_PORT, FIRST_FREE_PORT = 443, 1024

_LABEL = r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
_NAME = re.compile(rf"{_LABEL}(?:\.{_LABEL})*\.?")
# A last label that is a number makes a name an address: 127.1, 0x7f000001, 2130706433, 0177.0.0.1 (WHATWG URL, "ends in a number").
_NUMBER = re.compile(r"(?:.*\.)?(?:[0-9]+|0x[0-9a-f]*)\.?")

_NOT_PUBLIC_V4 = {
    "0.0.0.0/8": "unspecified",
    "10.0.0.0/8": "private",
    "100.64.0.0/10": "shared",
    "127.0.0.0/8": "loopback",
    "168.63.129.16/32": "metadata",  # Azure's, in the middle of public space
    "169.254.0.0/16": "link-local",
    "172.16.0.0/12": "private",
    "192.0.0.0/24": "reserved",
    "192.0.2.0/24": "reserved",
    "192.88.99.0/24": "reserved",
    "192.168.0.0/16": "private",
    "198.18.0.0/15": "reserved",
    "198.51.100.0/24": "reserved",
    "203.0.113.0/24": "reserved",
    "224.0.0.0/4": "multicast",
    "240.0.0.0/4": "reserved",
}
# Public IPv6 is 2000::/3 alone: mapped (::ffff:0:0/96), compatible (::/96), NAT64 (64:ff9b::/96), unique local and link-local lie outside.
_PUBLIC_V6 = IPv6Network("2000::/3")
_NOT_PUBLIC_V6 = {
    "2001::/23": "reserved",  # Teredo and ORCHID among them
    "2001:db8::/32": "reserved",
    "2002::/16": "embedded",  # 6to4 holds an IPv4 address
    "3fff::/20": "reserved",
}
_REFUSED: dict[Network, str] = {ip_network(net): kind for net, kind in (*_NOT_PUBLIC_V4.items(), *_NOT_PUBLIC_V6.items())}


class Disallowed(ValueError):
    """Why a URL or an address is not gone to, as the end of a sentence."""


class Exemptions:
    """Places that are gone to all the same: `HOST:PORT` as a URL writes it, or a network. There http is allowed, and any port."""

    def __init__(self, entries: Iterable[str] = ()) -> None:
        """Raises ValueError for an entry that is neither."""
        self._places, self._networks = set[tuple[str, int]](), list[Network]()
        for entry in entries:
            host, colon, port = entry.lower().rpartition(":")
            if colon and re.fullmatch(r"[0-9]{1,5}", port) and (_NAME.fullmatch(host) or re.fullmatch(r"\[.+\]", host)):
                self._places.add((host.strip("[]"), int(port)))
            else:
                self._networks.append(ip_network(entry))

    def has_place(self, url: URL) -> bool:
        return (url.raw_host or "", url.port or 0) in self._places

    def has_address(self, address: Address) -> bool:
        return any(address in network for network in self._networks)


def parse_url(raw: str) -> URL:
    """The URL as the HTTP client will read it, without its fragment. Raises Disallowed; whether it may be gone to is asked elsewhere."""
    if len(raw) > MAX_URL_LENGTH:
        raise Disallowed(f"is longer than {MAX_URL_LENGTH} characters")
    if not re.fullmatch(r"[\x21-\x7e]+", raw) or "\\" in raw:
        raise Disallowed("holds characters that no URL has; write others as %XX, and names in punycode")
    try:
        url = URL(raw)
        port = url.port
    except ValueError as error:
        raise Disallowed("is no URL") from error
    if url.scheme not in ("http", "https") or not url.raw_host or not port:
        raise Disallowed("is no https URL with a host")
    if "@" in url.raw_authority or "@" in raw.split("://", 1)[-1].split("/", 1)[0].split("?", 1)[0]:
        raise Disallowed("holds a user name or password")
    _require_host(url.raw_host)
    return url.with_fragment(None)


def literal_address(host: str) -> Address | None:
    """The address a host is written as, or None for a name."""
    try:
        return ip_address(host)
    except ValueError:
        return None


def _require_host(host: str) -> None:
    if literal_address(host) is not None and "%" not in host:
        return
    if not _NAME.fullmatch(host) or len(host) > 253:
        raise Disallowed("names a host that cannot be")
    if _NUMBER.fullmatch(host):
        raise Disallowed("writes an address in an unusual way")


def require_allowed(url: URL, addresses: Iterable[Address], exempt: Exemptions) -> None:
    """Raises Disallowed unless every one of the addresses may be gone to: no honest name has private ones beside public ones."""
    if exempt.has_place(url):
        return
    strangers = [address for address in addresses if not exempt.has_address(address)]
    if not strangers:
        return
    for address in strangers:
        if kind := find_fault(address):
            raise Disallowed(f"leads to a {kind} address")
    if url.scheme != "https":
        raise Disallowed("is not https")
    if url.port != HTTPS_PORT and (url.port or 0) < FIRST_FREE_PORT:
        raise Disallowed(f"names port {url.port}; allowed are {HTTPS_PORT} and those from {FIRST_FREE_PORT} on")


def find_fault(address: Address) -> str | None:
    """What kind of address it is when it is not a public one."""
    if isinstance(address, IPv6Address) and address not in _PUBLIC_V6:
        return "loopback" if address.is_loopback else "private or embedded"
    return next((kind for network, kind in _REFUSED.items() if address in network), None)


def show_url(raw: str) -> str:
    """A URL for an error or a log: without user name, query and fragment, where secrets stand."""
    shown = re.split(r"[?#]", raw, maxsplit=1)[0]
    shown = re.sub(r"//[^/]*@", "//…@", shown)
    return shown if len(shown) <= 200 else f"{shown[:200]}…"
