"""Our signatures are botocore's, to the letter."""

from __future__ import annotations

import hashlib
from urllib.parse import parse_qs, quote, urlsplit

import pytest
from botocore.auth import S3SigV4Auth, S3SigV4QueryAuth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials as BotoCredentials

from gateway.sigv4 import Credentials, presign_get, sign_put

PLAIN = Credentials("AKIDEXAMPLE", "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY")
TEMPORARY = Credentials("ASIA/+=", "secret", "token/with+signs==")
HOMES = [
    "http://127.0.0.1:9000/bucket/",
    "https://bucket.s3.eu-central-1.amazonaws.com/",
    "https://s3.example.com:443/b/",
    "http://h:80/b/",
]
KEYS = ["plain.png", "generations/gen_1/0.png", "naïve/日本 語.png", "a+b&c=d?e#f%20g~.png", "'quoted' \"twice\"//x.png"]


@pytest.mark.parametrize("credentials", [PLAIN, TEMPORARY], ids=["plain", "temporary"])
@pytest.mark.parametrize("home", HOMES)
@pytest.mark.parametrize("key", KEYS)
def test_a_signed_url_is_that_of_botocore(credentials: Credentials, home: str, key: str) -> None:
    request = AWSRequest("GET", home + quote(key))
    S3SigV4QueryAuth(BotoCredentials(*credentials), "s3", "eu-central-1", expires=3600).add_auth(request)
    (date,) = parse_qs(urlsplit(str(request.url)).query)["X-Amz-Date"]
    assert presign_get(credentials, "eu-central-1", home + quote(key), 3600, date) == request.url


@pytest.mark.parametrize("credentials", [PLAIN, TEMPORARY], ids=["plain", "temporary"])
@pytest.mark.parametrize("home", HOMES)
@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("body", [b"", bytes(range(256)) * 10], ids=["empty", "bytes"])
def test_the_headers_of_a_put_are_those_of_botocore(credentials: Credentials, home: str, key: str, body: bytes) -> None:
    request = AWSRequest("PUT", home + quote(key), data=body, headers={"Content-Type": "image/png"})
    S3SigV4Auth(BotoCredentials(*credentials), "s3", "us-east-1").add_auth(request)
    date = request.headers["X-Amz-Date"]
    digest = hashlib.sha256(body).hexdigest()
    assert sign_put(credentials, "us-east-1", home + quote(key), digest, "image/png", date) == dict(request.headers)
