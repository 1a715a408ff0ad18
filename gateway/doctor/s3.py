"""S3 as a job uses it: an object is put, read by a signed URL where callers read it, compared, and deleted."""

from __future__ import annotations

import hashlib
import secrets
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import aiohttp
from yarl import URL

from gateway.doctor.finding import Finding, fault, skip, warn, well
from gateway.errors import StorageUnavailable
from gateway.settings import Settings
from gateway.storage import Storage

TIMEOUT = aiohttp.ClientTimeout(total=15, connect=5)
# S3 refuses requests signed more than 15 minutes from its own time.
REFUSED_SKEW_S, DOUBTFUL_SKEW_S = 900, 60
_WRONG_REGION = (
    "AuthorizationHeaderMalformed",
    "AuthorizationQueryParametersError",
    "IllegalLocationConstraintException",
    "PermanentRedirect",
)
_CLOCK = "Set this machine's clock by NTP (timedatectl set-ntp true); signed requests and URLs are refused 15 minutes off."
_REMEDIES = {
    "SignatureDoesNotMatch": "AWS_SECRET_ACCESS_KEY is not the secret of AWS_ACCESS_KEY_ID; copy both anew.",
    "InvalidAccessKeyId": "S3 does not know AWS_ACCESS_KEY_ID; copy it anew, or check S3_ENDPOINT_URL.",
    "NoSuchBucket": "Make the bucket, or name another in S3_BUCKET; the gateway makes it at its start where its key may.",
    "RequestTimeTooSkewed": _CLOCK,
    "AccessDenied": "Allow the key s3:PutObject, s3:GetObject and s3:DeleteObject on the bucket, and s3:ListBucket.",
}


async def examine_s3(settings: Settings, session: aiohttp.ClientSession) -> list[Finding]:
    endpoint = settings.s3_endpoint_url or f"https://s3.{settings.s3_region}.amazonaws.com"
    try:
        async with session.get(endpoint, timeout=TIMEOUT, allow_redirects=False) as answer:
            date = answer.headers.get("Date")
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        remedy = "Start the S3 server, or set S3_ENDPOINT_URL to where it listens."
        return [fault("s3.reach", f"{endpoint} does not answer: {error or type(error).__name__}", remedy)]
    findings = [well("s3.reach", f"{endpoint} answers"), _judge_clock(date)]
    # With the session pictures are stored as jobs store them: boto3 would quietly go on with the right region.
    storage = Storage(settings, session)
    try:
        return findings + await _walk(settings, storage, session)
    finally:
        storage.close()


def _judge_clock(date: str | None) -> Finding:
    try:
        skew_s = abs((datetime.now(UTC) - parsedate_to_datetime(date or "")).total_seconds())
    except (ValueError, TypeError):
        return skip("s3.clock", "the endpoint does not say what time it has")
    said = f"its clock and ours are {skew_s:.0f} s apart"
    if skew_s > REFUSED_SKEW_S:
        return fault("s3.clock", said, _CLOCK)
    return warn("s3.clock", said, _CLOCK) if skew_s > DOUBTFUL_SKEW_S else well("s3.clock", said)


async def _walk(settings: Settings, storage: Storage, session: aiohttp.ClientSession) -> list[Finding]:
    """Put, read both ways, delete."""
    key, body = f"doctor/{secrets.token_hex(8)}", secrets.token_bytes(4096)
    try:
        await storage.put(key, body, "application/octet-stream")
    except StorageUnavailable as error:
        return [_explain("s3.write", error, settings)]
    findings = [well("s3.write", f"an object is stored in {settings.s3_bucket}"), well("s3.region", f"{settings.s3_region} is accepted")]
    try:
        same = hashlib.sha256(await storage.get(key)).digest() == hashlib.sha256(body).digest()
        findings.append(well("s3.checksum", "it comes back as it was") if same else _changed("s3.checksum"))
    except StorageUnavailable as error:
        findings.append(_explain("s3.checksum", error, settings))
    findings.append(await _judge_public(settings, storage.sign(key), body, session))
    try:
        await storage.delete([key])
        findings.append(well("s3.delete", "it can be deleted"))
    except StorageUnavailable as error:
        findings.append(_explain("s3.delete", error, settings))
    return findings


async def _judge_public(settings: Settings, url: str, body: bytes, session: aiohttp.ClientSession) -> Finding:
    """By the signed URL that callers get."""
    place = url.partition("?")[0].rpartition("/doctor/")[0]
    name = "S3_PUBLIC_ENDPOINT_URL" if settings.s3_public_endpoint_url else "S3_ENDPOINT_URL"
    remedy = f"Set {name} to an address by which callers reach S3; its host is part of the signature, so a proxy must keep the Host header."
    try:
        async with session.get(URL(url, encoded=True), timeout=TIMEOUT) as answer:
            status, said = answer.status, await answer.read()
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        return fault("s3.public", f"a signed URL at {place} does not answer: {error or type(error).__name__}", remedy)
    if status != 200:
        return fault("s3.public", f"a signed URL at {place} answers {status}", remedy)
    return well("s3.public", f"a signed URL at {place} is readable") if said == body else _changed("s3.public")


def _changed(check: str) -> Finding:
    return fault(check, "an object comes back with other bytes than were stored", "Take what rewrites or caches answers from before S3.")


def _explain(check: str, error: StorageUnavailable, settings: Settings) -> Finding:
    code, region = str(error.details.get("s3_code") or ""), error.details.get("s3_region")
    if code in _WRONG_REGION:
        told = f"S3_REGION={region}" if region else "S3_REGION to the bucket's region"
        return fault("s3.region", f"S3 does not take {settings.s3_region} for this bucket's region ({code})", f"Set {told}.")
    remedy = _REMEDIES.get(code) or "Check S3_BUCKET, S3_REGION, and what the key may do."
    return fault("s3.clock" if code == "RequestTimeTooSkewed" else check, error.message, remedy)
