"""Zips from strangers: what is taken out of honest ones, and how dishonest ones are refused."""

from __future__ import annotations

import io
import stat
import zipfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.datasets.archives import MAX_ENTRIES, Archive, check_path, is_junk
from gateway.datasets.arrivals import MAX_NAME_LENGTH, Source, clean_name, sort_arrivals, split_path
from gateway.errors import Unprocessable
from tests.dataset_files import lie_about_size, picture, set_flag, zip_of, zip_with_mode

PIECES = ["a", "B", "é", "/", "\\", ".", "..", " ", ":", "\x00", "\n", "C:", "~", "\u202e", "\U0001f534", ".png"]
NAMES = st.lists(st.sampled_from(PIECES), max_size=40).map("".join)


def read_all(body: bytes) -> dict[str, bytes]:
    archive = Archive(io.BytesIO(body))
    return {entry.path: archive.read(entry) for entry in archive.entries}


def refusal(body: bytes) -> Unprocessable:
    with pytest.raises(Unprocessable) as caught:
        read_all(body)
    assert caught.value.hint
    return caught.value


def test_an_honest_zip_is_read_whole() -> None:
    files = {"a.png": picture(1), "sub/b.txt": b"a cup", "sub/deeper/c.jpg": picture(2, kind="JPEG"), "été 日本.png": picture(3)}
    junk = {"__MACOSX/._a.png": b"x", "sub/.DS_Store": b"x", "Thumbs.db": b"x", "sub/": b""}
    assert read_all(zip_of({**files, **junk})) == files


@pytest.mark.parametrize(
    "name",
    [
        "../a.png",
        "a/../../b.png",
        "/etc/passwd",
        "//server/a.png",
        "..\\a.png",
        "a\\b.png",
        "C:\\a.png",
        "C:/a.png",
        "a.png:stream",
        "a/./b.png",
        "a//b.png",
        "a.png\x00.txt",
        "a\nb.png",
        "\x1b[31m.png",
        "..",
        ".",
        " a.png",
        "a.png ",
        "sub/ /a.png",
        "x" * 2000,
    ],
)
def test_a_name_that_leads_elsewhere_is_refused(name: str) -> None:
    error = refusal(zip_of({"good.png": b"x", name: b"x"}))
    assert (error.code, error.status) == ("archive_path", 422)
    assert error.details["parameter"] == "files"


@pytest.mark.parametrize(
    ("body", "code"),
    [
        pytest.param(zip_with_mode("link.png", b"/etc/passwd", stat.S_IFLNK | 0o777), "archive_link", id="symlink"),
        pytest.param(zip_with_mode("pipe.png", b"", stat.S_IFIFO | 0o666), "archive_link", id="pipe"),
        pytest.param(set_flag(zip_of({"a.png": b"secret"}), 0x1), "archive_encrypted", id="encrypted"),
        pytest.param(zip_of({"a.png": bytes(20 << 20)}), "archive_bomb", id="ratio"),
        pytest.param(zip_of({f"{n}": b"" for n in range(MAX_ENTRIES + 1)}), "archive_too_many", id="entries"),
        pytest.param(zip_of({"a" * 1000 + f"/{n}": b"" for n in range(2200)}), "archive_too_many", id="long directory"),
        pytest.param(lie_about_size(zip_of({"a.png": b"x" * 5000}), 4000), "archive_broken", id="says less"),
        pytest.param(lie_about_size(zip_of({"a.png": b"x" * 5000}), 6000), "archive_broken", id="says more"),
        pytest.param(zip_of({"a.png": picture(1)})[:-40], "archive_broken", id="cut off"),
        pytest.param(zip_of({"a.png": picture(1)})[40:], "archive_broken", id="begins late"),
        pytest.param(b"PK\x03\x04" + bytes(100), "archive_broken", id="no directory"),
        pytest.param(b"", "archive_broken", id="empty"),
    ],
)
def test_a_zip_that_cheats_is_refused_whole(body: bytes, code: str) -> None:
    assert refusal(body).code == code


def test_a_name_may_not_be_there_twice() -> None:
    twice = zip_of({"a.png": b"1", "b.png": b"2"}).replace(b"b.png", b"a.png")
    assert refusal(twice).code == "archive_ambiguous"


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_rare_methods_are_refused(method: int) -> None:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", method) as archive:
        archive.writestr("a.png", b"1" * 100)
    assert refusal(target.getvalue()).code == "archive_method"


def test_many_large_entries_are_refused_by_what_they_say() -> None:
    many = zip_of({f"{n}.png": bytes(900 << 10) for n in range(1300)})
    assert refusal(many).code == "archive_too_large"


def test_entries_that_share_their_bytes_are_refused() -> None:
    """A bomb of overlapping entries: the second's header points into the first."""
    body = bytearray(zip_of({"a.png": b"x" * 3000, "b.png": b"x" * 3000}))
    second = body.index(b"PK\x01\x02", body.index(b"PK\x01\x02") + 1)
    body[second + 42 : second + 46] = bytes(4)
    assert refusal(bytes(body)).code == "archive_broken"


@given(NAMES)
def test_a_name_is_taken_only_if_it_stays_inside(name: str) -> None:
    try:
        path = check_path(name)
    except Unprocessable:
        return
    parts = path.removesuffix("/").split("/")
    assert not {"", ".", ".."} & set(parts)
    assert not set(path) & set("\\:\x00\n")
    is_junk(path)


@given(NAMES)
def test_every_name_becomes_one_that_can_be_said_and_kept(name: str) -> None:
    cleaned = clean_name(name)
    assert 1 <= len(cleaned) <= MAX_NAME_LENGTH
    assert cleaned.isprintable()
    assert "/" not in cleaned
    assert "\\" not in cleaned
    assert cleaned not in (".", "..")
    assert clean_name(cleaned) == cleaned
    assert ".." not in split_path(name).split("/")


@given(st.lists(NAMES, max_size=8))
def test_no_file_is_lost_by_its_name(names: list[str]) -> None:
    sources = [Source(f"{name}.png", 1, bytes) for name in names]
    sorted_out = sort_arrivals(sources, {}, [])
    assert len(sorted_out.media) == len(names)
    assert {id(source) for source in sorted_out.media.values()} == {id(source) for source in sources}


# -- which caption is whose ----------------------------------------------------------------------------------------


def sort_names(
    *names: str, given: dict[str, str] | None = None, present: tuple[str, ...] = ()
) -> tuple[dict[str, str], list[str], list[str]]:
    """(captions by picture, names of the pictures, codes of the notices); each caption file holds its own path."""
    sources = [Source(name, len(name), name.encode) for name in names]
    result = sort_arrivals(sources, given or {}, present)
    captions = {name: caption.text for name, caption in result.captions.items()}
    return captions, list(result.media), [notice.code for notice in result.notices]


def test_a_caption_belongs_to_the_picture_beside_it() -> None:
    captions, names, notices = sort_names("x/1.png", "x/1.txt", "y/1.png", "y/1.txt")
    assert captions == {"1.png": "x/1.txt", "1 (2).png": "y/1.txt"}
    assert names == ["1.png", "1 (2).png"]
    assert notices == ["name_clash"]


def test_captions_may_stand_in_a_folder_of_their_own() -> None:
    assert sort_names("images/1.png", "captions/1.txt") == ({"1.png": "captions/1.txt"}, ["1.png"], [])


def test_a_caption_may_come_after_its_picture() -> None:
    assert sort_names("1.txt", "2.txt", present=("1.png",)) == ({"1.png": "1.txt"}, [], ["caption_without_picture"])


@pytest.mark.parametrize("key", ["1.png", "1", "1.txt", "./1.png"])
def test_the_map_goes_before_the_file(key: str) -> None:
    assert sort_names("1.png", "1.txt", given={key: "from the map"}) == ({"1.png": "from the map"}, ["1.png"], [])


def test_the_map_tells_two_pictures_of_one_stem_apart() -> None:
    captions, *_ = sort_names("1.png", "1.jpg", given={"1.jpg": "the second"})
    assert captions == {"1.jpg": "the second"}


def test_a_caption_of_no_picture_is_said() -> None:
    assert sort_names("1.png", given={"7.png": "lost"}) == ({}, ["1.png"], ["caption_without_picture"])
