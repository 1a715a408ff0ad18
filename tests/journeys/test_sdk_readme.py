"""comfy-sdk's README, word for word: only the address is said, by COMFY_BASE_URL."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from tests.journeys.api import Api
from tests.journeys.sdk_readme import paint_again, run_readme


def test_the_readme_runs_as_it_stands(api: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMFY_BASE_URL", str(api.http.base_url))
    monkeypatch.delenv("COMFY_API_KEY", raising=False)
    monkeypatch.chdir(tmp_path)
    said: list[str] = []
    left = run_readme(tmp_path, paint_again(), said.append)
    saved = ["ComfyUI_00001_.png", "again_00001_.png", "partial/ComfyUI_00001_.png", "result.png", "out.png"]
    for name in saved:
        with Image.open(tmp_path / name) as picture:
            assert picture.size == (128, 128), name
    assert (tmp_path / "head.png").read_bytes() == (tmp_path / "result.png").read_bytes()[:1024]
    assert (tmp_path / "result.bin").read_bytes() == (tmp_path / "result.png").read_bytes() == left["data"]
    assert left["shown"], "previews"
    assert any(line.endswith("% KSampler 20/20") for line in said), said
    assert left["result"].status == "succeeded"
    assert (left["found"].format, left["found"].graph["3"]["inputs"]["seed"]) == ("api", 42)
    assert sum(line.endswith(" {'client': 'acme', 'batch': '2026-10-05'}") for line in said) == 1, said
    assert left["link"].url.startswith("http")
