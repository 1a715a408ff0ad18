"""Loads the companion extension by path, as ComfyUI does: its folder is no package of this project."""

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

FOLDER = Path(__file__).parents[1] / "docker" / "comfyui" / "custom_nodes" / "fluxgate"
NAME = "fluxgate_companion"
FINAL = "image_00001_.png"


def load_part(name: str) -> ModuleType:
    """A module of the extension by its file name."""
    if NAME not in sys.modules:
        spec = importlib.util.spec_from_file_location(NAME, FOLDER / "__init__.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules[NAME] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[NAME])
    return importlib.import_module(f"{NAME}.{name}")
