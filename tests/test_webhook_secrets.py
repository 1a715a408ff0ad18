"""What a secret of Standard Webhooks is, in a setting and in a request, and that neither is repeated."""

from __future__ import annotations

import pytest
from pydantic import SecretStr

from gateway.settings import Settings
from gateway.webhooks import WebhookWish
from tests.webhook_receiver import SECRET

OTHER_SECRET = "whsec_" + "A" * 40


@pytest.mark.parametrize("secret", ["", "short", "whsec_", "whsec_AAAA", "whsec_" + "*" * 40, "whsec_" + "A" * 200, "A" * 40])
def test_a_secret_that_is_none_is_refused_at_start(secret: str) -> None:
    if secret:
        with pytest.raises(ValueError, match="24 to 64 bytes"):
            Settings.model_validate({"webhook_secret": secret})
    else:
        assert Settings.model_validate({"webhook_secret": secret}).webhook_secret is None
    with pytest.raises(ValueError, match="24 to 64 bytes"):
        WebhookWish.model_validate({"url": "https://a.example", "secret": secret})


@pytest.mark.parametrize("secret", [SECRET, "whsec_" + "A" * 34, "whsec_" + "A" * 34 + "==", "whsec_" + "A" * 86])
def test_a_secret_needs_no_padding(secret: str) -> None:
    assert Settings.model_validate({"webhook_secret": secret}).webhook_secret == SecretStr(secret)


def test_requests_differ_by_their_secrets_and_do_not_show_them() -> None:
    one, two = (WebhookWish(url="https://a.example", secret=SecretStr(secret)).model_dump_json() for secret in (SECRET, OTHER_SECRET))
    assert one != two
    assert SECRET not in one
