"""What a training would make of a dataset: buckets and steps by hand-worked numbers, and every rule met and kept."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.datasets import preflight_rules
from gateway.datasets.buckets import Shape, choose_shape, count_steps, form_buckets
from gateway.datasets.likeness import fingerprint
from gateway.datasets.preflight import Report, inspect
from gateway.datasets.preflight_rules import holds_word
from gateway.datasets.records import Dataset, DatasetFile, Problem, error
from tests.dataset_files import draw


def make(name: str, width: int = 1024, height: int = 1024, caption: str | None = "a cup", **fields: Any) -> DatasetFile:
    """A stored picture; each name looks different."""
    known = {"key": f"k/{name}", "sha256": name, "size_bytes": 100, "phash": fingerprint(draw(crc32(name.encode())))}
    return DatasetFile(name=name, width=width, height=height, caption=caption, **{**known, **fields})


def make_many(count: int, width: int = 1024, height: int = 1024, prefix: str = "p") -> list[DatasetFile]:
    return [make(f"{prefix}{number:02}.png", width, height) for number in range(count)]


def found(report: Report) -> dict[str, Problem]:
    problems = [*report.errors, *report.warnings]
    assert len({problem.code for problem in problems}) == len(problems)
    return {problem.code: problem for problem in problems}


# -- SimpleTuner's arithmetic --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "resolution", "shape"),
    [
        ((1024, 1024), 1024, (1.0, 1024, 1024)),
        ((300, 300), 1024, (1.0, 1024, 1024)),
        # sqrt(1.5) * 1024 = 1254 -> 20 * 64, 1024 / sqrt(1.5) = 836 -> 13 * 64.
        ((3000, 2000), 1024, (1.54, 1280, 832)),
        ((2000, 3000), 1024, (0.65, 832, 1280)),
        ((1920, 1080), 1024, (1.75, 1344, 768)),
        # Nearly square: the bucket is the square's.
        ((1030, 1000), 1024, (1.0, 1024, 1024)),
        ((3000, 2000), 512, (1.43, 640, 448)),
        # 700 is 0.49 megapixels, which is taken for 768 squared; other shapes go by 704.
        ((700, 700), 700, (1.0, 768, 768)),
        ((1400, 700), 700, (2.0, 1024, 512)),
        # Below 512, squares of just this side, cut from the middle.
        ((3000, 2000), 256, (1.0, 256, 256)),
        ((64, 64), 64, (1.0, 64, 64)),
        # 1024 * sqrt(0.01) = 102 -> 128.
        ((64, 10_000), 1024, (0.01, 128, 10240)),
    ],
)
def test_a_picture_falls_into_its_bucket(size: tuple[int, int], resolution: int, shape: tuple[float, int, int]) -> None:
    assert choose_shape(*size, resolution) == Shape(*shape)


@given(st.integers(64, 8000), st.integers(64, 8000), st.integers(512, 2048))
def test_buckets_are_aligned_and_turn_with_the_picture(width: int, height: int, resolution: int) -> None:
    shape = choose_shape(width, height, resolution)
    assert shape is not None
    assert shape.width % 64 == shape.height % 64 == 0
    assert min(shape.width, shape.height) >= 64
    assert (shape.width >= shape.height) == (width >= height) or shape.aspect == 1.0


def test_one_too_narrow_has_no_bucket() -> None:
    assert choose_shape(64, 64 * 210, 1024) is None


def test_pictures_of_one_aspect_share_a_bucket() -> None:
    files = [*make_many(3), *make_many(2, 3000, 2000, "wide"), make("wide-too.png", 1500, 1000)]
    assert {shape: len(held) for shape, held in form_buckets(files, 1024).items()} == {Shape(1.0, 1024, 1024): 3, Shape(1.54, 1280, 832): 3}


@pytest.mark.parametrize(
    ("sizes", "batch", "repeats", "steps"),
    [([8], 1, 10, 88), ([8], 1, 0, 8), ([5, 3], 2, 0, 5), ([5, 3], 4, 0, 2), ([5, 3], 4, 1, 5), ([1], 2, 0, 0), ([], 1, 0, 0)],
)
def test_steps_of_an_epoch(sizes: list[int], batch: int, repeats: int, steps: int) -> None:
    assert count_steps(sizes, batch, repeats) == steps


# -- the report ----------------------------------------------------------------------------------------------------


def test_a_good_dataset_has_nothing_to_report() -> None:
    files = [*make_many(12), *make_many(3, 1920, 1080, "w")]
    report = inspect(files, steps=300)
    assert report.ok
    assert found(report) == {}
    assert (report.steps_per_epoch, report.epochs) == (15, 20.0)
    assert [bucket.model_dump() for bucket in report.buckets] == [
        {"aspect": 1.0, "width": 1024, "height": 1024, "count": 12},
        {"aspect": 1.75, "width": 1344, "height": 768, "count": 3},
    ]
    assert report.counts.model_dump() == {
        "files": 15,
        "usable": 15,
        "refused": 0,
        "captions_own": 15,
        "captions_from_template": 0,
        "captions_missing": 0,
    }
    assert report.sizes.model_dump() == {"total_bytes": 1500, "smallest": (1024, 1024), "largest": (1920, 1080)}
    assert report.trigger_coverage is None


def with_one(**fields: Any) -> list[DatasetFile]:
    """Nine good pictures and an odd one."""
    return [*make_many(9), make("odd.png", **fields)]


REFUSED = DatasetFile(name="odd.png", problems=(error("picture_broken", ("odd.png",), "odd.png is broken.", "Send it again."),))

# (name of the rule's code, files, settings, severity, files that are named, words of the remedy)
CASES: list[tuple[str, list[DatasetFile], dict[str, Any], str, tuple[str, ...], str]] = [
    ("no_files", [], {}, "error", (), "Add pictures"),
    ("few_files", make_many(4), {}, "warning", (), "10 to 30"),
    ("picture_broken", [*make_many(9), REFUSED], {}, "error", ("odd.png",), "again"),
    ("caption_missing", with_one(caption=None), {}, "error", ("odd.png",), "trigger_word"),
    ("caption_empty", with_one(caption=""), {"trigger_word": "cup"}, "warning", ("odd.png",), "remove the .txt"),
    ("trigger_missing", with_one(caption="a cupboard"), {"trigger_word": "cup"}, "warning", ("odd.png",), "'cup'"),
    (
        "zero_usable_batches",
        make_many(5),
        {"batch_size": 8},
        "error",
        tuple(f"p0{n}.png" for n in range(5)),
        "repeats to at least 1 or batch_size",
    ),
    ("bucket_smaller_than_batch", with_one(width=1920, height=1080), {"batch_size": 4}, "error", ("odd.png",), "repeats to at least 3"),
    ("aspect_zero", with_one(width=64, height=64 * 210), {}, "error", ("odd.png",), "Crop"),
    ("aspect_extreme", with_one(width=4096, height=1024), {}, "warning", ("odd.png",), "Crop"),
    ("picture_enlarged", with_one(width=900, height=900), {}, "warning", ("odd.png",), "lower resolution"),
    ("resolution_unaligned", make_many(9), {"resolution": 1000}, "warning", (), "Say 1024"),
    ("resolution_unaligned", make_many(9), {"resolution": 100}, "error", (), "Say 128"),
    ("duplicate_content", with_one(sha256="p03.png"), {}, "warning", ("odd.png", "p03.png"), "Remove"),
    (
        "near_duplicates",
        with_one(phash=fingerprint(draw(crc32(b"p03.png")).point(lambda v: v // 2 * 2))),
        {},
        "warning",
        ("odd.png", "p03.png"),
        "best",
    ),
    ("epoch_unfinished", make_many(9), {"steps": 5}, "warning", (), "at least 9"),
    ("many_epochs", make_many(9), {"steps": 9 * 401}, "warning", (), "3600"),
    ("clip_length_unknown", make_many(9), {"asset": "video"}, "warning", tuple(f"p0{n}.png" for n in range(9)), "49 frames"),
    (
        "clip_too_short",
        [file.model_copy(update={"frames": 48 + n}) for n, file in enumerate(make_many(5))],
        {"asset": "video"},
        "error",
        ("p00.png",),
        "at most 48",
    ),
]


@pytest.mark.parametrize(
    ("code", "files", "settings", "severity", "named", "remedy"), CASES, ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_problem_names_its_files_and_its_remedy(
    code: str, files: list[DatasetFile], settings: dict[str, Any], severity: str, named: tuple[str, ...], remedy: str
) -> None:
    report = inspect(files, **settings)
    problem = found(report)[code]
    assert problem.severity == severity
    assert sorted(problem.files) == sorted(named)
    assert remedy in problem.remedy
    assert set(found(report)) == {code}, "nothing else is wrong with it"
    assert report.ok == (severity == "warning")


def test_every_rule_has_its_case() -> None:
    source = Path(preflight_rules.__file__).read_text()
    codes = set(re.findall(r'(?:error|warning)\(\s*"(\w+)"|whole = "(\w+)" if .* else "(\w+)"', source))
    written = {code for match in codes for code in match if code}
    assert len(written) > 12
    assert written <= {code for code, *_ in CASES}


def test_clips_that_cannot_fill_a_batch() -> None:
    assert not inspect(make_many(6), asset="video", batch_size=7).ok
    assert inspect(make_many(6), asset="video", batch_size=7, repeats=1).steps_per_epoch == 2


def test_a_remedy_works() -> None:
    files = [*make_many(9), *make_many(2, 1920, 1080, "wide")]
    assert not inspect(files, batch_size=8).ok
    assert "repeats to at least 3 or batch_size to at most 2" in found(inspect(files, batch_size=8))["bucket_smaller_than_batch"].remedy
    assert inspect(files, batch_size=8, repeats=3).ok
    assert inspect(files, batch_size=2).ok
    assert not inspect(files, batch_size=8, repeats=2).ok


@pytest.mark.parametrize(
    ("caption", "holds"),
    [("a photo of TOK", True), ("TOK, outside", True), ("a tok", False), ("TOKEN", False), ("xTOK", False), ("(TOK)", True), ("", False)],
)
def test_a_trigger_word_stands_by_itself(caption: str, holds: bool) -> None:
    assert holds_word(caption, "TOK") == holds


def test_coverage_counts_captions_made_from_the_template() -> None:
    files = [
        make("a.png", caption=None),
        make("b.png", caption="TOK on a table"),
        make("c.png", caption="a table"),
        make("d.png", caption=None),
    ]
    report = inspect(files, trigger_word="TOK", caption_template="a photo of {trigger}")
    assert report.trigger_coverage == 0.75
    assert (report.counts.captions_own, report.counts.captions_from_template, report.counts.captions_missing) == (2, 2, 0)
    dataset = Dataset(
        id="ds_1", caller="me", name="x", trigger_word="TOK", caption_template="a photo of {trigger}", created_ms=0, updated_ms=0
    )
    assert [dataset.caption_of(file) for file in files] == ["a photo of TOK", "TOK on a table", "a table", "a photo of TOK"]


def test_likenesses_join_into_groups() -> None:
    base = draw(5)
    steps = [base.point(lambda value, by=by: min(255, value + by)) for by in (0, 6, 12)]
    files = [make(f"{index}.png", phash=fingerprint(image)) for index, image in enumerate(steps)]
    assert inspect([*files, make("other.png")]).near_duplicates == [["0.png", "1.png", "2.png"]]
