"""What can be asked about uploads."""

from __future__ import annotations

import hashlib
import mimetypes

from fluxgate.asking import Ask, File, Steps, ask_for, drop, open_file, page_of, path_of, read_bytes
from fluxgate.wire import (
    Page,
    Upload,
    read_answer,
    read_as,
    reads,
)

# Larger files go straight to S3.
LARGEST_THROUGH_GATEWAY = 8 << 20


def upload(file: File) -> Steps[Upload]:
    """Send a file and get an id for it. A large one goes straight to S3; what is wrong with that is said when it is first used."""
    name, body = open_file(file)
    if len(body) <= LARGEST_THROUGH_GATEWAY:
        # Sent twice it is stored once.
        return (yield from ask_for(Ask("POST", "/v1/uploads", files=[("file", (name, body))]), reads(Upload)))
    kind = mimetypes.guess_type(name)[0] or "application/octet-stream"
    promise = {"content_type": kind, "size_bytes": len(body), "sha256": hashlib.sha256(body).hexdigest(), "name": name}
    told = read_answer((yield Ask("POST", "/v1/uploads", json=promise)))
    read_bytes((yield Ask(told["method"], told["url"], headers=told["headers"], content=body, is_foreign=True)))
    return read_as(Upload, told)


def uploads(*, limit: int = 20, cursor: str | None = None) -> Steps[Page[Upload]]:
    """The caller's uploads, newest first."""
    return page_of("uploads", Page[Upload], limit, cursor)


def delete_upload(upload_id: str) -> Steps[None]:
    """Forget an upload; jobs that were made with it keep their own copy."""
    return drop(path_of("uploads", upload_id))
