"""Puts the model's files where a ComfyUI-like models folder expects them."""

import os
import shutil
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent

# Kept free of torch: the launcher installs, the engine loads.
INSTALLED_FILES = {
    "diffusion_models/tinyflux.safetensors": PACKAGE / "model" / "transformer" / "diffusion_pytorch_model.safetensors",
    "text_encoders/tinyflux_clip_l.safetensors": PACKAGE / "model" / "text_encoder" / "model.safetensors",
    "text_encoders/tinyflux_t5.safetensors": PACKAGE / "model" / "text_encoder_2" / "model.safetensors",
    "vae/tinyflux_vae.safetensors": PACKAGE / "model" / "vae" / "diffusion_pytorch_model.safetensors",
    "loras/tok.safetensors": PACKAGE / "loras" / "tok.safetensors",
}


def install_models(models_dir: Path) -> None:
    """Link every file into models_dir, creating folders; files already right stay untouched, others of these names are replaced."""
    for name, source in INSTALLED_FILES.items():
        target = models_dir / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if not is_installed(target, source):
            place(source, target)


def is_installed(target: Path, source: Path) -> bool:
    """True for a link to the source, or a copy with its bytes."""
    if target.is_symlink():
        return target.resolve() == source.resolve()
    return target.is_file() and target.read_bytes() == source.read_bytes()


def place(source: Path, target: Path) -> None:
    """Link, or copy where links fail; the name appears at once and complete, because a reader may be listing the folder."""
    waiting = target.with_name(f".{target.name}.{os.getpid()}")
    waiting.unlink(missing_ok=True)
    try:
        waiting.symlink_to(source.resolve())
    except OSError:
        shutil.copyfile(source, waiting)
    os.replace(waiting, target)


if __name__ == "__main__":
    # python -m local.tinyflux.install MODELS_DIR
    install_models(Path(sys.argv[1]))
