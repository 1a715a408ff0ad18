"""One deployment for a file of tests: a gateway with its dispatcher inside, over the session's servers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.conftest import OpenGateway
from tests.journeys.api import Api
from tests.webhook_receiver import Receiver


@pytest.fixture(scope="session")
def receiver() -> Iterator[Receiver]:
    """Who is told of the ends of jobs; deployments must be allowed to go there."""
    with Receiver().listening() as receiver:
        yield receiver


@pytest.fixture(scope="module")
def api(open_gateway: OpenGateway) -> Iterator[Api]:
    """A caller of a gateway that lives as long as the file's tests."""
    with open_gateway() as gateway, Api(gateway.url) as caller:
        yield caller
