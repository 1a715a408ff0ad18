"""Both clients behind one face, so that one test tries both: what is awaited on the one is run to its end on the other."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any

from fluxgate import AsyncClient, Client, Event

KINDS = ("Client", "AsyncClient")


class Blocking:
    """An AsyncClient on a loop of its own."""

    def __init__(self, client: AsyncClient, loop: asyncio.AbstractEventLoop) -> None:
        self._client, self._loop = client, loop

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._client, name)
        if not callable(found):
            return found
        return self._stream if name == "stream" else self._block(found)

    def _block(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: self._loop.run_until_complete(function(*args, **kwargs))

    def _stream(self, *args: Any, **kwargs: Any) -> Iterator[Event]:
        events: AsyncIterator[Event] = self._client.stream(*args, **kwargs)
        while True:
            try:
                yield self._loop.run_until_complete(anext(events))
            except StopAsyncIteration:
                return


@contextmanager
def opened(kind: str, url: str, **options: Any) -> Iterator[Any]:
    """A client of that kind; closed at the end."""
    if kind == "Client":
        with Client(url, **options) as client:
            yield client
        return
    with asyncio.Runner() as runner:
        asynchronous = AsyncClient(url, **options)
        yield Blocking(asynchronous, runner.get_loop())
        runner.run(asynchronous.close())
