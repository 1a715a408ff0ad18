"""The ComfyUI around us, seen only through modules that it has loaded itself: nothing is imported here that may be missing.
A moved attribute surfaces as `HostLacks`, which costs one feature and one line in the log."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


class HostLacks(RuntimeError):
    """This ComfyUI has no such module or attribute."""


def find_attribute(module_name: str, attribute: str) -> Any:
    """What `module_name.attribute` is in the running ComfyUI; dots in the attribute descend. Raises HostLacks."""
    found: Any = sys.modules.get(module_name)
    if found is None:
        raise HostLacks(f"this ComfyUI has no module {module_name}")
    for name in attribute.split("."):
        if not hasattr(found, name):
            raise HostLacks(f"this ComfyUI has no {module_name}.{attribute}")
        found = getattr(found, name)
    return found


def replace_attribute(module_name: str, attribute: str, wrap: Callable[[Any], Any]) -> None:
    """Puts `wrap(original)` where the original was. Raises HostLacks."""
    original = find_attribute(module_name, attribute)
    *owner_names, name = attribute.split(".")
    owner = find_attribute(module_name, ".".join(owner_names)) if owner_names else sys.modules[module_name]
    setattr(owner, name, wrap(original))


def find_folder(folder_type: str) -> Path | None:
    """Where files of that type (`output`, `temp`, `input`) lie; None for any other type."""
    if folder_type not in ("output", "temp", "input"):
        return None
    return Path(find_attribute("folder_paths", f"get_{folder_type}_directory")())


def writes_metadata() -> bool:
    """False where ComfyUI was started with --disable-metadata."""
    return not find_attribute("comfy.cli_args", "args.disable_metadata")


def stop_when_interrupted() -> None:
    """Raises ComfyUI's own exception when somebody has interrupted the running prompt."""
    find_attribute("comfy.model_management", "throw_exception_if_processing_interrupted")()


def describe_memory() -> dict[str, int]:
    """Bytes of the compute device; on a CPU they are the machine's, and nothing is reserved."""
    device = find_attribute("comfy.model_management", "get_torch_device")()
    total, reserved = find_attribute("comfy.model_management", "get_total_memory")(device, torch_total_too=True)
    on_cpu = getattr(device, "type", "") == "cpu"
    return {
        "total_bytes": int(total),
        "free_bytes": int(find_attribute("comfy.model_management", "get_free_memory")(device)),
        "torch_reserved_bytes": 0 if on_cpu else int(reserved),
    }


def describe_models() -> list[dict[str, Any]]:
    """The models on the device, the last used first; the class of the network, because ComfyUI keeps no file name here."""
    described = []
    for loaded in list(find_attribute("comfy.model_management", "current_loaded_models")):
        if (patcher := loaded.model) is not None:
            sizes = {"size_bytes": int(loaded.model_memory()), "loaded_bytes": int(loaded.model_loaded_memory())}
            described.append({"class": type(patcher.model).__name__, **sizes})
    return described


def has_dead_models() -> bool:
    """True when a model is garbage that only a collection can free: ComfyUI is about to collect."""
    return any(loaded.is_dead() for loaded in list(find_attribute("comfy.model_management", "current_loaded_models")))
