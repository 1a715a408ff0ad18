"""Caption providers: the describer of colours on pictures drawn here, and the program that runs providers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw

from gateway.datasets.records import Dataset, DatasetFile
from trainer_worker.captioners.colours import describe
from trainer_worker.captioning import LAUNCHER, PROJECT_DIR, call_by_trigger, choose_files
from trainer_worker.failures import classify
from trainer_worker.sink import WebhookSink


def draw(folder: Path, name: str, ground: str, *things: str) -> Path:
    picture = Image.new("RGB", (200, 120), ground)
    pen = ImageDraw.Draw(picture)
    for number, colour in enumerate(things):
        pen.ellipse((40 + 60 * number, 30, 90 + 60 * number, 90 - 15 * number), fill=colour)
    picture.save(folder / name)
    return folder / name


@pytest.mark.parametrize(
    ("ground", "things", "caption"),
    [
        ("white", ("red",), "a red thing on a white background"),
        ("#2da046", ("#fadc28", "#873cb4"), "a yellow and purple thing on a green background"),
        ("black", (), "something on a black background"),
    ],
)
def test_colours_are_named(tmp_path: Path, ground: str, things: tuple[str, ...], caption: str) -> None:
    assert list(describe([draw(tmp_path, "a.png", ground, *things)], {})) == [caption]


def run(folder: Path, entry_point: str) -> tuple[list[dict[str, Any]], int, str]:
    """What came to the webhook, the exit code, the log."""
    pictures = [draw(folder, f"{number}.png", "white", "red") for number in range(2)]
    with WebhookSink() as sink:
        config = {"entry_point": entry_point, "pictures": [str(path) for path in pictures], "options": {}, "webhook_url": sink.url}
        (folder / "config.json").write_text(json.dumps(config))
        command = [sys.executable, str(LAUNCHER), str(folder / "config.json")]
        env = {"PYTHONPATH": f"{PROJECT_DIR}:{folder}", "PATH": "/usr/bin:/bin"}
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=60)
        return sink.drain(), done.returncode, done.stderr


def test_a_provider_is_named_by_its_entry_point(tmp_path: Path) -> None:
    captions, status, log = run(tmp_path, "trainer_worker.captioners.colours:describe")
    assert status == 0, log
    assert [(said["type"], said["picture"], said["caption"]) for said in captions] == [
        ("caption", "0.png", "a red thing on a white background"),
        ("caption", "1.png", "a red thing on a white background"),
    ]


PROVIDERS = {
    "absent:describe": ("caption_provider", 0),
    "provider:absent": ("caption_provider", 0),
    "provider:one_too_few": ("caption_provider", 1),
    "provider:out_of_memory": ("out_of_memory", 0),
    "provider:gated": ("model_access_denied", 0),
}
PROVIDER = """
def one_too_few(pictures, options):
    yield "one"
def out_of_memory(pictures, options):
    raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
    yield
def gated(pictures, options):
    raise OSError("You are trying to access a gated repo.")
    yield
"""


@pytest.mark.parametrize(("entry_point", "code", "captions"), [(name, *outcome) for name, outcome in PROVIDERS.items()], ids=PROVIDERS)
def test_a_provider_that_fails_is_classified(tmp_path: Path, entry_point: str, code: str, captions: int) -> None:
    (tmp_path / "provider.py").write_text(PROVIDER)
    said, status, log = run(tmp_path, entry_point)
    failure = classify(status, [], log)
    assert (status, failure.code, len(said)) == (1, code, captions), log
    assert failure.hint


def test_what_has_words_is_left_alone() -> None:
    files = [
        DatasetFile(name="none.png", key="k1"),
        DatasetFile(name="empty.png", key="k2", caption=""),
        DatasetFile(name="own.png", key="k3", caption="a cup"),
        DatasetFile(name="refused.png"),
    ]
    dataset = Dataset(id="ds_1", caller="me", name="d", created_ms=0, updated_ms=0, files=tuple(files))
    assert [file.name for file in choose_files(dataset, overwrite=False)] == ["none.png", "empty.png"]
    assert [file.name for file in choose_files(dataset, overwrite=True)] == ["none.png", "empty.png", "own.png"]


@pytest.mark.parametrize(
    ("text", "trigger", "caption"),
    [("a cup", "TOK", "TOK, a cup"), ("a TOK cup", "TOK", "a TOK cup"), ("TOKENS", "TOK", "TOK, TOKENS"), ("a cup", None, "a cup")],
)
def test_the_trigger_word_comes_into_each_caption(text: str, trigger: str | None, caption: str) -> None:
    assert call_by_trigger(text, trigger) == caption
