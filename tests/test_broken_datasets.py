"""Datasets that would fail late: each is told at once what is wrong, with which file, and what to do. And requests that are none."""

from __future__ import annotations

from typing import Any

import pytest

from tests.dataset_api import DATASETS, Datasets, Files, read_error
from tests.dataset_files import animation, draw, encode, lie_about_size, picture, png_of_size, png_with_text_bomb, set_flag, zip_of

pytest_plugins = ["tests.dataset_fixtures"]

GOOD: Files = [(f"good{number}.png", picture(number)) for number in range(6)]
TRIGGER = {"trigger_word": "TOK"}
NO_TRIGGER: dict[str, str] = {}
PLAIN = {"resolution": 256}

# (files beside six good ones, fields, settings of the question, code, severity, the file that is named, words of the remedy)
BROKEN: dict[str, tuple[Files, dict[str, str], dict[str, Any], str, str, str, str]] = {
    "cut off": ([("bad.jpg", picture(9, kind="JPEG")[:3000])], TRIGGER, PLAIN, "picture_broken", "error", "bad.jpg", "again"),
    "pixels missing": ([("bad.png", png_of_size(800, 800))], TRIGGER, PLAIN, "picture_broken", "error", "bad.png", "again"),
    "a page for a picture": ([("bad.png", b"<html>404</html>")], TRIGGER, PLAIN, "not_a_picture", "error", "bad.png", "leave it out"),
    "another format": ([("bad.png", encode(draw(9), "GIF"))], TRIGGER, PLAIN, "not_a_picture", "error", "bad.png", "Convert"),
    "an animation": ([("bad.webp", animation("WEBP"))], TRIGGER, PLAIN, "picture_animated", "error", "bad.webp", "still"),
    "a thumbnail": ([("bad.png", picture(9, 48, 48))], TRIGGER, PLAIN, "picture_too_small", "error", "bad.png", "64"),
    "too many pixels": ([("bad.png", png_of_size(60_000, 60_000))], TRIGGER, PLAIN, "picture_too_large", "error", "bad.png", "Scale"),
    "a comment bomb": ([("bad.png", png_with_text_bomb())], TRIGGER, PLAIN, "picture_broken", "error", "bad.png", "again"),
    "an empty file": ([("bad.png", b"")], TRIGGER, PLAIN, "file_empty", "error", "bad.png", "again"),
    "no caption": ([("bad.png", picture(9))], NO_TRIGGER, PLAIN, "caption_missing", "error", "bad.png", ".txt"),
    "an empty caption": ([("bad.png", picture(9)), ("bad.txt", b" \n")], TRIGGER, PLAIN, "caption_empty", "warning", "bad.png", ".txt"),
    "no text": ([("bad.png", picture(9)), ("bad.txt", b"\xff\xfea")], TRIGGER, PLAIN, "caption_not_text", "error", "bad.txt", "UTF-8"),
    "a novel": ([("bad.png", picture(9)), ("bad.txt", b"a " * 9000)], TRIGGER, PLAIN, "caption_too_long", "error", "bad.txt", "Shorten"),
    "two lines": (
        [("bad.png", picture(9)), ("bad.txt", b"TOK\non a hill")],
        TRIGGER,
        PLAIN,
        "caption_lines_joined",
        "warning",
        "bad.txt",
        "line",
    ),
    "no trigger": ([("bad.png", picture(9)), ("bad.txt", b"a hill")], TRIGGER, PLAIN, "trigger_missing", "warning", "bad.png", "'TOK'"),
    "too small": ([("bad.png", picture(9, 500, 500))], TRIGGER, {"resolution": 512}, "picture_enlarged", "warning", "bad.png", "larger"),
    "the same twice": ([("bad.png", picture(3))], TRIGGER, PLAIN, "duplicate_content", "warning", "bad.png", "Remove"),
    "nearly the same": ([("bad.jpg", picture(3, kind="JPEG"))], TRIGGER, PLAIN, "near_duplicates", "warning", "bad.jpg", "best"),
    "alone in its shape": (
        [("bad.png", picture(9, 1000, 500))],
        TRIGGER,
        {"resolution": 512, "batch_size": 2},
        "bucket_smaller_than_batch",
        "error",
        "bad.png",
        "repeats to at least 1",
    ),
    "a tower": ([("bad.png", picture(9, 64, 14_000))], TRIGGER, {"resolution": 512}, "aspect_zero", "error", "bad.png", "Crop"),
    "a batch too large": ([], TRIGGER, {**PLAIN, "batch_size": 16}, "zero_usable_batches", "error", "good0.png", "repeats to at least 2"),
    "a zip in a zip": ([("bad.zip", zip_of({"a.png": picture(9)}))], TRIGGER, PLAIN, "archive_nested", "error", "bad.zip", "Unpack"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_dataset_is_told_what_is_wrong_and_what_to_do(datasets: Datasets, case: str) -> None:
    files, fields, settings, code, severity, name, remedy = BROKEN[case]
    good = GOOD if fields else [*GOOD, *((f"good{number}.txt", b"a picture") for number in range(6))]
    made = datasets.create([("all.zip", zip_of(dict([*good, *files])))], **fields)
    report = datasets.get(made["id"], **settings)["preflight"]
    (problem,) = [problem for problem in [*report["errors"], *report["warnings"]] if problem["code"] == code]
    assert problem["severity"] == severity
    assert name in problem["files"]
    assert remedy in problem["remedy"]
    assert report["ok"] == (severity == "warning")


@pytest.mark.parametrize("case", [case for case, row in BROKEN.items() if row[3].startswith(("picture_broken", "file_", "not_a"))])
def test_a_refused_file_blocks_until_it_is_removed(datasets: Datasets, case: str) -> None:
    made = datasets.create([*GOOD, *BROKEN[case][0]], **TRIGGER)
    (name,) = made["upload"]["refused"]
    assert not made["preflight"]["ok"]
    left = datasets.http.delete(f"{DATASETS}/{made['id']}/files/{name}").json()
    assert left["preflight"]["errors"] == []
    assert left["file_count"] == len(GOOD)


def test_what_lies_beside_the_pictures_is_left_out_and_said(datasets: Datasets) -> None:
    made = datasets.create([*GOOD, ("notes.md", b"# notes"), ("metadata.jsonl", b"{}"), ("lost.txt", b"a cup")], **TRIGGER)
    assert made["preflight"]["ok"]
    assert made["file_count"] == len(GOOD)
    said = {(notice["code"], *notice["files"]) for notice in made["upload"]["notices"]}
    assert said == {("file_skipped", "notes.md"), ("file_skipped", "metadata.jsonl"), ("caption_without_picture", "lost.txt")}


# -- refused whole: nothing of it is left --------------------------------------------------------------------------

HONEST = {"a.png": picture(1), "b.png": picture(2)}


@pytest.mark.parametrize(
    ("files", "code"),
    [
        pytest.param([("x.zip", zip_of({**HONEST, "../c.png": picture(3)}))], "archive_path", id="path"),
        pytest.param([("x.zip", zip_of({**HONEST, "bomb.png": bytes(30 << 20)}))], "archive_bomb", id="bomb"),
        pytest.param([("x.zip", set_flag(zip_of(HONEST), 1))], "archive_encrypted", id="encrypted"),
        pytest.param([("x.zip", lie_about_size(zip_of(HONEST), 70))], "archive_broken", id="found only while it is read"),
        pytest.param([("x.zip", zip_of(HONEST)[:-30])], "archive_broken", id="cut off"),
        pytest.param([("x.zip", b"no zip")], "archive_broken", id="by name alone"),
        pytest.param([("x.zip", zip_of(HONEST)), ("c.png", picture(3))], "archive_not_alone", id="not alone"),
    ],
)
def test_an_archive_that_cheats_leaves_nothing(datasets: Datasets, files: Files, code: str) -> None:
    before, known = datasets.all_keys(), datasets.http.get(DATASETS, params={"limit": 100}).json()["data"]
    error = read_error(datasets.post(files), 422, code)
    assert error["hint"]
    assert datasets.all_keys() == before
    assert datasets.http.get(DATASETS, params={"limit": 100}).json()["data"] == known


def test_an_upload_that_cheats_changes_nothing(datasets: Datasets) -> None:
    made = datasets.create(GOOD[:1], **TRIGGER)
    parts = [("files", ("x.zip", lie_about_size(zip_of({"good0.png": picture(5), "z.png": picture(6)}), 70)))]
    read_error(datasets.http.put(f"{DATASETS}/{made['id']}/files", files=parts), 422, "archive_broken")
    assert datasets.get(made["id"]) == {key: value for key, value in datasets.strip(made).items() if key != "upload"}
    assert len(datasets.keys(made["id"])) == 1


# -- requests that are none ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("asset", "audio"),
        ("name", "x" * 201),
        ("name", "two\nlines"),
        ("trigger_word", ""),
        ("caption_template", "no slot"),
        ("captions", "[]"),
        ("captions", "{"),
        ("captions", '{"a.png": 7}'),
        ("captions", "[" * 100_000),
        ("colour", "red"),
    ],
)
def test_a_field_that_does_not_fit_is_named(datasets: Datasets, name: str, value: str) -> None:
    error = read_error(datasets.post(GOOD[:1], **{name: value}), 422, "invalid_parameter")
    assert error["details"]["parameter"].startswith(name)


MULTIPART = {"Content-Type": "multipart/form-data; boundary=x"}


@pytest.mark.parametrize(
    ("body", "headers", "status", "code"),
    [
        pytest.param(b"{}", {"Content-Type": "application/json"}, 422, "invalid_parameter", id="json of no uploads"),
        pytest.param(b"{}", {"Content-Type": "text/plain"}, 415, "unsupported_media_type", id="text"),
        pytest.param(b"", {}, 415, "unsupported_media_type", id="nothing"),
        pytest.param(b"--x--", {"Content-Type": "multipart/form-data"}, 415, "unsupported_media_type", id="no boundary"),
        pytest.param(b"nonsense", MULTIPART, 400, "invalid_multipart", id="no multipart"),
        pytest.param(b"", MULTIPART, 400, "invalid_multipart", id="empty"),
        pytest.param(
            b'--x\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\nabc', MULTIPART, 400, "invalid_multipart", id="cut"
        ),
        pytest.param(b"--x\r\nContent-Type: image/png\r\n\r\nabc\r\n--x--", MULTIPART, 400, "invalid_multipart", id="no name"),
        pytest.param(b"--x\r\nX: " + b"y" * 20_000 + b"\r\n\r\n\r\n--x--", MULTIPART, 400, "invalid_multipart", id="long header"),
        pytest.param(
            b'--x\r\nContent-Disposition: form-data; name="evil"; filename="a"\r\n\r\nabc\r\n--x--',
            MULTIPART,
            400,
            "invalid_multipart",
            id="field",
        ),
        pytest.param(
            2 * b'--x\r\nContent-Disposition: form-data; name="name"\r\n\r\na\r\n' + b"--x--",
            MULTIPART,
            400,
            "invalid_multipart",
            id="twice",
        ),
        pytest.param(
            2001 * b'--x\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\na\r\n' + b"--x--",
            MULTIPART,
            413,
            "payload_too_large",
            id="too many files",
        ),
    ],
)
def test_a_body_that_is_no_upload_is_refused(datasets: Datasets, body: bytes, headers: dict[str, str], status: int, code: str) -> None:
    read_error(datasets.http.post(DATASETS, content=body, headers=headers), status, code)


@pytest.mark.parametrize("query", [{"resolution": 63}, {"batch_size": 0}, {"repeats": -1}, {"steps": 0}, {"trigger_word": ""}])
def test_settings_that_do_not_fit_are_named(datasets: Datasets, query: dict[str, Any]) -> None:
    made = datasets.create(GOOD[:1])
    error = read_error(datasets.http.get(f"{DATASETS}/{made['id']}", params=query), 400, "invalid_parameter")
    assert error["details"]["parameter"] == next(iter(query))


def test_a_dataset_has_an_end(datasets: Datasets) -> None:
    made = datasets.create(GOOD[:1], **TRIGGER)
    many = zip_of({f"{number}.png": b"" for number in range(1000)})
    error = read_error(datasets.http.put(f"{DATASETS}/{made['id']}/files", files=[("files", ("x.zip", many))]), 409, "dataset_full")
    assert error["details"]["allowed"] == 1000
    assert datasets.get(made["id"])["file_count"] == 1
