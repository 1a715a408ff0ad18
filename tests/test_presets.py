"""Which precision a training gets on which machine, and what is refused there. The machines are as nvidia-smi shows them."""

from __future__ import annotations

import pytest

from gateway.errors import Unprocessable
from gateway.trainings.presets import GB, Machine, choose_preset, estimate_disk, require_disk

MIB = 1 << 20


def make_machine(name: str | None, total_mib: int = 0, free_mib: int = 0, ram_gb: int = 128) -> Machine:
    memory = {"gpu": "present", "gpu_name": name, "gpu_total_bytes": total_mib * MIB, "gpu_free_bytes": free_mib * MIB}
    return Machine.model_validate({**(memory if name else {"gpu": "absent"}), "ram_total_bytes": ram_gb * GB, "disk_free_bytes": 500 * GB})


MACHINES = {
    "T4 16": make_machine("Tesla T4", 15360, 15095),
    "T4 16 as a notebook has it": make_machine("Tesla T4", 15360, 15095, ram_gb=13),
    "RTX 4070 12": make_machine("NVIDIA GeForce RTX 4070", 12282, 11890),
    "RTX 3070 8": make_machine("NVIDIA GeForce RTX 3070", 8192, 7900),
    "L4 24": make_machine("NVIDIA L4", 23034, 22563),
    "RTX 4090 24": make_machine("NVIDIA GeForce RTX 4090", 24564, 24080),
    "A100 40": make_machine("NVIDIA A100-SXM4-40GB", 40960, 40326),
    "A100 80": make_machine("NVIDIA A100-SXM4-80GB", 81920, 81037),
    "H100 80": make_machine("NVIDIA H100 80GB HBM3", 81559, 80994),
    "H100 half in use": make_machine("NVIDIA H100 80GB HBM3", 81559, 19000),
    "no GPU": make_machine(None),
}


@pytest.mark.parametrize(
    ("machine", "asked", "precision"),
    [
        ("T4 16", None, "int4"),
        ("T4 16", "nf4", "nf4"),
        ("RTX 4070 12", None, "nf4"),
        ("L4 24", None, "int8"),
        ("L4 24", "int4", "int4"),
        ("RTX 4090 24", None, "int8"),
        ("A100 40", None, "bf16"),
        ("A100 40", "int8", "int8"),
        ("A100 80", None, "bf16"),
        ("H100 80", None, "bf16"),
        ("H100 80", "nf4", "nf4"),
        ("H100 half in use", None, "int8"),
    ],
)
def test_flux_gets_the_best_precision_that_fits(machine: str, asked: str | None, precision: str) -> None:
    preset = choose_preset("flux1", asked, MACHINES[machine])
    assert preset.precision == precision
    assert ("asked" in preset.reason) == (asked is not None)
    assert preset.gpu == MACHINES[machine].gpu_name
    assert preset.needed_gpu_bytes is not None
    assert preset.needed_gpu_bytes < (MACHINES[machine].gpu_free_bytes or 0)


@pytest.mark.parametrize(
    ("machine", "asked", "code", "words"),
    [
        ("T4 16", "int8", "insufficient_gpu_memory", "int8 18.0 GB"),
        ("L4 24", "bf16", "insufficient_gpu_memory", "bf16 30.0 GB"),
        ("H100 half in use", "bf16", "insufficient_gpu_memory", "19.9 GB free now"),
        ("RTX 3070 8", None, "insufficient_gpu_memory", "8.3 GB free now"),
        ("no GPU", None, "insufficient_gpu_memory", "no GPU"),
        ("no GPU", "bf16", "insufficient_gpu_memory", "no GPU"),
        ("T4 16 as a notebook has it", None, "insufficient_ram", "50.0 GB of RAM"),
    ],
)
def test_what_cannot_fit_is_refused_with_its_reason(machine: str, asked: str | None, code: str, words: str) -> None:
    with pytest.raises(Unprocessable, match=words) as refused:
        choose_preset("flux1", asked, MACHINES[machine])
    assert refused.value.code == code
    assert refused.value.hint


def test_before_queueing_the_whole_gpu_counts() -> None:
    busy = MACHINES["H100 half in use"]
    assert choose_preset("flux1", "bf16", busy, whole=True).precision == "bf16"
    with pytest.raises(Unprocessable, match="in all"):
        choose_preset("flux1", "int8", MACHINES["T4 16"], whole=True)


def test_the_refusal_names_what_would_fit() -> None:
    with pytest.raises(Unprocessable) as refused:
        choose_preset("flux1", "bf16", MACHINES["L4 24"])
    assert refused.value.details["allowed"] == ["int8", "int4", "nf4"]
    assert refused.value.hint == "Ask for precision 'int8', or leave it out."


@pytest.mark.parametrize(("family", "asked", "precision"), [("tinyflux", None, "bf16"), ("tinyflux", "no_change", "no_change")])
def test_the_small_model_needs_no_gpu(family: str, asked: str | None, precision: str) -> None:
    assert choose_preset(family, asked, MACHINES["no GPU"]).precision == precision


@pytest.mark.parametrize(
    ("family", "machine", "precision"),
    [("hunyuanvideo", "A100 40", "bf16"), ("wan", "L4 24", "bf16"), ("hunyuanvideo", "RTX 4090 24", "int8")],
)
def test_video_families_have_tiers_of_their_own(family: str, machine: str, precision: str) -> None:
    assert choose_preset(family, None, MACHINES[machine]).precision == precision


def test_a_machine_that_could_not_be_measured_refuses_nothing() -> None:
    preset = choose_preset("flux1", None, Machine())
    assert (preset.precision, preset.reason) == ("bf16", "the GPU's memory could not be measured")
    require_disk(1 << 50, Machine())


def test_the_disk_estimate_grows_with_what_is_written() -> None:
    def estimate(**changes: int) -> int:
        return estimate_disk("flux1", **{"rank": 16, "resolution": 1024, "files": 20, "dataset_bytes": 50_000_000, **changes})

    plain = estimate()
    assert GB < plain < 3 * GB
    assert all(estimate(**more) > plain for more in ({"rank": 64}, {"files": 500}, {"dataset_bytes": GB}, {"model_bytes": 34 * GB}))
    assert estimate_disk("tinyflux", rank=8, resolution=128, files=10, dataset_bytes=40_000) < GB
    with pytest.raises(Unprocessable, match=r"writes up to .* has 1\.0 GB free") as refused:
        require_disk(plain + GB, Machine(disk_free_bytes=GB))
    assert refused.value.code == "insufficient_disk"
