"""Which URLs of strangers are gone to: a table of their forms and where they lead."""

from __future__ import annotations

from ipaddress import ip_address

import pytest

from gateway.errors import UrlFailed, UrlRefused
from gateway.outside.addresses import Disallowed, Exemptions, find_fault, parse_url, require_allowed
from gateway.outside.urls import Outside
from gateway.settings import Settings

REFUSED = [
    # loopback, in all its spellings
    "https://127.0.0.1/",
    "https://127.9.9.9:8443/",
    "https://localhost/",
    "https://LOCALHOST/",
    "https://[::1]/",
    "https://[0:0:0:0:0:0:0:1]/",
    "https://127.1/",
    "https://127.0.0.1./",
    "https://2130706433/",
    "https://0x7f000001/",
    "https://0x7f.0.0.1/",
    "https://0177.0.0.1/",
    "https://017700000001/",
    "https://1.1.1.0x1/",
    "https://0/",
    "https://%31%32%37.0.0.1/",
    "https://127.0.0.1%2f.example.org/",
    "https://127。0。0。1/",
    "https://①②⑦.0.0.1/",
    # the own network, metadata, and the rest of what is not public
    "https://0.0.0.0/",
    "https://10.0.0.1/",
    "https://100.64.0.1/",
    "https://100.100.100.200/latest/meta-data",
    "https://168.63.129.16/",
    "https://169.254.169.254/latest/meta-data/",
    "https://172.16.0.1/",
    "https://172.31.255.255/",
    "https://192.0.0.192/",
    "https://192.168.1.1/",
    "https://198.18.0.1/",
    "https://203.0.113.9/",
    "https://224.0.0.1/",
    "https://255.255.255.255/",
    # IPv6, and IPv4 inside of it
    "https://[::]/",
    "https://[::ffff:127.0.0.1]/",
    "https://[::ffff:7f00:1]/",
    "https://[::127.0.0.1]/",
    "https://[::ffff:0:127.0.0.1]/",
    "https://[64:ff9b::7f00:1]/",
    "https://[64:ff9b:1::7f00:1]/",
    "https://[2002:7f00:1::]/",
    "https://[2001:0:4136:e378:8000:63bf:3fff:fdd2]/",
    "https://[2001:db8::1]/",
    "https://[fc00::1]/",
    "https://[fd00:ec2::254]/",
    "https://[fe80::1]/",
    "https://[fe80::1%25eth0]/",
    "https://[fec0::1]/",
    "https://[ff02::1]/",
    "https://[100::1]/",
    "https://[5f00::1]/",
    # schemes, ports, and what is no URL
    "http://93.184.215.14/",
    "http://93.184.215.14:443/",
    "https://93.184.215.14:22/",
    "https://93.184.215.14:25/",
    "https://93.184.215.14:80/",
    "https://93.184.215.14:0/",
    "https://93.184.215.14:99999/",
    "https://93.184.215.14:44x/",
    "ftp://93.184.215.14/",
    "file:///etc/passwd",
    "gopher://93.184.215.14:70/_x",
    "data:image/png;base64,AAAA",
    "//93.184.215.14/",
    "/etc/passwd",
    "https:93.184.215.14",
    "https:///etc/passwd",
    "https://",
    "",
    # two readings of one text
    "https://user@93.184.215.14/",
    "https://user:pass@93.184.215.14/",
    "https://@93.184.215.14/",
    "https://:@93.184.215.14/",
    "https://93.184.215.14#@127.0.0.1/\n",
    "https://93.184.215.14\\@127.0.0.1/",
    "https:\\\\93.184.215.14/",
    "https://93.184.215.14 /",
    "https://93.184.215.14/\r\nHost: 127.0.0.1",
    "https://93.184.215.14/\t",
    " https://93.184.215.14/",
    "https://exämple.org/",
    "https://93.184.215.14/\x00",
    "https://[::1/",
    "https://a..b/",
    "https://-a.example/",
    f"https://{'a' * 64}.example/",
    f"https://{'a.' * 130}example/",
    f"https://93.184.215.14/{'a' * 5000}",
]

ALLOWED = [
    "https://93.184.215.14/",
    "https://93.184.215.14:443/a?b=c",
    "https://93.184.215.14:8443/",
    "https://1.1.1.1/a@b",
    "https://1.1.1.1/?next=http://127.0.0.1",
    "https://[2606:4700:4700::1111]/",
    "HTTPS://93.184.215.14/",
]


@pytest.mark.parametrize("url", REFUSED, ids=lambda url: repr(url)[:60])
async def test_the_gateway_does_not_go_there(url: str) -> None:
    outside = Outside()
    with pytest.raises(UrlRefused) as refused:
        await outside.check(url, parameter="image")
    outside.close()
    assert refused.value.code == "url_refused"
    assert refused.value.details["parameter"] == "image"
    assert refused.value.details["reason"] in refused.value.message
    assert "pass" not in refused.value.details["value"].removeprefix("/etc/passwd").removesuffix("/etc/passwd")


@pytest.mark.parametrize("url", ALLOWED)
async def test_public_places_are_gone_to(url: str) -> None:
    outside = Outside()
    target = await outside.check(url, parameter="image")
    outside.close()
    assert [str(address) for address in target.addresses] == [target.url.raw_host]


@pytest.mark.parametrize("found", [["10.0.0.1"], ["93.184.215.14", "10.0.0.1"], ["fe80::1%eth0"], ["::ffff:10.0.0.1", "93.184.215.14"]])
async def test_a_name_is_where_it_leads(found: list[str]) -> None:
    outside = Outside(look_up=lambda host: found)
    with pytest.raises(UrlRefused, match="leads to a"):
        await outside.check("https://pictures.example/a.png", parameter="image")
    outside.close()


@pytest.mark.parametrize("found", [[], ["what is this"]])
async def test_a_name_that_leads_nowhere_failed(found: list[str]) -> None:
    outside = Outside(look_up=lambda host: found)
    with pytest.raises(UrlFailed, match="does not resolve"):
        await outside.check("https://pictures.example/a.png", parameter="image")
    outside.close()


def test_every_address_that_python_calls_special_is_refused() -> None:
    """The table is ours; the standard library's opinion is a second pair of eyes."""
    for first in range(256):
        for second in (0, 1, 16, 18, 31, 51, 64, 127, 168, 254, 255):
            address = ip_address(f"{first}.{second}.0.1")
            assert find_fault(address) or address.is_global, address
    for first in range(0, 1 << 16, 16):
        address = ip_address(first << 112 | 1)
        assert find_fault(address) or address.is_global, address


@pytest.mark.parametrize(
    ("entry", "url", "address", "is_let_in"),
    [
        ("127.0.0.1:9000", "http://127.0.0.1:9000/x", "127.0.0.1", True),
        ("127.0.0.1:9000", "http://127.0.0.1:9001/x", "127.0.0.1", False),
        ("hooks.internal:80", "http://HOOKS.internal/x", "10.0.0.9", True),
        ("hooks.internal:80", "http://other.internal/x", "10.0.0.9", False),
        ("[::1]:9000", "http://[::1]:9000/x", "::1", True),
        ("10.0.0.0/8", "http://any.internal:25/x", "10.0.0.9", True),
        ("10.0.0.0/8", "http://any.internal:25/x", "11.0.0.9", False),
        ("fd00::/8", "https://any.internal/x", "fd00::1", True),
        ("10.0.0.7", "https://any.internal/x", "10.0.0.7", True),
    ],
)
def test_an_exempt_place_is_gone_to(entry: str, url: str, address: str, is_let_in: bool) -> None:
    exempt, parsed = Exemptions(Settings.model_validate({"allow_private_urls": f" {entry} ,"}).allow_private_urls), parse_url(url)
    if is_let_in:
        require_allowed(parsed, [ip_address(address)], exempt)
    else:
        with pytest.raises(Disallowed):
            require_allowed(parsed, [ip_address(address)], exempt)


@pytest.mark.parametrize("entry", ["everywhere", "10.0.0.0/99", "http://a:80", "10.0.0.1/8", "a:b"])
def test_an_exemption_that_is_none_is_refused_at_start(entry: str) -> None:
    with pytest.raises(ValueError, match="allow_private_urls"):
        Settings.model_validate({"allow_private_urls": entry})
