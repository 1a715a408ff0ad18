"""S3 through boto3, in threads. One implementation for AWS, R2, MinIO and rclone; it knows keys and bytes, not jobs."""

from __future__ import annotations

import asyncio
import hashlib
import io
import logging
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, ParamSpec, TypeVar, cast
from urllib.parse import quote, urlsplit

import aiohttp
import boto3
from boto3.exceptions import Boto3Error
from boto3.s3.transfer import TransferConfig
from botocore.auth import S3SigV4QueryAuth
from botocore.awsrequest import AWSRequest
from botocore.client import Config
from botocore.exceptions import BotoCoreError, ClientError
from yarl import URL

from gateway.errors import StorageUnavailable
from gateway.plain_http import PlainHttp
from gateway.settings import Settings
from gateway.sigv4 import Credentials, presign_get, sign_put

log = logging.getLogger(__name__)
P = ParamSpec("P")
R = TypeVar("R")

Reader = Callable[[str], bytes | None]  # an object's bytes by its key, None when there is none

THREADS = 8
# Ten thousand of them, the most that S3 takes, hold 156 GiB.
PART_BYTES = 16 << 20
PIECE_BYTES = 1 << 20
PUT_S = 300.0  # an answer of S3 may take as long
PUT_PAUSES_S = (0.05, 0.2)
FOLDERS_KEPT = 1000


def _connect(settings: Settings, endpoint_url: str | None) -> Any:
    """A client that signs what every S3 understands: sigv4, checksums only where demanded, path style off AWS."""
    secret = settings.aws_secret_access_key
    return boto3.client(
        "s3",
        endpoint_url=endpoint_url,
        region_name=settings.s3_region,
        aws_access_key_id=settings.aws_access_key_id,
        aws_secret_access_key=secret.get_secret_value() if secret else None,
        config=Config(
            signature_version="s3v4",
            # R2, rclone and older MinIO refuse or ignore the CRC trailers that newer boto3 adds by itself.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            s3={"addressing_style": "path" if endpoint_url else "virtual"},
            max_pool_connections=THREADS * 2,
            connect_timeout=5,
            read_timeout=60,
            retries={"mode": "standard", "total_max_attempts": 2},
        ),
    )


def _credentials(settings: Settings) -> Any:
    """The credentials boto3 would use: ours, or its own chain's, which renew themselves at each signing. None: there are none."""
    secret = settings.aws_secret_access_key
    session = boto3.Session(
        aws_access_key_id=settings.aws_access_key_id,
        aws_secret_access_key=secret.get_secret_value() if secret else None,
        region_name=settings.s3_region,
    )
    return session.get_credentials()


def _bucket_url(client: Any, bucket: str) -> str:
    """URL of the bucket, with its slash. Path style off AWS, virtual style on it."""
    anonymous = client.meta.endpoint_url.rstrip("/")
    if client.meta.config.s3["addressing_style"] == "path":
        return f"{anonymous}/{bucket}/"
    scheme, _, host = anonymous.partition("://")
    return f"{scheme}://{bucket}.{host}/"


def _amz_date() -> str:
    return time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())


def _read_code(error: Exception) -> dict[str, str]:
    """What S3 calls its refusal, and the region that it names where ours is wrong."""
    said = error.response.get("Error", {}) if isinstance(error, ClientError) else {}
    known = {"s3_code": said.get("Code"), "s3_region": said.get("Region")}
    return {name: str(value) for name, value in known.items() if value}


def _read_refusal(body: bytes) -> dict[str, str]:
    """The same, of an answer that boto3 has not read."""
    known = {
        "s3_code": re.search(rb"<Code>([A-Za-z]{1,60})</Code>", body),
        "s3_region": re.search(rb"<Region>([a-z0-9-]{1,40})</Region>", body),
    }
    return {name: found[1].decode() for name, found in known.items() if found}


class _Pieces:
    """Pieces as a file. A read gives what it was asked for until the end: S3 takes no short part but the last."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces, self._held = pieces, bytearray()

    def read(self, size: int = -1) -> bytes:
        while size < 0 or len(self._held) < size:
            piece = next(self._pieces, None)
            if piece is None:
                break
            self._held += piece
        taken = bytes(self._held if size < 0 else self._held[:size])
        del self._held[: len(taken)]
        return taken


class Storage:
    """One bucket. Raises StorageUnavailable, and nothing else of botocore's."""

    def __init__(self, settings: Settings, session: aiohttp.ClientSession | None = None, plain: PlainHttp | None = None) -> None:
        """With a `session` small objects are sent by it: a tenth of the CPU of boto3's own call; `plain` takes a third of that."""
        self.bucket = settings.s3_bucket
        self._url_ttl_s = settings.url_ttl_s
        self._region = settings.s3_region
        self._client = _connect(settings, settings.s3_endpoint_url)
        public = settings.s3_public_endpoint_url
        self._signer = _connect(settings, public) if public else self._client
        self._session, self._credentials = session, _credentials(settings)
        self._home, self._public_home = _bucket_url(self._client, self.bucket), _bucket_url(self._signer, self.bucket)
        self._home_path = urlsplit(self._home).path
        self._plain = plain.host(self._home) if plain else None
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="s3")
        self._folders = dict[str, asyncio.Event]()

    async def _call(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._threads, lambda: function(*args, **kwargs))
        except (ClientError, BotoCoreError, Boto3Error) as error:
            raise self._unavailable(error) from error

    def _unavailable(self, error: Exception) -> StorageUnavailable:
        """What S3 itself said is told; where it lies in the deployment is for the log alone."""
        said = str(error) if isinstance(error, ClientError) else type(error).__name__
        log.warning("S3 did not do it", extra={"error": str(error)})
        return StorageUnavailable(f"S3 did not do it: {said}", details={"bucket": self.bucket, **_read_code(error)})

    async def ensure_bucket(self) -> None:
        """Make the bucket unless it is there. A key that may not look is trusted to be able to write."""

        def ensure() -> None:
            try:
                self._client.head_bucket(Bucket=self.bucket)
            except ClientError as error:
                status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
                if status == 403:
                    return
                if status != 404:
                    raise
                location = {} if self._region == "us-east-1" else {"CreateBucketConfiguration": {"LocationConstraint": self._region}}
                self._client.create_bucket(Bucket=self.bucket, **location)

        await self._call(ensure)

    async def check(self) -> None:
        """Raise StorageUnavailable unless the bucket answers."""
        await self._call(self._client.head_bucket, Bucket=self.bucket)

    async def put(self, key: str, body: bytes, content_type: str, digest: str | None = None) -> None:
        """Store an object. Who knows the SHA-256 of `body` gives it as `digest`: of a large picture it takes a millisecond.

        The first object of a folder goes alone: rclone, the laptop's S3, can lose one of two that make the folder at once (4 of 600).
        """
        folder = key.rpartition("/")[0]
        if (first := self._folders.get(folder)) is not None:
            await first.wait()
            await self._put(key, body, content_type, digest)
            return
        self._folders[folder] = first = asyncio.Event()
        try:
            await self._put(key, body, content_type, digest)
        finally:
            first.set()
            if len(self._folders) > FOLDERS_KEPT:
                self._folders.pop(next(iter(self._folders)))

    async def _put(self, key: str, body: bytes, content_type: str, digest: str | None) -> None:
        if self._session is None or self._credentials is None:
            await self._call(self._client.put_object, Bucket=self.bucket, Key=key, Body=body, ContentType=content_type)
        else:
            await self._send_again(key, body, content_type, digest or hashlib.sha256(body).hexdigest())

    async def _send_again(self, key: str, body: bytes, content_type: str, digest: str) -> None:
        for pause_s in (*PUT_PAUSES_S, None):
            try:
                await self._send(key, body, content_type, digest)
                return
            except StorageUnavailable:
                # What boto3 does by itself: a server error or a lost connection now and then is S3's ordinary life.
                if pause_s is None:
                    raise
                await asyncio.sleep(pause_s)

    async def _send(self, key: str, body: bytes, content_type: str, digest: str) -> None:
        assert self._session is not None, "put asks first"
        url = self._home + quote(key)
        headers = sign_put(self._signing_credentials(), self._region, url, digest, content_type, _amz_date())
        try:
            if self._plain is not None:
                status, said = await self._plain.request("PUT", self._home_path + quote(key), headers=headers, body=body, timeout_s=PUT_S)
            else:
                async with self._session.put(URL(url, encoded=True), data=io.BytesIO(body), headers=headers) as response:
                    status, said = response.status, await response.read()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise self._unavailable(error) from error
        if status != 200:
            details = {"bucket": self.bucket, **_read_refusal(said)}
            raise StorageUnavailable(f"S3 answered {status}: {said[:200]!r}", details=details)

    async def put_file(self, key: str, path: Path, content_type: str = "application/octet-stream") -> None:
        """Store a file of any size, in parts."""
        await self._call(self._client.upload_file, str(path), self.bucket, key, ExtraArgs={"ContentType": content_type})

    async def put_stream(self, key: str, file: IO[bytes], content_type: str) -> None:
        """Store what a file still holds, in parts where it is large, and close it. It is read in another thread."""
        await self._call(self._client.upload_fileobj, file, self.bucket, key, ExtraArgs={"ContentType": content_type})

    async def put_made(self, key: str, make: Callable[[Reader], Iterator[bytes]], content_type: str) -> None:
        """Store what is made piece by piece from other objects, in another thread, in parts: it is never held whole."""

        def read(source: str) -> bytes | None:
            try:
                return bytes(self._client.get_object(Bucket=self.bucket, Key=source)["Body"].read())
            except ClientError as error:
                if error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") == 404:
                    return None
                raise

        def upload() -> None:
            config = TransferConfig(multipart_chunksize=PART_BYTES, max_concurrency=2)
            file = cast(IO[bytes], _Pieces(make(read)))
            self._client.upload_fileobj(file, self.bucket, key, ExtraArgs={"ContentType": content_type}, Config=config)

        await self._call(upload)

    async def size_bytes(self, key: str) -> int | None:
        """How large an object is; None when there is none."""

        def look() -> int | None:
            try:
                return int(self._client.head_object(Bucket=self.bucket, Key=key)["ContentLength"])
            except ClientError as error:
                if error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") == 404:
                    return None
                raise

        return await self._call(look)

    async def scan(self, key: str, take: Callable[[bytes], object]) -> None:
        """Hand an object's bytes to `take`, piece by piece, in another thread."""

        def read() -> None:
            body = self._client.get_object(Bucket=self.bucket, Key=key)["Body"]
            for piece in body.iter_chunks(PIECE_BYTES):
                take(piece)

        await self._call(read)

    async def get_file(self, key: str, path: Path) -> None:
        """Fetch an object of any size into a file."""
        await self._call(self._client.download_file, self.bucket, key, str(path))

    async def get(self, key: str) -> bytes:
        """The object's bytes."""
        return await self._call(lambda: bytes(self._client.get_object(Bucket=self.bucket, Key=key)["Body"].read()))

    async def copy(self, source: str, target: str) -> None:
        """Copy an object within the bucket; StorageUnavailable when it is not there."""
        where = {"Bucket": self.bucket, "Key": source}
        await self._call(self._client.copy_object, Bucket=self.bucket, Key=target, CopySource=where)

    async def delete(self, keys: list[str]) -> None:
        """Delete objects one by one: not every S3 has the bulk call, and a job has few."""

        def delete_all() -> None:
            for key in keys:
                self._client.delete_object(Bucket=self.bucket, Key=key)

        await self._call(delete_all)

    def sign(self, key: str) -> str:
        """A URL that reads the object for `url_ttl_s` seconds. Pure arithmetic, no request."""
        return presign_get(self._signing_credentials(), self._region, self._public_home + quote(key), self._url_ttl_s, _amz_date())

    def sign_put(self, key: str, headers: dict[str, str]) -> str:
        """A URL that writes the object, once or more, for `url_ttl_s` seconds, by a PUT that carries exactly these headers."""
        self._signing_credentials()
        request = AWSRequest("PUT", self._public_home + quote(key), headers=headers)
        S3SigV4QueryAuth(self._credentials, "s3", self._region, expires=self._url_ttl_s).add_auth(request)
        return str(request.url)

    def _signing_credentials(self) -> Credentials:
        """What boto3 would sign with now; temporary ones are renewed when it is time. Raises StorageUnavailable: there are none."""
        if self._credentials is None:
            raise StorageUnavailable("S3 URLs cannot be signed: there are no credentials.", details={"bucket": self.bucket})
        return Credentials(*self._credentials.get_frozen_credentials()[:3])

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
