"""LoRA files of every naming and every fault: accepted, converted or refused, each for its reason."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
from torch import nn

from local.tinyflux.lora import read_lora
from local.tinyflux.weights import load_transformer
from tests.lora_files import (
    BFL,
    DIFFUSERS,
    GOOD,
    REFUSED,
    TO_Q,
    Entry,
    Good,
    make_pairs,
    pack,
    random_matrix,
    write_file,
    write_good,
)
from trainer_worker.lora import LoraLimits, LoraRefused, inspect_lora, open_lora
from trainer_worker.lora_file import open_tensor_file
from trainer_worker.lora_flux import FLUX1, TINYFLUX, map_bfl_layers, map_diffusers_layers
from trainer_worker.lora_publish import publish_lora, published_name, write_lora
from trainer_worker.lora_tensors import scan_tensors

ROOT = Path(__file__).parents[1]
TOK = ROOT / "local" / "tinyflux" / "loras" / "tok.safetensors"
TINY = 160
READ: Callable[[bytes], list[tuple[str, dict[str, Any]]]] = safetensors.deserialize


def read_tensors(path: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """By safetensors' own reader."""
    return {key: (view["dtype"], view["shape"], bytes(view["data"])) for key, view in READ(path.read_bytes())}


def read_metadata(path: Path) -> dict[str, str]:
    with safetensors.safe_open(path, "numpy") as file:
        return file.metadata() or {}


def write_tiny(folder: Path, prefix: str = "transformer.", name: str = "a.safetensors", **more: object) -> Path:
    return write_file(folder / name, make_pairs(DIFFUSERS, prefix, hidden=TINY, **more))  # type: ignore[arg-type]


# -- accepted and converted ------------------------------------------------------------------------------------


@pytest.mark.parametrize("good", GOOD, ids=lambda good: good.title)
def test_a_good_file_is_recognised_by_its_keys(good: Good, tmp_path: Path) -> None:
    path = good.write(tmp_path)
    report = inspect_lora(path, family="flux1")
    assert (report.naming, report.family, report.converts) == (good.naming, "flux1", good.converts)
    assert (report.coverage.patched, report.coverage.idle, report.alpha) == (good.layers, 0, good.alpha)
    assert report.rank == 4
    assert report.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert report.size_bytes == path.stat().st_size
    assert report.tensors == len(read_tensors(path))
    assert report.unknown_count + report.text_encoder_count == good.left_out


@pytest.mark.parametrize("good", GOOD, ids=lambda good: good.title)
def test_a_good_file_is_published_under_keys_that_comfyui_applies(good: Good, tmp_path: Path) -> None:
    source = good.write(tmp_path)
    made = publish_lora(source, tmp_path, "style", metadata={"trigger_word": "TOK", "base_model": "flux1-dev"})
    before, after = read_tensors(source), read_tensors(made.path)
    assert sorted(after.values()) == sorted(tensor for key, tensor in before.items() if key not in made.left_out)
    assert len(made.left_out) == good.left_out
    report = inspect_lora(made.path)
    assert (report.converts, report.coverage.share, report.coverage.patched) == (False, 1.0, good.layers)
    assert report.tensors_sha256 == made.report.tensors_sha256
    assert report.sha256 == made.sha256 == hashlib.sha256(made.path.read_bytes()).hexdigest()
    assert made.path.name == f"style-{made.sha256[:8]}.safetensors"
    assert read_metadata(made.path) == made.metadata
    assert {path.name for path in tmp_path.iterdir()} == {source.name, made.path.name}


def test_metadata_says_what_the_file_is_and_believes_no_claim_of_ours(tmp_path: Path) -> None:
    claims = {"fluxgate.family": "sdxl", "fluxgate.secret": "x", "ss_network_module": "lora", "format": "np"}
    source = write_file(tmp_path / "a.safetensors", make_pairs(DIFFUSERS, alpha=2), claims)
    texts = {"trigger_word": "TÖK 猫", "base_model": "flux1-dev", "training": "trn_1", "settings": json.dumps({"steps": 10})}
    made = publish_lora(source, tmp_path, "style", metadata=texts)
    assert read_metadata(made.path) == {
        "format": "np",
        "ss_network_module": "lora",
        "fluxgate.family": "flux1",
        "fluxgate.rank": "4",
        "fluxgate.alpha": "2",
        "fluxgate.sha256": made.report.tensors_sha256,
        **{f"fluxgate.{key}": value for key, value in texts.items()},
    }
    for wrong in ({"family": "flux1"}, {"trigger_word": 1}):
        with pytest.raises(ValueError, match="allowed are texts under base_model"):
            publish_lora(source, tmp_path, "b", metadata=wrong)  # type: ignore[arg-type]


def test_one_lora_has_one_checksum_under_every_naming(tmp_path: Path) -> None:
    prefixes = ("transformer.", "", "unet.", "base_model.model.")
    files = [write_file(tmp_path / f"{n}.safetensors", make_pairs(DIFFUSERS, prefix)) for n, prefix in enumerate(prefixes)]
    assert len({inspect_lora(path).tensors_sha256 for path in files}) == 1
    assert len({inspect_lora(path).sha256 for path in files}) == len(files)
    other = write_file(tmp_path / "other.safetensors", make_pairs(DIFFUSERS, alpha=8))
    assert inspect_lora(other).tensors_sha256 != inspect_lora(files[0]).tensors_sha256


def test_partial_coverage_is_told(tmp_path: Path) -> None:
    strangers = make_pairs({f"nowhere.{n}": (1, 1) for n in range(8)}, hidden=8)
    report = inspect_lora(write_file(tmp_path / "a.safetensors", make_pairs(DIFFUSERS) | strangers))
    assert (report.coverage.layers, report.coverage.patched, report.coverage.share) == (16, 8, 0.5)
    assert report.unknown_count == 16
    assert report.unknown_keys == tuple(strangers)[:10]


def test_layers_that_add_nothing_are_counted(tmp_path: Path) -> None:
    entries = make_pairs(DIFFUSERS)
    entries[f"{TO_Q}.lora_B.weight"] = pack(np.zeros((3072, 4)))
    assert inspect_lora(write_file(tmp_path / "a.safetensors", entries)).coverage.idle == 1


def test_several_ranks_and_alphas_are_named(tmp_path: Path) -> None:
    entries = make_pairs(DIFFUSERS, alpha=4)
    entries[f"{TO_Q}.lora_A.weight"], entries[f"{TO_Q}.lora_B.weight"] = pack(random_matrix(8, 3072)), pack(random_matrix(3072, 8))
    entries[f"{TO_Q}.alpha"] = pack(np.array(1.5), "F32")
    made = publish_lora(write_file(tmp_path / "a.safetensors", entries), tmp_path, "style", metadata={})
    assert (made.report.rank, made.report.ranks, made.report.alpha, made.report.alphas) == (4, (4, 8), 4.0, (1.5, 4.0))
    assert (made.metadata["fluxgate.rank"], made.metadata["fluxgate.alpha"]) == ("4,8", "1.5,4")


def test_the_layers_are_those_of_the_small_model() -> None:
    model = load_transformer()
    linear = {name: tuple(module.weight.shape) for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert map_diffusers_layers(TINYFLUX) == linear


def test_flux_has_as_many_layers_as_published() -> None:
    # 19 double blocks of 14 layers, 38 single ones of 6 (diffusers) and 19 of 10, 38 of 3 (BFL), and ten outside.
    assert len(map_diffusers_layers(FLUX1)) == 19 * 14 + 38 * 6 + 10
    assert len(map_bfl_layers(FLUX1)) == 19 * 10 + 38 * 3 + 10


@pytest.mark.parametrize("prefix", ["transformer.", "", "unet.", "base_model.model.", "diffusion_model."])
def test_the_engine_applies_what_is_published(prefix: str, tmp_path: Path) -> None:
    made = publish_lora(write_tiny(tmp_path, prefix), tmp_path, "style", metadata={}, family="tinyflux")
    lora = read_lora(made.path, load_transformer())
    assert lora.unknown_keys == ()
    assert sorted(lora.changes) == sorted(DIFFUSERS)


def test_the_lora_in_the_repository_is_good() -> None:
    report = inspect_lora(TOK, family="tinyflux")
    assert (report.naming, report.rank, report.coverage.share) == ("diffusers", 8, 1.0)


# -- refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("title", REFUSED)
def test_a_bad_file_is_refused_with_its_reason(title: str, tmp_path: Path) -> None:
    code, write = REFUSED[title]
    path = write(tmp_path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(LoraRefused) as refused:
        publish_lora(path, tmp_path, "style", metadata={})
    assert refused.value.code == code, refused.value.message
    assert len(refused.value.message) < 500
    assert sorted(tmp_path.iterdir()) == before, "something was left behind"


@pytest.mark.parametrize(
    ("wanted", "hidden", "made_for"), [("tinyflux", 3072, "flux1"), ("flux1", TINY, "tinyflux"), ("wan", TINY, "tinyflux")]
)
def test_a_lora_of_another_family_than_asked_is_refused(wanted: str, hidden: int, made_for: str, tmp_path: Path) -> None:
    path = write_file(tmp_path / "a.safetensors", make_pairs(DIFFUSERS, hidden=hidden))
    assert inspect_lora(path).family == made_for
    with pytest.raises(LoraRefused) as refused:
        inspect_lora(path, family=wanted)
    assert (refused.value.code, refused.value.details["family"], refused.value.details["wanted"]) == ("lora_wrong_base", made_for, wanted)


def test_what_the_engine_cannot_apply_is_refused(tmp_path: Path) -> None:
    kohya = write_file(tmp_path / "a.safetensors", make_pairs(BFL, "diffusion_model.", hidden=TINY))
    with pytest.raises(LoraRefused, match="none is complete and of the shape of flux1 or tinyflux"):
        inspect_lora(kohya)


@pytest.mark.parametrize(
    ("limits", "code"),
    [
        (LoraLimits(file_bytes=1000), "lora_too_large"),
        (LoraLimits(header_bytes=100), "lora_header_too_large"),
        (LoraLimits(tensors=15), "lora_too_many_tensors"),
    ],
)
def test_the_limits_are_kept(limits: LoraLimits, code: str, tmp_path: Path) -> None:
    path = write_good(tmp_path)
    assert inspect_lora(path).tensors == 16
    with pytest.raises(LoraRefused) as refused:
        inspect_lora(path, limits=limits)
    assert refused.value.code == code


@pytest.mark.parametrize(
    "name", ["../a.safetensors", "a/b.safetensors", "..\\a.safetensors", "C:a.safetensors", "a\0.safetensors", "", "..", ".a.safetensors"]
)
def test_a_senders_name_that_leads_elsewhere_is_refused(name: str, tmp_path: Path) -> None:
    path = write_good(tmp_path)
    assert inspect_lora(path, name="My Style (2).SAFETENSORS")
    with pytest.raises(LoraRefused) as refused:
        inspect_lora(path, name=name)
    assert refused.value.code == "lora_bad_name"


@pytest.mark.parametrize("name", ["", "Style", "a b", "../a", "a/b", "a.b", "ä", "a" * 65, "a\n"])
def test_a_name_outside_the_rule_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(LoraRefused) as refused:
        publish_lora(write_good(tmp_path), tmp_path, name, metadata={})
    assert refused.value.code == "lora_bad_name"
    assert "lower case letters, digits, - and _, 1 to 64" in (refused.value.hint or "")


def test_a_published_name_holds_the_checksum() -> None:
    assert published_name("my-style_2", "0123456789abcdef" * 4) == "my-style_2-01234567.safetensors"
    with pytest.raises(ValueError, match="no sha256"):
        published_name("my-style", "0123")


@pytest.mark.parametrize(
    ("dtype", "item", "finite"),
    [
        ("F8_E4M3", b"\x7f", False),
        ("F8_E4M3", b"\xff", False),
        ("F8_E4M3", b"\x7e", True),
        ("F8_E5M2", b"\x7c", False),
        ("F8_E5M2", b"\xfd", False),
        ("F8_E5M2", b"\x7b", True),
        ("BF16", b"\x80\x7f", False),
        ("BF16", b"\x7f\x7f", True),
        ("F16", b"\x00\xfc", False),
        ("F16", b"\xff\x7b", True),
        ("F32", b"\x01\x00\x80\x7f", False),
        ("F32", b"\xff\xff\x7f\x7f", True),
        ("F64", b"\x00\x00\x00\x00\x00\x00\xf0\xff", False),
        ("F64", b"\xff\xff\xff\xff\xff\xff\xef\x7f", True),
        ("I8", b"\x7f", True),
    ],
)
def test_what_is_not_finite_is_known_in_every_dtype(dtype: str, item: bytes, finite: bool, tmp_path: Path) -> None:
    entries: dict[str, Entry] = {"a": (dtype, [3], bytes(len(item)) * 2 + item), "b": (dtype, [2], bytes(len(item)) * 2)}
    with open_tensor_file(write_file(tmp_path / "a.safetensors", entries), LoraLimits()) as file:
        if finite:
            assert scan_tensors(file).zeros == {"b"}
        else:
            with pytest.raises(LoraRefused, match="a holds NaN or Inf"):
                scan_tensors(file)


# -- writing ---------------------------------------------------------------------------------------------------


def test_a_published_file_is_never_replaced(tmp_path: Path) -> None:
    source = write_good(tmp_path)
    first = publish_lora(source, tmp_path, "style", metadata={"trigger_word": "TOK"})
    written = first.path.stat().st_mtime_ns
    assert publish_lora(source, tmp_path, "style", metadata={"trigger_word": "TOK"}).sha256 == first.sha256
    assert first.path.stat().st_mtime_ns == written
    first.path.write_bytes(b"another's")
    with pytest.raises(LoraRefused) as refused:
        publish_lora(source, tmp_path, "style", metadata={"trigger_word": "TOK"})
    assert refused.value.code == "lora_exists"
    assert first.path.read_bytes() == b"another's"
    assert {path.name for path in tmp_path.iterdir()} == {source.name, first.path.name}


def test_a_link_in_the_place_of_the_target_is_not_followed(tmp_path: Path) -> None:
    source, elsewhere = write_good(tmp_path), tmp_path / "elsewhere.safetensors"
    target = publish_lora(source, tmp_path, "style", metadata={}).path
    target.unlink()
    target.symlink_to(elsewhere)
    with pytest.raises(LoraRefused) as refused:
        publish_lora(source, tmp_path, "style", metadata={})
    assert refused.value.code == "lora_exists"
    assert not elsewhere.exists()


def rewrite(path: Path) -> None:
    with path.open("r+b") as stream:
        stream.seek(-1, 2)
        stream.write(b"\x01")


def shorten(path: Path) -> None:
    with path.open("r+b") as stream:
        stream.truncate(path.stat().st_size - 10)


@pytest.mark.parametrize("change", [rewrite, shorten])
def test_a_file_that_changes_while_it_is_read_is_refused(change: Callable[[Path], None], tmp_path: Path) -> None:
    source = write_good(tmp_path)
    with open_lora(source) as judged, (tmp_path / "out").open("wb") as out:
        change(source)
        with pytest.raises(LoraRefused) as refused:
            write_lora(out, judged, {}, tmp_path / "out")
    assert refused.value.code == "lora_changed"


def test_floats_stay_on_their_bytes_when_a_key_is_left_out(tmp_path: Path) -> None:
    """A reader that maps the file wants every tensor at a multiple of its item size."""
    entries = {"nowhere": ("U8", [1], b"\1")} | make_pairs(DIFFUSERS, dtype="F32", alpha=4)
    made = publish_lora(write_file(tmp_path / "a.safetensors", entries), tmp_path, "style", metadata={})
    with open_tensor_file(made.path, LoraLimits()) as file:
        assert [t.key for t in file.tensors if (file.data_start + t.start) % 4] == []
    assert made.left_out == ("nowhere",)


def test_every_reason_is_in_the_documentation() -> None:
    page = (ROOT / "docs" / "loras.md").read_text()
    sources = "".join(path.read_text() for path in (ROOT / "trainer_worker").glob("lora*.py"))
    codes = set(re.findall(r'(?:refuse\(\s*|code=)"(lora_\w+)"', sources))
    assert {code for code, _ in REFUSED.values()} < codes
    assert sorted(code for code in codes if f"`{code}`" not in page) == []
