"""The gateway over HTTP: `Client` blocks, `AsyncClient` is awaited, and both do what `calls`, `retries` and `following` say.
Here is only the talking."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Generator, Iterator
from contextlib import aclosing, closing, contextmanager
from types import TracebackType
from typing import Any, Generic, ParamSpec, Self, TypeVar, cast, overload

import httpx
from httpx_sse import EventSource, SSEError

from fluxgate.asking import Ask, Steps
from fluxgate.calls import batch, catalogue, file, generation, key, training
from fluxgate.errors import ApiError, Silent, Unreachable
from fluxgate.following import FIRST_EVENT_S, WAYS, Following, Way
from fluxgate.retries import persist
from fluxgate.wire import Event, Job, Training, read_event, read_event_page

P = ParamSpec("P")
T = TypeVar("T")
DEFAULT_URL = "http://127.0.0.1:8000"


@contextmanager
def translate(url: str) -> Iterator[None]:
    """httpx's failures as ours."""
    try:
        yield
    except (httpx.HTTPError, httpx.InvalidURL, SSEError) as error:
        reason = str(error) or type(error).__name__
        if isinstance(error, httpx.ReadTimeout):
            raise Silent(url, "nothing came in time") from error
        raise Unreachable(url, reason, never_sent=isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)) from error


class Operation(Generic[P, T]):
    """One thing to ask for, on both clients: the steps of `calls` as a method. On the class itself it is the plain function."""

    def __init__(self, steps: Callable[P, Steps[T]]) -> None:
        self._steps = steps
        self.__doc__ = steps.__doc__

    @overload
    def __get__(self, client: Client, owner: type) -> Callable[P, T]: ...
    @overload
    def __get__(self, client: AsyncClient, owner: type) -> Callable[P, Awaitable[T]]: ...
    @overload
    def __get__(self, client: None, owner: type) -> Callable[P, Steps[T]]: ...
    def __get__(self, client: Client | AsyncClient | None, owner: type) -> Callable[P, Any]:
        if client is None:
            return self._steps
        run = client.run

        def call(*args: P.args, **kwargs: P.kwargs) -> Any:
            return run(self._steps(*args, **kwargs))

        call.__name__, call.__doc__ = self._steps.__name__, self._steps.__doc__
        return call


class Operations:
    """What both clients can be asked for: `job = client.generate(...)`, `job = await client.generate(...)`."""

    generate = Operation(generation.generate)
    get = Operation(generation.get)
    jobs = Operation(generation.jobs)
    preview = Operation(generation.preview)
    reproduce = Operation(generation.reproduce)
    compare = Operation(generation.compare)
    cancel = Operation(generation.cancel)
    delete = Operation(generation.delete)
    graph = Operation(generation.graph)
    replay_webhook = Operation(generation.replay_webhook)
    download = Operation(generation.download)
    create_batch = Operation(batch.create_batch)
    get_batch = Operation(batch.get_batch)
    batches = Operation(batch.batches)
    batch_items = Operation(batch.batch_items)
    cancel_batch = Operation(batch.cancel_batch)
    upload = Operation(file.upload)
    uploads = Operation(file.uploads)
    delete_upload = Operation(file.delete_upload)
    create_dataset = Operation(training.create_dataset)
    get_dataset = Operation(training.get_dataset)
    datasets = Operation(training.datasets)
    delete_dataset = Operation(training.delete_dataset)
    train = Operation(training.train)
    caption = Operation(training.caption)
    get_training = Operation(training.get_training)
    trainings = Operation(training.trainings)
    cancel_training = Operation(training.cancel_training)
    resume_training = Operation(training.resume_training)
    delete_training = Operation(training.delete_training)
    keys = Operation(key.keys)
    create_key = Operation(key.create_key)
    change_key = Operation(key.change_key)
    revoke_key = Operation(key.revoke_key)
    usage = Operation(key.usage)
    workflows = Operation(catalogue.workflows)
    get_workflow = Operation(catalogue.get_workflow)
    put_workflow = Operation(catalogue.put_workflow)
    delete_workflow = Operation(catalogue.delete_workflow)
    models = Operation(catalogue.models)
    loras = Operation(catalogue.loras)
    get_lora = Operation(catalogue.get_lora)
    import_lora = Operation(catalogue.import_lora)
    settle_lora = Operation(catalogue.settle_lora)
    share_lora = Operation(catalogue.share_lora)
    delete_lora = Operation(catalogue.delete_lora)


class _Connection(Operations):
    """Where the gateway is, as whom it is asked, and how long one bears with it."""

    def __init__(
        self,
        url: str | None = None,
        api_key: str | None = None,
        *,
        timeout_s: float = 30.0,
        patience_s: float = 10.0,
        way: Way | None = None,
        first_event_s: float = FIRST_EVENT_S,
    ) -> None:
        self.url = (url or os.environ.get("FLUXGATE_URL") or DEFAULT_URL).rstrip("/")
        self.patience_s = patience_s
        # Kept as it was found to be: the next stream begins with it.
        wanted = way or os.environ.get("FLUXGATE_STREAM")
        self.way: Way = next((known for known in WAYS if known == wanted), "get")
        self._first_event_s = first_event_s
        self._timeout_s = timeout_s
        key = api_key or os.environ.get("FLUXGATE_API_KEY")
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._open()

    def _open(self) -> None:
        """Make what carries the requests."""
        raise TypeError("Client and AsyncClient are the ones to make")

    def _limits_of(self, ask: Ask) -> dict[str, Any]:
        return {"timeout": httpx.Timeout(self._timeout_s, read=ask.timeout_s or self._timeout_s)}

    def _follow(self, job_id: str, after: str | None, previews: bool, give_up_s: float) -> Following:
        return Following(self.url, job_id, after or "", previews, give_up_s, self.way, self._first_event_s)


class Client(_Connection):
    """A gateway at `url` (default: FLUXGATE_URL, else http://127.0.0.1:8000) with a key (default: FLUXGATE_API_KEY, else none).

    Raises ApiError for what the gateway refuses and Unreachable when it does not answer; nothing of httpx's. A request that
    fails on the way is sent again for `patience_s` seconds of pauses, where that cannot do anything twice: what makes a job
    carries an idempotency key. `way` is how streams begin (default: FLUXGATE_STREAM, else `get`); see `following`.
    """

    def _open(self) -> None:
        with translate(self.url):
            self._http = httpx.Client(base_url=self.url, headers=self._headers)
            # Signed URLs carry their own right to read; S3 refuses a request that brings a second one.
            self._plain_http = httpx.Client(follow_redirects=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()
        self._plain_http.close()

    def run(self, steps: Steps[T]) -> T:
        """Take the steps one by one."""
        steps = persist(steps, self.patience_s)
        try:
            ask = next(steps)
            while True:
                try:
                    answer = self._send(ask)
                except Unreachable as error:
                    ask = steps.throw(error)
                else:
                    ask = steps.send(answer)
        except StopIteration as end:
            return cast(T, end.value)

    def _send(self, ask: Ask) -> httpx.Response:
        time.sleep(ask.after_s)
        http = self._plain_http if ask.is_foreign else self._http
        with translate(_place_of(ask, self.url)):
            return http.request(ask.method, ask.path, **ask.options(), **self._limits_of(ask))

    def stream(self, job_id: str, *, after: str | None = None, previews: bool = False, give_up_s: float = 60.0) -> Iterator[Event]:
        """Every event of a generation or training until it has ended, over as many connections as it takes; none twice, none left out.

        The first event of a stream is the job as it stands and has no id; `after` continues behind an id seen before.
        Unreachable when the gateway stays silent or away for `give_up_s`.
        """
        following = self._follow(job_id, after, previews, give_up_s)
        while not following.has_ended:
            time.sleep(following.pause_s)
            try:
                with closing(self._listen(following.ask())) as events:
                    for event in events:
                        if following.take(event):
                            yield event
                        if following.is_last(event):
                            break
                following.lose(None)
            except (Unreachable, ApiError) as error:
                following.lose(error)
            self.way = following.way

    def _listen(self, ask: Ask) -> Generator[Event, None, None]:
        """The events of one connection."""
        with translate(self.url):
            with self._http.stream(ask.method, ask.path, **ask.options(), **self._limits_of(ask)) as answer:
                if not _is_stream(answer):
                    answer.read()
                    yield from read_event_page(answer)
                    return
                for message in EventSource(answer).iter_sse():
                    yield read_event(message.id, message.event, message.data)

    def wait(self, job_id: str, *, give_up_s: float = 60.0) -> Job:
        """The generation when it has ended. Unreachable when the gateway is away for `give_up_s`; the job may take any time."""
        for _ in self.stream(job_id, give_up_s=give_up_s):
            pass
        return self.get(job_id)

    def wait_training(self, training_id: str, *, give_up_s: float = 60.0) -> Training:
        """The training when it has ended."""
        for _ in self.stream(training_id, give_up_s=give_up_s):
            pass
        return self.get_training(training_id)


class AsyncClient(_Connection):
    """`Client` for `await` and `async for`."""

    def _open(self) -> None:
        with translate(self.url):
            self._http = httpx.AsyncClient(base_url=self.url, headers=self._headers)
            self._plain_http = httpx.AsyncClient(follow_redirects=True)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    async def close(self) -> None:
        await self._http.aclose()
        await self._plain_http.aclose()

    async def run(self, steps: Steps[T]) -> T:
        """Take the steps one by one."""
        steps = persist(steps, self.patience_s)
        try:
            ask = next(steps)
            while True:
                try:
                    answer = await self._send(ask)
                except Unreachable as error:
                    ask = steps.throw(error)
                else:
                    ask = steps.send(answer)
        except StopIteration as end:
            return cast(T, end.value)

    async def _send(self, ask: Ask) -> httpx.Response:
        await asyncio.sleep(ask.after_s)
        http = self._plain_http if ask.is_foreign else self._http
        with translate(_place_of(ask, self.url)):
            return await http.request(ask.method, ask.path, **ask.options(), **self._limits_of(ask))

    async def stream(
        self, job_id: str, *, after: str | None = None, previews: bool = False, give_up_s: float = 60.0
    ) -> AsyncGenerator[Event, None]:
        """As `Client.stream`."""
        following = self._follow(job_id, after, previews, give_up_s)
        while not following.has_ended:
            await asyncio.sleep(following.pause_s)
            try:
                async with aclosing(self._listen(following.ask())) as events:
                    async for event in events:
                        if following.take(event):
                            yield event
                        if following.is_last(event):
                            break
                following.lose(None)
            except (Unreachable, ApiError) as error:
                following.lose(error)
            self.way = following.way

    async def _listen(self, ask: Ask) -> AsyncGenerator[Event, None]:
        with translate(self.url):
            async with self._http.stream(ask.method, ask.path, **ask.options(), **self._limits_of(ask)) as answer:
                if not _is_stream(answer):
                    await answer.aread()
                    for event in read_event_page(answer):
                        yield event
                    return
                async for message in EventSource(answer).aiter_sse():
                    yield read_event(message.id, message.event, message.data)

    async def wait(self, job_id: str, *, give_up_s: float = 60.0) -> Job:
        """As `Client.wait`."""
        await _exhaust(self.stream(job_id, give_up_s=give_up_s))
        return await self.get(job_id)

    async def wait_training(self, training_id: str, *, give_up_s: float = 60.0) -> Training:
        """As `Client.wait_training`."""
        await _exhaust(self.stream(training_id, give_up_s=give_up_s))
        return await self.get_training(training_id)


async def _exhaust(events: AsyncIterator[Event]) -> None:
    async for _ in events:
        pass


def _place_of(ask: Ask, url: str) -> str:
    # What is signed stays out of messages.
    return httpx.URL(ask.path).host if ask.is_foreign else url


def _is_stream(answer: httpx.Response) -> bool:
    return answer.is_success and answer.headers.get("content-type", "").startswith("text/event-stream")
