"""That time tells nothing of a key: whatever is sent, hashes of one length are compared in constant time, and as often."""

from __future__ import annotations

import hmac
from typing import Any

import pytest

from gateway import auth
from gateway.auth import Doorkeeper, Rates
from gateway.callers.keys import CallerLimits, KeyStore, mint_key
from gateway.callers.usage import Usage
from gateway.errors import Unauthorized
from gateway.redis_client import connect_redis
from gateway.settings import Settings


async def test_every_wrong_key_is_compared_as_the_right_one_is(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    redis = connect_redis(redis_url)
    keys = KeyStore(redis)
    key, text = mint_key("key", ("generate",))
    await keys.add(key, CallerLimits())
    settings = Settings(admin_key="an-admin-key-that-is-long-enough-0123456789")
    doorkeeper = Doorkeeper(settings, keys, Rates(redis), Usage(redis))
    await doorkeeper.refresh()
    compared = list[tuple[int, int]]()

    def note(one: Any, other: Any) -> bool:
        compared.append((len(one), len(other)))
        return hmac.compare_digest(one, other)

    class Noting:
        compare_digest = staticmethod(note)

    monkeypatch.setattr(auth, "hmac", Noting)
    await doorkeeper.identify(f"Bearer {text}")
    # The operator's key, then the one that the prefix names.
    once = [(64, 64), (64, 64)]
    assert compared == once
    prefix = text.rpartition("_")[0]
    for wrong in (text[:-1] + "~", text[:-1] + ("a" if text[-1] != "a" else "b"), f"fg_{'0' * 12}_{text[-43:]}", prefix, "x", "x" * 10_000):
        compared.clear()
        with pytest.raises(Unauthorized) as refused:
            await doorkeeper.identify(f"Bearer {wrong}")
        # The keys are read again before a no, as one may have been made a moment ago; then the same once more.
        assert compared == [*once, once[1]], wrong[:80]
        assert refused.value.message == "That is no API key of this deployment, or one that was revoked or has expired."
    await redis.aclose(close_connection_pool=True)
