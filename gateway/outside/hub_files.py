"""Single files on Hugging Face: how large one is, what its hash must be, and its bytes, gone on with where they stopped.

Not by huggingface_hub's whole download: that of version 2.4 throws away what it has when it is interrupted.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError
from huggingface_hub.file_download import http_get
from huggingface_hub.utils._headers import build_hf_headers
from pydantic import SecretStr

from gateway.errors import FluxgateError

PAUSES_S = (1.0, 5.0, 15.0)
PIECE_BYTES = 8 << 20
_SHA256 = re.compile(r"[0-9a-f]{64}")


class PullFailed(FluxgateError):
    """A file of a base model could not be brought, or is not what it should be."""

    code = "pull_failed"


class Offer(NamedTuple):
    """A file as the hub has it. `url` names the commit, so that it cannot change on the way."""

    url: str
    size_bytes: int
    sha256: str
    commit: str


class HubFiles:
    """Blocking; every failure leaves as PullFailed."""

    def __init__(self, endpoint: str, token: SecretStr | None) -> None:
        self._endpoint = endpoint.rstrip("/")
        # False: not the one that a person logged in with on this machine.
        self._token: str | bool = token.get_secret_value() if token else False

    def look(self, repository: str, path: str) -> Offer:
        """What would be fetched. The hub knows the hash of every large file."""
        page = f"{self._endpoint}/{repository}"
        with _translated(f"{repository}/{path}", page):
            url = hf_hub_url(repository, path, endpoint=self._endpoint)
            found = get_hf_file_metadata(url, token=self._token, endpoint=self._endpoint)
        if not found.size or not found.commit_hash or not _SHA256.fullmatch(found.etag or ""):
            raise PullFailed(f"Hugging Face tells no size and hash of {repository}/{path}.", hint=f"Look at {page}: it may have moved.")
        pinned = hf_hub_url(repository, path, revision=found.commit_hash, endpoint=self._endpoint)
        return Offer(pinned, found.size, str(found.etag), found.commit_hash)

    def fetch(self, offer: Offer, part: Path, shown: str) -> None:
        """Write the file to `part`, after what is there already. What was fetched stays there whatever happens."""
        part.parent.mkdir(parents=True, exist_ok=True)
        for pause_s in (*PAUSES_S, None):
            before = part.stat().st_size if part.exists() else 0
            try:
                with _translated(shown, offer.url), part.open("ab") as file:
                    if before > offer.size_bytes:
                        file.truncate(0)
                    http_get(
                        offer.url,
                        file,
                        resume_size=file.tell(),
                        headers=build_hf_headers(token=self._token),
                        expected_size=offer.size_bytes,
                        displayed_filename=shown,
                    )
                return
            except PullFailed:
                if pause_s is None or part.stat().st_size <= before:
                    raise
                time.sleep(pause_s)


@contextmanager
def _translated(what: str, page: str) -> Iterator[None]:
    try:
        yield
    except GatedRepoError as error:
        hint = f"Accept the licence on {page} with an account, and set HF_TOKEN to a token of it."
        raise PullFailed(f"{what} is gated.", hint=hint) from error
    except HfHubHTTPError as error:
        hint = (
            "Check HF_TOKEN, and HF_ENDPOINT."
            if error.response.status_code in (401, 403, 404)
            else "Try again: it goes on where it stopped."
        )
        raise PullFailed(f"Hugging Face answers {error.response.status_code} for {what}.", hint=hint) from error
    except Exception as error:  # boundary: which library carries its requests changes with its versions
        reason = str(error).split("\n")[0][:200] or type(error).__name__
        raise PullFailed(f"{what} could not be fetched: {reason}", hint="Run the same again: it goes on where it stopped.") from error


def hash_file(path: Path) -> str:
    """SHA-256, read piece by piece."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(PIECE_BYTES):
            digest.update(piece)
    return digest.hexdigest()
