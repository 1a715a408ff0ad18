"""A site of somebody's that answers when it likes: of one caller's requests two wait for it at once, and nobody else does."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.callers import as_caller, make_key
from tests.conftest import OpenGateway
from tests.dataset_files import picture
from tests.journeys.api import wait_until
from tests.journeys.hostile_requests import img2img, to_data_url
from tests.web_site import running_site

ADMIN_KEY = "the-operators-own-key-of-the-fetching-test"
ALLOWED = 2


class SlowSite:
    """Who asks is kept until `opened`."""

    def __init__(self) -> None:
        self.opened = threading.Event()
        self.inside: set[str] = set()
        self.most_inside: dict[str, int] = {}

    def answer(self, path: str) -> bytes:
        of = path.split("/")[1]
        self.inside.add(path)
        self.most_inside[of] = max(self.most_inside.get(of, 0), self.count(of))
        assert self.opened.wait(60.0)
        self.inside.discard(path)
        return picture(len(path))

    def count(self, of: str) -> int:
        return sum(path.startswith(f"/{of}/") for path in self.inside)


@pytest.fixture
def callers(open_gateway: OpenGateway) -> Iterator[tuple[SlowSite, str, httpx.Client, httpx.Client]]:
    slow = SlowSite()
    with (
        running_site(slow.answer) as site,
        open_gateway(ADMIN_KEY=ADMIN_KEY, ALLOW_PRIVATE_URLS=site.url.removeprefix("http://")) as gateway,
        as_caller(gateway.url, ADMIN_KEY) as admin,
    ):
        keys = [make_key(admin, "generate")["key"] for _ in range(2)]
        with as_caller(gateway.url, keys[0]) as one, as_caller(gateway.url, keys[1]) as other:
            yield slow, site.url, one, other
            slow.opened.set()


def test_requests_of_one_caller_that_wait_for_pictures_stand_in_nobodys_way(
    callers: tuple[SlowSite, str, httpx.Client, httpx.Client],
) -> None:
    slow, site, one, other = callers
    with ThreadPoolExecutor(8) as pool:

        def ask(client: httpx.Client, of: str, number: int) -> httpx.Response:
            return client.post("/v1/generations", **img2img(f"{site}/{of}/{'x' * number}.png"))

        asked = [pool.submit(ask, one, "one", number) for number in range(5)]
        wait_until(lambda: slow.count("one") == ALLOWED, "as many as may")
        asked.append(pool.submit(ask, other, "other", 1))
        wait_until(lambda: slow.count("other") == 1, "another caller's")
        assert one.post("/v1/generations", **img2img(to_data_url(picture(9)))).status_code == 202, "what needs no site does not wait"
        assert slow.count("one") == ALLOWED
        slow.opened.set()
        answers = [answer.result() for answer in asked]
    assert [answer.status_code for answer in answers] == [202] * 6, [answer.text for answer in answers]
    assert slow.most_inside == {"one": ALLOWED, "other": 1}
