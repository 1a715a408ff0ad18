"""ComfyUI's models folder, as far as it was filled from here: which file came from where, with which hash, and for which base models.

All of ours lies in `.fluxgate/` there: `manifest.json`, a lock, and `incoming/` with what is not whole yet. Other files are never touched.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gateway.errors import Conflict, FluxgateError


class Brought(BaseModel):
    """One file that was brought. `base_models` it belongs to: it goes when all of them may."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    sha256: str
    size_bytes: int
    repository: str
    path: str
    commit: str
    licence: str
    brought_ms: int
    base_models: tuple[str, ...]


class Manifest(BaseModel):
    """By place below the models folder, as `vae/ae.safetensors`."""

    model_config = ConfigDict(extra="ignore")

    version: int = 1
    files: dict[str, Brought] = Field(default_factory=dict)


class ModelFolder:
    """Blocking. Raises Conflict while another process changes the folder."""

    def __init__(self, root: Path) -> None:
        self.root, self._own = root, root / ".fluxgate"

    def place(self, name: str) -> Path:
        return self.root / name

    def part(self, sha256: str) -> Path:
        """Where a file grows until it is whole. By hash: it is gone on with only as what it was begun."""
        return self._own / "incoming" / f"{sha256}.part"

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Nobody else changes it meanwhile. The system lets go of the lock however we end."""
        self._own.mkdir(parents=True, exist_ok=True)
        with (self._own / "lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise Conflict(f"Another process changes {self.root}.", hint="Wait for it, or end it.") from error
            yield

    def read(self) -> Manifest:
        """Raises FluxgateError for one that cannot be read: what it listed would never be verified or removed again."""
        path = self._own / "manifest.json"
        if not path.exists():
            return Manifest()
        try:
            return Manifest.model_validate_json(path.read_text())
        except (ValidationError, UnicodeDecodeError) as error:
            raise FluxgateError(f"{path} cannot be read.", hint="Restore it, or delete it: files then stay, and are not ours.") from error

    def write(self, manifest: Manifest) -> None:
        waiting = self._own / f".manifest.{os.getpid()}"
        waiting.write_text(manifest.model_dump_json(indent=1))
        waiting.replace(self._own / "manifest.json")

    def put(self, part: Path, name: str) -> None:
        """A whole file gets its name at once: ComfyUI may be listing the folder."""
        target = self.place(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        part.replace(target)

    def remove(self, name: str) -> None:
        self.place(name).unlink(missing_ok=True)

    def drop_parts(self) -> None:
        """Forget what was begun and never ended."""
        shutil.rmtree(self._own / "incoming", ignore_errors=True)

    def free_bytes(self) -> int:
        self.root.mkdir(parents=True, exist_ok=True)
        return shutil.disk_usage(self.root).free
