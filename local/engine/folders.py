"""Where model files, inputs, outputs and temporary pictures lie, and how names become paths.
It refuses to know what is inside a file."""

import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

MODEL_EXTENSIONS = frozenset({".ckpt", ".pt", ".pt2", ".bin", ".pth", ".safetensors", ".pkl", ".sft"})

# ComfyUI's folder names, each with the directories under models/ that it searches.
MODEL_FOLDERS: dict[str, tuple[str, ...]] = {
    "checkpoints": ("checkpoints",),
    "configs": ("configs",),
    "loras": ("loras",),
    "vae": ("vae",),
    "text_encoders": ("text_encoders", "clip"),
    "diffusion_models": ("unet", "diffusion_models"),
    "clip_vision": ("clip_vision",),
    "style_models": ("style_models",),
    "embeddings": ("embeddings",),
    "diffusers": ("diffusers",),
    "vae_approx": ("vae_approx",),
    "controlnet": ("controlnet", "t2i_adapter"),
    "gligen": ("gligen",),
    "upscale_models": ("upscale_models",),
    "hypernetworks": ("hypernetworks",),
    "photomaker": ("photomaker",),
    "classifiers": ("classifiers",),
    "model_patches": ("model_patches",),
    "audio_encoders": ("audio_encoders",),
}


class ModelFileMissing(KeyError):
    """No file of that name in that model folder."""

    def __str__(self) -> str:
        return str(self.args[0])


class OutsideOutputFolder(Exception):
    """A filename prefix leads out of the folder that it is relative to."""


class ModelFolders:
    """The folders of one engine. `base` holds models/, input/, output/ and temp/; `extra` are further models/ folders."""

    def __init__(self, base: Path, extra: Sequence[Path] = ()) -> None:
        self.base = base.resolve()
        self.output = self.base / "output"
        self.input = self.base / "input"
        self.temp = self.base / "temp"
        self._roots = (self.base / "models", *(path.resolve() for path in extra))

    def prepare(self) -> None:
        """Creates the folders that uploads and outputs need and empties temp/."""
        shutil.rmtree(self.temp, ignore_errors=True)
        for directory in (self.output, self.input, self.temp, *(self._roots[0] / name for name in ("loras", "diffusion_models"))):
            directory.mkdir(parents=True, exist_ok=True)

    def kinds(self) -> list[str]:
        return list(MODEL_FOLDERS)

    def names(self, folder: str) -> list[str]:
        """Sorted names relative to the folder, with forward slashes, read from disk at each call. KeyError: no such folder."""
        return sorted({name for directory in self._directories(folder) for name in _model_names(directory)})

    def path(self, folder: str, name: str) -> Path:
        """The file behind a name; ModelFileMissing when none of the folder's directories has it."""
        # Joining to "/" first confines `..` to the directory.
        relative = os.path.relpath(os.path.join("/", name), "/")
        for directory in self._directories(folder):
            candidate = directory / relative
            if candidate.is_file():
                return candidate
        raise ModelFileMissing(f"no file {name!r} in the model folder {folder!r}")

    def directory(self, kind: str) -> Path | None:
        """The directory of an output item's type, or None for a type that does not exist."""
        return {"output": self.output, "input": self.input, "temp": self.temp}.get(kind)

    def split_annotation(self, name: str) -> tuple[str, Path | None]:
        """`a.png [output]` -> (`a.png`, the output directory); without an annotation the directory is None."""
        for kind in ("output", "input", "temp"):
            if name.endswith(f"[{kind}]"):
                return name[: -len(kind) - 2].rstrip(" "), self.directory(kind)
        return name, None

    def input_path(self, name: str) -> Path:
        """The path a LoadImage name stands for; it is not confined to a folder, as in ComfyUI, and need not exist."""
        bare, directory = self.split_annotation(name)
        return (directory or self.input) / bare

    def _directories(self, folder: str) -> Iterator[Path]:
        for root in self._roots:
            for name in MODEL_FOLDERS[folder]:
                yield root / name


def reserve_save_path(directory: Path, prefix: str) -> tuple[Path, str, int, str]:
    """(folder, file stem, first free counter, subfolder) for `prefix` below `directory`; the folder is created.
    The counter continues from the files on disk. OutsideOutputFolder when the prefix leaves the directory."""
    normal = os.path.normpath(prefix)
    subfolder, stem = os.path.dirname(normal), os.path.basename(normal)
    folder = Path(os.path.abspath(directory / subfolder))
    if not folder.is_relative_to(directory):
        raise OutsideOutputFolder(
            f"Saving image outside the output folder is not allowed: prefix {prefix!r} leads to {folder}, allowed is {directory}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    return folder, stem, _largest_counter(folder, stem) + 1, subfolder


def _largest_counter(folder: Path, stem: str) -> int:
    largest = 0
    start = f"{stem}_"
    for name in os.listdir(folder):
        if name.startswith(start):
            digits = name[len(start) :].split("_", 1)[0]
            if digits.isascii() and digits.isdigit():
                largest = max(largest, int(digits))
    return largest


def _model_names(directory: Path) -> Iterator[str]:
    for parent, folders, files in os.walk(directory, followlinks=True):
        folders[:] = [name for name in folders if name != ".git"]
        for file in files:
            if os.path.splitext(file)[1].lower() in MODEL_EXTENSIONS:
                yield os.path.relpath(os.path.join(parent, file), directory).replace(os.sep, "/")
