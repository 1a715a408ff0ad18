"""ComfyUI's node catalogue (`GET /object_info`), read: inputs, their types, ranges and choices. Knows no graph."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from comfy_workflows.errors import find_nearest, quote

ObjectInfo = Mapping[str, Any]

COMBO = "COMBO"
LITERAL_TYPES = frozenset({"INT", "FLOAT", "STRING", "BOOLEAN", COMBO})
MODEL_SUFFIXES = (".safetensors", ".sft", ".ckpt", ".pt", ".pt2", ".pth", ".bin", ".gguf", ".onnx", ".pkl")
UPLOAD_FLAGS = ("image_upload", "video_upload", "audio_upload", "file_upload")
MOST_CHOICES_SHOWN = 20


@dataclass(frozen=True)
class InputType:
    """One declared input. `choices` is None where any value goes or where ComfyUI itself does not check the list."""

    name: str
    type: str
    required: bool
    choices: tuple[Any, ...] | None = None
    minimum: float | None = None
    maximum: float | None = None

    @property
    def is_dynamic(self) -> bool:
        """Newer ComfyUI's COMFY_..._V3 inputs grow sub-inputs named `input.part`, which only ComfyUI can judge."""
        return self.type.startswith("COMFY_")


@dataclass(frozen=True)
class NodeType:
    class_type: str
    inputs: Mapping[str, InputType]
    outputs: tuple[str, ...]
    is_output: bool


def read_node_type(class_type: str, object_info: ObjectInfo) -> NodeType | None:
    """The declaration of a class, or None when the catalogue does not have it."""
    entry = object_info.get(class_type)
    if entry is None:
        return None
    sections = entry.get("input", {})
    inputs = {
        name: _read_input(name, spec, required=section == "required")
        for section in ("required", "optional")
        for name, spec in sections.get(section, {}).items()
    }
    # An output that is a list of choices stands for the combo it feeds.
    outputs = tuple(COMBO if isinstance(output, list) else str(output) for output in entry.get("output", []))
    return NodeType(class_type, inputs, outputs, bool(entry.get("output_node")))


def _read_input(name: str, spec: list[Any], *, required: bool) -> InputType:
    """Combos come as [[choices...], {...}] up to 0.3.64 and as ["COMBO", {"options": [...]}] from V3 nodes on."""
    declared: Any = spec[0]
    options: Mapping[str, Any] = spec[1] if len(spec) > 1 and isinstance(spec[1], dict) else {}
    if isinstance(declared, list):
        return InputType(name, COMBO, required, None if _is_unlisted(options) else tuple(declared))
    if declared == COMBO:
        listed = options.get("options")
        known = isinstance(listed, list) and not _is_unlisted(options)
        return InputType(name, COMBO, required, tuple(listed) if known and listed is not None else None)
    return InputType(name, str(declared), required, minimum=options.get("min"), maximum=options.get("max"))


def _is_unlisted(options: Mapping[str, Any]) -> bool:
    # Uploads are validated by existence, remote lists are fetched by the editor, multiselect values are lists.
    return any(options.get(flag) for flag in (*UPLOAD_FLAGS, "remote", "multiselect"))


def is_model_file(declared: InputType, value: Any) -> bool:
    """Whether a combo lists model files: its value or one of its choices ends like one (an empty folder lists none)."""
    candidates = (value, *(declared.choices or ()))
    return declared.choices is not None and any(isinstance(name, str) and name.lower().endswith(MODEL_SUFFIXES) for name in candidates)


def types_fit(received: str, wanted: str) -> bool:
    """Whether an output may feed an input: equal, "*", or one common member of a union such as "IMAGE,MASK"."""
    if wanted.startswith("COMFY_") or received.startswith("COMFY_"):
        return True
    received_types = {part.strip() for part in received.split(",")}
    wanted_types = {part.strip() for part in wanted.split(",")}
    return "*" in received_types | wanted_types or bool(received_types & wanted_types)


def find_value_fault(declared: InputType, value: Any) -> tuple[str, str] | None:
    """(code, message) when ComfyUI would refuse the literal; it converts first, so "64" and 1.7 are fine for an INT."""
    if declared.type == COMBO:
        return _find_choice_fault(declared, value)
    converted: float | None = None
    try:
        if declared.type == "INT":
            converted = int(value)
        elif declared.type == "FLOAT":
            converted = float(value)
    except (TypeError, ValueError, OverflowError):
        return "invalid_input_type", f"{quote(value)} is not {'an' if declared.type == 'INT' else 'a'} {declared.type}"
    if value is None:
        return "invalid_input_type", f"null is not a {declared.type}"
    if converted is not None and declared.minimum is not None and converted < declared.minimum:
        return "value_smaller_than_min", f"{quote(value)} is smaller than the minimum {declared.minimum}"
    if converted is not None and declared.maximum is not None and converted > declared.maximum:
        return "value_bigger_than_max", f"{quote(value)} is bigger than the maximum {declared.maximum}"
    return None


def _find_choice_fault(declared: InputType, value: Any) -> tuple[str, str] | None:
    if declared.choices is None or value in declared.choices:
        return None
    names = [str(choice) for choice in declared.choices]
    nearest = find_nearest(value, names) if isinstance(value, str) else None
    listed = ", ".join(names) or "none" if len(names) <= MOST_CHOICES_SHOWN else f"{len(names)} choices"
    return "value_not_in_list", f"{quote(value)} is not one of: {listed}" + (f" (nearest: {nearest})" if nearest else "")
