"""Uploaded inputs: bytes in by one of three ways, verified, kept in S3 under random keys, and gone when nobody used them for a while.

It trusts no hash, length or type that a caller said, and refuses to know what an asset is used for.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import logging
import re
import secrets
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import IO, Any
from uuid import uuid4

from blake3 import blake3
from PIL import Image

from gateway.datasets.intake import CONTENT_TYPES, sniff
from gateway.errors import Conflict, FluxgateError, NotFound, RedisUnavailable, StorageUnavailable, Unprocessable
from gateway.inputs.asset_records import Asset, AssetRecords
from gateway.jobs.model import now_ms
from gateway.storage import Storage

log = logging.getLogger(__name__)

PIECE_BYTES = 1 << 20
SWEEP_S = 30.0
# What was noted as garbage before it was written: longer than any request takes.
WRITE_MS = 3600 * 1000
# What a browser may be told by S3; everything else is stored as mere bytes.
PLAIN_TYPES = frozenset({"image/png", "image/jpeg", "image/webp", "video/mp4", "video/webm", "application/zip", "text/plain"})
BYTES_TYPE = "application/octet-stream"
_TYPE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,60}/[a-z0-9][a-z0-9.+-]{0,60}")


@dataclass(frozen=True, slots=True)
class Presigned:
    """Where and how a caller sends the bytes he promised: a PUT with these headers, until `expires_ms`."""

    asset: Asset
    url: str
    headers: dict[str, str]
    expires_ms: int


class _Digest:
    """Both hashes, the size and the first bytes of what passes."""

    def __init__(self) -> None:
        self.sha256, self.blake3, self.size_bytes, self.head = hashlib.sha256(), blake3(), 0, b""

    def take(self, piece: bytes) -> None:
        self.sha256.update(piece)
        self.blake3.update(piece)
        self.size_bytes += len(piece)
        if len(self.head) < PIECE_BYTES:
            self.head += piece[: PIECE_BYTES - len(self.head)]

    @classmethod
    def of(cls, file: IO[bytes]) -> _Digest:
        digest = cls()
        while piece := file.read(PIECE_BYTES):
            digest.take(piece)
        file.seek(0)
        return digest

    def describe(self) -> dict[str, Any]:
        width, height = _measure(self.head)
        return {
            "sha256": self.sha256.hexdigest(),
            "blake3": self.blake3.hexdigest(),
            "size_bytes": self.size_bytes,
            "width": width,
            "height": height,
        }


def _measure(head: bytes) -> tuple[int | None, int | None]:
    """Width and height of a picture, by its header alone; None, None for everything else."""
    with suppress(Exception):  # boundary: a decoder may raise anything on a stranger's bytes
        with Image.open(io.BytesIO(head), formats=["PNG", "JPEG", "WEBP"]) as image:
            return image.size
    return None, None


def stored_type(content_type: str) -> str:
    """The type S3 is to answer with: one that no browser runs."""
    return content_type if content_type in PLAIN_TYPES else BYTES_TYPE


def clean_type(content_type: str) -> str:
    """A caller's media type, lower case and without parameters. Raises Unprocessable."""
    plain = content_type.partition(";")[0].strip().lower()
    if not _TYPE.fullmatch(plain):
        details = {"parameter": "content_type", "value": content_type[:200], "allowed": "a media type such as image/png"}
        raise Unprocessable(f"{content_type[:200]!r} is no media type.", code="invalid_parameter", details=details)
    return plain


def absent(asset_id: str, parameter: str = "id") -> NotFound:
    """Somebody else's asset is as absent as one that never was."""
    details = {"parameter": parameter, "value": asset_id[:100]}
    return NotFound(f"There is no upload {asset_id[:100]!r}.", code="asset_not_found", details=details)


class AssetStore:
    """Assets of all callers. Raises Unprocessable, NotFound, RedisUnavailable and StorageUnavailable."""

    def __init__(self, records: AssetRecords, storage: Storage, *, ttl_s: int, url_ttl_s: int) -> None:
        """`ttl_s`: how long an asset is kept after it was made or last used; `url_ttl_s`: how long a signed URL lives."""
        self._records, self._storage, self._ttl_ms, self._url_ttl_ms = records, storage, ttl_s * 1000, url_ttl_s * 1000

    async def put_file(
        self,
        caller: str,
        file: IO[bytes],
        content_type: str,
        name: str | None = None,
        *,
        tags: tuple[str, ...] = (),
        ttl_s: int | None = None,
        is_listed: bool = True,
    ) -> Asset:
        """Keep what a file holds. Bytes that this caller has already are not stored again: the new asset stands on the same object."""
        return (await self.put_checked(caller, file, content_type, name, tags=tags, ttl_s=ttl_s, is_listed=is_listed))[0]

    async def put_checked(
        self,
        caller: str,
        file: IO[bytes],
        content_type: str,
        name: str | None = None,
        *,
        blake3: str | None = None,
        tags: tuple[str, ...] = (),
        ttl_s: int | None = None,
        is_listed: bool = True,
    ) -> tuple[Asset, bool]:
        """As `put_file`, and whether the bytes are new. Raises Conflict when they have another hash than the `blake3` given."""
        content_type = clean_type(content_type)
        digest = await asyncio.to_thread(_Digest.of, file)
        if blake3 is not None and digest.blake3.hexdigest() != blake3:
            details = {"value": f"blake3:{digest.blake3.hexdigest()}", "expected": f"blake3:{blake3}"}
            raise Conflict("The bytes that came have another hash than was said.", code="hash_mismatch", details=details)
        created_ms, keep_ms = now_ms(), self._ttl_ms if ttl_s is None else ttl_s * 1000
        asset = Asset(
            id=str(uuid4()),
            caller=caller,
            name=name,
            content_type=content_type,
            tags=tags,
            is_listed=is_listed,
            created_ms=created_ms,
            expires_ms=created_ms + keep_ms,
            key=_new_key(),
            **digest.describe(),
        )
        if (shared := await self._records.save(asset, "share")) is not None:
            return shared, False
        await self._records.note_garbage(asset.key, now_ms() + WRITE_MS)
        await self._storage.put_stream(asset.key, file, stored_type(asset.content_type))
        return await self._records.save(asset, "own") or asset, True

    async def presign(self, caller: str, content_type: str, size_bytes: int, sha256: str, name: str | None = None) -> Presigned:
        """Promise an upload: a PUT straight to S3 whose type, length and sha256 are in the signature."""
        created_ms = now_ms()
        asset = Asset(
            id=str(uuid4()),
            caller=caller,
            name=name,
            content_type=clean_type(content_type),
            size_bytes=size_bytes,
            sha256=sha256.lower(),
            key=_new_key(),
            status="pending",
            writable_ms=created_ms + self._url_ttl_ms,
            created_ms=created_ms,
            expires_ms=created_ms + self._ttl_ms,
        )
        headers = {
            "Content-Type": stored_type(asset.content_type),
            "Content-Length": str(size_bytes),
            # S3 itself refuses other bytes by this; where it does not, `ready` does.
            "x-amz-checksum-sha256": base64.b64encode(bytes.fromhex(sha256)).decode(),
        }
        url = self._storage.sign_put(asset.key, headers)
        await self._records.save(asset, "own")
        return Presigned(asset, url, headers, asset.writable_ms)

    async def load(self, caller: str, asset_id: str) -> Asset:
        """The caller's asset as it stands. Raises NotFound."""
        asset = await self._records.load(asset_id)
        if asset is None or asset.caller != caller:
            raise absent(asset_id)
        return asset

    async def ready(self, caller: str, asset_id: str) -> Asset:
        """The caller's asset with its bytes verified, kept for another while. Raises NotFound, Unprocessable."""
        asset = await self.load(caller, asset_id)
        if asset.status == "pending":
            asset = await self._verify(asset)
        await self._records.touch(asset.id, now_ms() + self._ttl_ms)
        return asset

    async def _verify(self, asset: Asset) -> Asset:
        """Look at what was sent. It is copied first: the signed URL may still be used to write something else."""
        found = await self._storage.size_bytes(asset.key)
        details = {"parameter": "id", "value": asset.id, "expected_bytes": asset.size_bytes, "expected_sha256": asset.sha256}
        if found is None:
            hint = "PUT the bytes to the URL of the answer to POST /v1/uploads."
            raise Unprocessable(f"Nothing was sent for the upload {asset.id} yet.", code="upload_not_sent", hint=hint, details=details)
        if found != asset.size_bytes:
            raise _mismatch(f"{found} bytes were sent; {asset.size_bytes} were promised.", {**details, "bytes": found})
        key, digest = _new_key(), _Digest()
        await self._records.note_garbage(key, now_ms() + WRITE_MS)
        await self._storage.copy(asset.key, key)
        await self._storage.scan(key, digest.take)
        described = digest.describe()
        if described["sha256"] != asset.sha256 or described["size_bytes"] != asset.size_bytes:
            await self._records.note_garbage(key, now_ms())
            raise _mismatch("What was sent has another sha256 than was promised.", {**details, "sha256": described["sha256"]})
        if not _is_of_type(digest.head, asset.content_type):
            await self._records.note_garbage(key, now_ms())
            details["content_type"] = asset.content_type
            raise _mismatch(f"What was sent is no {asset.content_type}, which was promised.", details)
        checked = asset.model_copy(update={**described, "key": key, "status": "ready", "writable_ms": 0})
        if (saved := await self._records.save(checked, "replace")) is None:
            raise absent(asset.id)
        return saved

    async def read(self, asset: Asset) -> bytes:
        """The bytes of an asset that is ready. Raises NotFound when it was deleted since then."""
        async with self._unless_deleted(asset):
            return await self._storage.get(asset.key)

    async def copy_to(self, file: IO[bytes], asset: Asset) -> None:
        """Write the bytes of an asset that is ready behind what a file holds. Raises NotFound as `read` does."""
        async with self._unless_deleted(asset):
            await self._storage.scan(asset.key, file.write)

    @asynccontextmanager
    async def _unless_deleted(self, asset: Asset) -> AsyncIterator[None]:
        try:
            yield
        except StorageUnavailable as error:
            if await self._records.load(asset.id) is None:
                raise absent(asset.id) from error
            raise

    async def find_made(self, caller: str, how: str) -> Asset | None:
        """What was made in this way before, kept for another while; None: it is to be made."""
        found = await self._records.find_made(caller, how)
        if found is not None:
            await self.keep(found.id, self._ttl_ms)
        return found

    async def put_made(self, caller: str, how: str, content: bytes, content_type: str) -> Asset:
        """Keep what was made of an asset: unlisted, and found again by `how`."""
        asset = await self.put_file(caller, io.BytesIO(content), content_type, is_listed=False)
        await self._records.note_made(caller, how, asset)
        return asset

    async def keep(self, asset_id: str, for_ms: int) -> None:
        """Do not let an asset go for as long as that."""
        await self._records.touch(asset_id, now_ms() + for_ms)

    async def find(self, caller: str, *, sha256: str | None = None, blake3: str | None = None, name: str | None = None) -> Asset | None:
        """One of the caller's assets with these verified bytes, of this name if there is one; None when he has none."""
        digest = f"sha256:{sha256}" if sha256 is not None else f"blake3:{blake3}"
        key = await self._records.find_key(caller, digest.lower())
        found: Asset | None = None
        for asset_id in await self._records.ids_on(key) if key else []:
            asset = await self._records.load(asset_id)
            if asset is not None and asset.status == "ready" and asset.is_listed:
                if name is None or asset.name == name:
                    return asset
                found = found or asset
        return found

    async def again(self, asset: Asset, name: str | None, *, tags: tuple[str, ...] = (), ttl_s: int | None = None) -> Asset:
        """Another asset of the same caller on the same bytes, listed under a name of its own."""
        created_ms = now_ms()
        changes = {"id": str(uuid4()), "name": name, "tags": tags, "is_listed": True, "created_ms": created_ms}
        expires_ms = created_ms + (self._ttl_ms if ttl_s is None else ttl_s * 1000)
        saved = await self._records.save(asset.model_copy(update={**changes, "expires_ms": expires_ms}), "share")
        if saved is None:
            raise absent(asset.id)
        return saved

    async def page(self, caller: str, before: tuple[int, str] | None, limit: int) -> tuple[list[Asset], list[tuple[int, str]]]:
        """The caller's listed assets made before `before`, newest first, and the pairs they stood under."""
        pairs = await self._records.ids_before(caller, before, limit)
        found = [asset for _, asset_id in pairs if (asset := await self._records.load(asset_id)) is not None]
        return found, pairs

    async def delete(self, caller: str, asset_id: str) -> None:
        """Forget an asset; its object goes with the last asset that stands on it. Raises NotFound."""
        if not await self._records.remove(asset_id, caller):
            raise absent(asset_id)
        await self.collect()

    @asynccontextmanager
    async def unless_refused(self, caller: str, assets: Iterable[Asset]) -> AsyncIterator[None]:
        """Forget them when what they came with is refused: nobody knows their ids."""
        try:
            yield
        except FluxgateError:
            with suppress(FluxgateError):
                for asset in assets:
                    await self.delete(caller, asset.id)
            raise

    async def collect(self) -> None:
        """Delete from S3 what nothing stands on any more."""
        while keys := await self._records.garbage():
            await self._storage.delete(keys)
            await self._records.forget_garbage(keys)

    async def sweep(self) -> None:
        """For ever: let assets go whose time is over. Any number of processes may do so at once."""
        while True:
            try:
                while await self._records.remove_expired():
                    pass
                await self.collect()
            except (RedisUnavailable, StorageUnavailable) as error:
                log.warning("uploads not swept", extra={"error": error.message})
            await asyncio.sleep(SWEEP_S)


def _new_key() -> str:
    return f"assets/{secrets.token_hex(16)}"


def _is_of_type(head: bytes, content_type: str) -> bool:
    """Whether a file's first bytes are those of its type. Types that they do not tell are taken at their word, and never shown by it."""
    if content_type == "application/zip":
        return head.startswith(b"PK")
    return content_type not in CONTENT_TYPES.values() or CONTENT_TYPES.get(sniff(head) or "") == content_type


def _mismatch(message: str, details: dict[str, object]) -> Unprocessable:
    hint = "Send exactly the bytes that were promised to the same URL, or ask for another upload."
    return Unprocessable(message, code="upload_mismatch", hint=hint, details=details)
