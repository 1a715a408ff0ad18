"""Whether a base model on Hugging Face may be read with the deployment's token. Asks the hub; no answer is no refusal."""

from __future__ import annotations

import asyncio
import re
import time
from pathlib import Path
from typing import Literal, NamedTuple

from huggingface_hub import HfApi
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError
from pydantic import SecretStr

from gateway.errors import Unprocessable

TIMEOUT_S = 8.0
# Whoever was denied accepts the licence and tries again at once; what was granted rarely is taken back.
GRANTED_TTL_S = 900.0
DENIED_TTL_S = 10.0
UNKNOWN_TTL_S = 30.0
REPOSITORY = re.compile(r"\w[\w.-]{0,95}/\w[\w.-]{0,95}", re.ASCII)

Verdict = Literal["granted", "gated", "absent", "bad_token", "unknown"]


class _Answer(NamedTuple):
    verdict: Verdict
    said: str
    until: float


class HubAccess:
    """Answers are remembered for a while in this process; they are the hub's, and any process may ask again."""

    def __init__(self, endpoint: str, token: SecretStr | None) -> None:
        self._endpoint, self._token = endpoint.rstrip("/"), token
        self._known: dict[str, _Answer] = {}

    async def require(self, base_path: str) -> str:
        """What was found out, in words. Raises Unprocessable `model_access_denied` or `model_not_found`.

        A folder needs no access. Where the hub cannot be asked nothing is refused, and the answer says so.
        """
        if Path(base_path).is_absolute() or not REPOSITORY.fullmatch(base_path):
            return "not asked: a folder"
        known = self._known.get(base_path)
        if known is None or known.until < time.monotonic():
            known = self._known[base_path] = await self._ask(base_path)
        page = f"{self._endpoint}/{base_path}"
        details = {"parameter": "base", "value": base_path, "licence_url": page}
        if known.verdict == "gated":
            hint = f"Accept its licence on {page} and give the deployment a token of that account (HF_TOKEN)."
            message = f"{base_path} is gated, and this deployment's account has no access."
            raise Unprocessable(message, code="model_access_denied", hint=hint, details=details)
        if known.verdict == "bad_token":
            hint = "Set HF_TOKEN to a valid token with read scope."
            raise Unprocessable(
                "Hugging Face does not know the deployment's token.", code="model_access_denied", hint=hint, details=details
            )
        if known.verdict == "absent":
            hint = "A private repository needs an HF_TOKEN that may read it; else check the name, or name a folder in BASE_MODEL_PATHS."
            message = f"There is no repository {base_path!r} on Hugging Face for this deployment."
            raise Unprocessable(message, code="model_not_found", hint=hint, details=details)
        return "granted" if known.verdict == "granted" else f"not known: {known.said}"

    async def identify(self) -> tuple[Verdict, str]:
        """(granted, the account's name) for a good token, else (bad_token or unknown, why)."""
        try:
            async with asyncio.timeout(TIMEOUT_S):
                return await asyncio.to_thread(self._identify)
        except TimeoutError:
            return "unknown", f"no answer within {TIMEOUT_S:g} s"

    def _identify(self) -> tuple[Verdict, str]:
        token = self._token.get_secret_value() if self._token else None
        try:
            return "granted", str(HfApi(endpoint=self._endpoint).whoami(token=token).get("name"))
        except HfHubHTTPError as error:
            status = error.response.status_code
            return ("bad_token", "") if status == 401 else ("unknown", f"the hub answered {status}")
        except Exception:  # noqa: BLE001  boundary: which library carries its requests changes with its versions
            return "unknown", "the hub is out of reach"

    async def _ask(self, repository: str) -> _Answer:
        try:
            async with asyncio.timeout(TIMEOUT_S):
                verdict, said = await asyncio.to_thread(self._check, repository)
        except TimeoutError:
            verdict, said = "unknown", f"no answer within {TIMEOUT_S:g} s"
        lives_s = {"granted": GRANTED_TTL_S, "unknown": UNKNOWN_TTL_S}.get(verdict, DENIED_TTL_S)
        return _Answer(verdict, said, time.monotonic() + lives_s)

    def _check(self, repository: str) -> tuple[Verdict, str]:
        token = self._token.get_secret_value() if self._token else None
        try:
            HfApi(endpoint=self._endpoint).auth_check(repository, token=token)
        except GatedRepoError:
            return "gated", ""
        except RepositoryNotFoundError as error:
            return ("bad_token" if token and _says_bad_token(error) else "absent"), ""
        except OfflineModeIsEnabled:
            return "unknown", "HF_HUB_OFFLINE is set"
        except HfHubHTTPError as error:
            if _says_bad_token(error):
                return "bad_token", ""
            return "unknown", f"the hub answered {error.response.status_code}"
        except Exception:  # noqa: BLE001  boundary: which library carries its requests changes with its versions
            return "unknown", "the hub is out of reach"
        return "granted", ""


def _says_bad_token(error: HfHubHTTPError) -> bool:
    return error.response.status_code == 401 and "Invalid" in (error.response.headers.get("X-Error-Message") or "")
