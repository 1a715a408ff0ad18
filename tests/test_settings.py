"""The environment as the gateway reads it: what is taken, what is refused, and that a refusal names the variable."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from gateway.auth import UnsafeBinding, refuse_unsafe_binding
from gateway.settings import Settings


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)


def test_defaults_need_no_environment() -> None:
    settings = Settings()
    assert (settings.host, settings.port) == ("127.0.0.1", 8000)
    assert settings.is_loopback
    refuse_unsafe_binding(settings)


def test_a_file_is_a_secret_and_an_empty_one_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SECRETS_DIR", str(tmp_path))
    drawn = "a-key-that-was-drawn-at-the-first-start"
    # As Kubernetes mounts a secret: each name is a link to the newest version's file.
    (tmp_path / "..data").mkdir()
    (tmp_path / "..data" / "admin_key").write_text(drawn + "\n")
    (tmp_path / "admin_key").symlink_to("..data/admin_key")
    for name in ("hf_token", "webhook_secret", "redis_url"):
        (tmp_path / name).write_text("")
    (tmp_path / "log_level").write_text("DEBUG")
    monkeypatch.setenv("LOG_LEVEL", "ERROR")
    settings = Settings()
    assert settings.admin_key is not None
    assert settings.admin_key.get_secret_value() == drawn
    assert drawn not in repr(settings)
    assert (settings.hf_token, settings.webhook_secret, settings.redis_url) == (None, None, "redis://127.0.0.1:6379/0")
    # What the environment says counts for more.
    assert settings.log_level == "ERROR"
    monkeypatch.setenv("SECRETS_DIR", str(tmp_path / "absent"))
    assert Settings().admin_key is None


def test_names_are_those_of_the_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PORT", "9000")
    monkeypatch.setenv("COMFYUI_URLS", " http://one:8188/ ,https://two/comfy, ")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a-key-of-ours")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "very-secret")
    settings = Settings()
    assert settings.port == 9000
    assert settings.comfyui_urls == ("http://one:8188", "https://two/comfy")
    assert "very-secret" not in repr(settings)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("comfyui_urls", "127.0.0.1:8188"),
        ("comfyui_urls", "http://fine:8188,ftp://not-fine"),
        ("port", "70000"),
        ("port", "many"),
        ("slots_per_instance", "0"),
        ("lease_s", "0"),
        ("url_ttl_s", "1000000"),
        ("dispatcher", "maybe"),
        ("log_level", "LOUD"),
    ],
)
def test_what_cannot_work_is_refused_by_name(field: str, value: str) -> None:
    with pytest.raises(ValidationError) as refused:
        Settings.model_validate({field: value})
    assert refused.value.errors()[0]["loc"] == (field,)


def test_settings_do_not_change() -> None:
    with pytest.raises(ValidationError):
        setattr(Settings(), "port", 1)  # noqa: B010  a type checker refuses the plain assignment, which is the point


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_loopback_needs_no_keys(host: str) -> None:
    refuse_unsafe_binding(Settings(host=host))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org", "", "localhost.example.org"])
def test_any_other_address_is_refused_without_keys(host: str) -> None:
    with pytest.raises(UnsafeBinding) as refused:
        refuse_unsafe_binding(Settings(host=host))
    assert refused.value.code == "unsafe_binding"
    assert refused.value.details["value"] == host
    assert refused.value.hint


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({"PORT": "many"}, "PORT"),
        ({"HOST": "0.0.0.0"}, "HOST"),
        ({"COMFYUI_URLS": "here"}, "COMFYUI_URLS"),
        ({"SHARED_GPU_URLS": "http://a:1"}, "SHARED_GPU_URLS"),
    ],
)
def test_a_start_that_cannot_work_ends_with_one_line(environment: dict[str, Any], named: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "gateway"],
        env={"PATH": "/usr/bin:/bin", **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 2
    [line] = ended.stderr.strip().splitlines()
    assert line.startswith("fluxgate: ")
    assert named in line
