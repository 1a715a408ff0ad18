"""Who judges texts and pictures: a list of words, an HTTP endpoint, or a function that an operator installed.

A judge answers or raises JudgeFailed; what that means for the request is not its business.
"""

from __future__ import annotations

import asyncio
import base64
import importlib
import inspect
import json
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

import aiohttp
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError

from gateway.errors import FluxgateError
from gateway.moderation.blocklist import Blocklist, BrokenEntry, read_blocklist
from gateway.settings import Settings

log = logging.getLogger(__name__)

ENTRY_POINTS = "fluxgate.moderation"
MAX_ANSWER_BYTES = 64 << 10
MAX_PICTURE_BYTES = 64 << 20
# Of a function that does not wait but works.
THREADS = 4
# A list is matched on the loop itself where that takes less than a thread would.
SHORT = 5000

Stage: TypeAlias = Literal["prompt", "picture"]


class JudgeFailed(Exception):
    """It did not answer, or what it said is no verdict. The message holds nothing of what was to be judged."""


class JudgeBroken(FluxgateError):
    """The one that is set cannot be asked at all: refused at start."""

    code = "moderation_broken"
    hint = "MODERATION is `blocklist`, an http(s) URL, `package.module:function`, or the name of an entry point."


class Case(NamedTuple):
    """What is to be judged: texts before anything is queued, or a picture before it is stored."""

    stage: Stage
    caller: str
    workflow: str
    texts: tuple[str, ...]
    job: str | None = None
    picture: bytes | None = None
    content_type: str | None = None

    def facts(self) -> dict[str, Any]:
        """What every judge is told, but for the picture."""
        return {"stage": self.stage, "caller": self.caller, "workflow": self.workflow, "job": self.job, "texts": list(self.texts)}


class Verdict(BaseModel):
    """What a judge says. `reason` and `categories` are told to the caller."""

    model_config = ConfigDict(extra="ignore")

    allowed: bool = Field(strict=True)
    reason: str | None = Field(None, max_length=500)
    categories: list[str] = Field(default_factory=list, max_length=50)


class Judge(Protocol):
    stages: frozenset[Stage]

    async def judge(self, case: Case) -> Verdict:
        """Raises JudgeFailed."""


class BlocklistJudge:
    """Texts alone. The file is read anew when it has changed; while it cannot be, the one before stands."""

    stages: frozenset[Stage] = frozenset({"prompt"})

    def __init__(self, path: Path) -> None:
        self._path, self._seen = path, (0, 0)
        self._list = Blocklist(frozenset(), (), ())
        try:
            self._read()
        except (OSError, ValueError) as error:
            raise JudgeBroken(f"MODERATION_BLOCKLIST {path} cannot be read: {error}") from error

    def _read(self) -> None:
        facts = self._path.stat()
        if self._seen != (facts.st_mtime_ns, facts.st_size):
            self._list = read_blocklist(self._path.read_text().splitlines())
            self._seen = facts.st_mtime_ns, facts.st_size

    async def judge(self, case: Case) -> Verdict:
        try:
            self._read()
        except (OSError, BrokenEntry, UnicodeDecodeError) as error:
            log.warning("the block list is not read anew", extra={"error": str(error)})
        text = "\n".join(case.texts)
        blocked = self._list.blocks(text) if len(text) < SHORT else await asyncio.to_thread(self._list.blocks, text)
        return Verdict(allowed=not blocked, reason="It holds what this deployment does not draw." if blocked else None)


class HttpJudge:
    """An endpoint that is posted each case as JSON, and answers with a verdict."""

    stages: frozenset[Stage] = frozenset({"prompt", "picture"})

    def __init__(self, url: str, secret: SecretStr | None, timeout_s: float, session: aiohttp.ClientSession) -> None:
        self._url, self._session = url, session
        self._timeout = aiohttp.ClientTimeout(total=timeout_s)
        proof = {"Authorization": f"Bearer {secret.get_secret_value()}"} if secret else {}
        self._headers = {"Content-Type": "application/json", **proof}

    async def judge(self, case: Case) -> Verdict:
        content = await asyncio.to_thread(_encode, case)
        try:
            options: Any = {"data": content, "headers": self._headers, "timeout": self._timeout, "allow_redirects": False}
            async with self._session.post(self._url, **options) as answer:
                body = await answer.content.read(MAX_ANSWER_BYTES + 1)
                while not answer.content.at_eof() and len(body) <= MAX_ANSWER_BYTES:
                    body += await answer.content.read(MAX_ANSWER_BYTES + 1)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise JudgeFailed(f"the endpoint did not answer ({type(error).__name__})") from error
        if answer.status != 200 or len(body) > MAX_ANSWER_BYTES:
            raise JudgeFailed(f"the endpoint answered with status {answer.status} and {len(body)} bytes or more")
        try:
            return Verdict.model_validate_json(body)
        except ValidationError as error:
            raise JudgeFailed("the endpoint's answer is no verdict") from error


def _encode(case: Case) -> bytes:
    facts = case.facts()
    if case.picture is not None:
        facts["picture"] = {"content_type": case.content_type, "base64": base64.b64encode(case.picture).decode()}
    return json.dumps(facts).encode()


class FunctionJudge:
    """A function of the operator's: told the same as an endpoint, with the picture's bytes; a coroutine, or run in a thread."""

    stages: frozenset[Stage] = frozenset({"prompt", "picture"})

    def __init__(self, function: Callable[[dict[str, Any]], Any], timeout_s: float) -> None:
        self._function, self._timeout_s = function, timeout_s
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="moderation")

    async def judge(self, case: Case) -> Verdict:
        facts = case.facts()
        if case.picture is not None:
            facts["picture"] = {"content_type": case.content_type, "bytes": case.picture}
        try:
            async with asyncio.timeout(self._timeout_s):
                if inspect.iscoroutinefunction(self._function):
                    said = await self._function(facts)
                else:
                    said = await asyncio.get_running_loop().run_in_executor(self._threads, self._function, facts)
            return said if isinstance(said, Verdict) else Verdict.model_validate(said)
        except Exception as error:  # boundary: a stranger's code, which may raise anything
            log.exception("the moderation function broke")
            raise JudgeFailed(f"the function raised {type(error).__name__}, or took too long, or its answer is no verdict") from error


def open_judge(settings: Settings, session: aiohttp.ClientSession | None) -> Judge | None:
    """The one that MODERATION names; None when it names none. Without a session it is only looked at. Raises JudgeBroken."""
    wanted = settings.moderation
    if not wanted:
        return None
    if wanted == "blocklist":
        if settings.moderation_blocklist is None:
            raise JudgeBroken("MODERATION=blocklist needs MODERATION_BLOCKLIST, a file.")
        return BlocklistJudge(settings.moderation_blocklist)
    if wanted.startswith(("http://", "https://")):
        return HttpJudge(wanted, settings.moderation_secret, settings.moderation_timeout_s, session) if session else None
    return FunctionJudge(_find_function(wanted), settings.moderation_timeout_s)


def _find_function(name: str) -> Callable[[dict[str, Any]], Any]:
    """`package.module:function`, or the name of an installed entry point."""
    module, colon, attribute = name.partition(":")
    try:
        if colon:
            found = getattr(importlib.import_module(module), attribute)
        else:
            [point] = entry_points(group=ENTRY_POINTS, name=name)
            found = point.load()
    except Exception as error:  # boundary: importing a stranger's code may raise anything
        raise JudgeBroken(f"MODERATION={name} cannot be imported: {type(error).__name__}: {error}") from error
    if not callable(found):
        raise JudgeBroken(f"MODERATION={name} is no function.")
    function: Callable[[dict[str, Any]], Any] = found
    return function
