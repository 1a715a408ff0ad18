"""When a request is sent again: where that can do no harm, and what failed may pass. Pure; pauses are part of the next request."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar, cast

import httpx

from fluxgate.asking import Ask, Steps
from fluxgate.errors import ApiError, Unreachable
from fluxgate.wire import STRANGER, read_answer

T = TypeVar("T")
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.25, 5.0
# What a gateway on its way up, or a proxy with none behind it, answers.
PASSING_STATUSES = (502, 503, 504)
# The other refusals with 503 (no_instance, ...) are answers: the same question gets them again.
PASSING_CODES = (STRANGER, "redis_unavailable", "storage_unavailable", "unavailable")
# The first request with the same Idempotency-Key is still at work; its answer is coming.
IN_USE = "idempotency_key_in_use"


def is_passing(error: ApiError) -> bool:
    """Whether the same request may be taken in a moment."""
    return error.code == IN_USE or (error.status in PASSING_STATUSES and error.code in PASSING_CODES)


def persist(steps: Steps[T], patience_s: float) -> Steps[T]:
    """The same steps, each request of which is sent again until `patience_s` seconds of pauses are used up."""
    try:
        ask = next(steps)
        while True:
            ask = steps.send((yield from _insist(ask, patience_s)))
    except StopIteration as end:
        return cast(T, end.value)


def _insist(ask: Ask, patience_s: float) -> Steps[httpx.Response]:
    pause_s, spent_s = FIRST_PAUSE_S, 0.0
    while True:
        failure: Unreachable | None = None
        wanted_s: float | None = pause_s
        try:
            answer = yield ask
            wanted_s = _choose_pause(ask, answer, pause_s)
        except Unreachable as error:
            failure = error
            wanted_s = pause_s if ask.is_repeatable or error.never_sent else None
        if wanted_s is None or spent_s + wanted_s > patience_s:
            if failure is not None:
                raise failure
            return answer
        spent_s += wanted_s
        ask, pause_s = replace(ask, after_s=wanted_s), min(pause_s * 2, LONGEST_PAUSE_S)


def _choose_pause(ask: Ask, answer: httpx.Response, pause_s: float) -> float | None:
    """Seconds until it is worth another try; None when the answer stands."""
    if answer.status_code == httpx.codes.TOO_MANY_REQUESTS:
        # It was refused before anything was done. Without a time there is none to wait for.
        after = answer.headers.get("Retry-After", "")
        return max(float(after), pause_s) if after.isascii() and after.isdecimal() else None
    is_passing_status = answer.status_code in PASSING_STATUSES
    if not ask.is_repeatable or not (is_passing_status or answer.status_code == httpx.codes.CONFLICT):
        return None
    try:
        read_answer(answer)
    except ApiError as error:
        return pause_s if (ask.is_foreign and is_passing_status) or is_passing(error) else None
    return None
