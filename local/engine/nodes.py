"""What a node is and what it may ask of the engine while it runs.
It refuses to know the wire: a node declares inputs and returns values, the executor does the rest."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from PIL import Image

from local.engine.folders import ModelFolders

# (value, maximum, picture or None, full_size): full_size pictures go out as PNG, previews as a small JPEG.
ReportProgress = Callable[[int, int, Image.Image | None, bool], None]


class Interrupted(Exception):
    """Somebody asked to stop the prompt that is running."""


@dataclass(frozen=True)
class NodeOutput:
    """What a node returns when it has something to show: `ui` is what history and the `executed` message carry."""

    result: tuple[Any, ...] = ()
    ui: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class NodeContext:
    """One node's view of its run."""

    folders: ModelFolders
    node_id: str
    prompt: dict[str, Any]
    extra_pnginfo: dict[str, Any]
    previews_enabled: bool
    metadata_enabled: bool
    interrupt_requested: Callable[[], bool]
    report: ReportProgress

    def progress(self, value: int, maximum: int, preview: Image.Image | None = None) -> None:
        """Tells clients that `value` of `maximum` steps are done, with a preview when previews are on. Raises Interrupted."""
        self.check_interrupted()
        self.report(value, maximum, preview if self.previews_enabled else None, False)

    def deliver(self, value: int, maximum: int, picture: Image.Image) -> None:
        """Like progress, but the picture is a result: full size, PNG, sent whether or not previews are on."""
        self.check_interrupted()
        self.report(value, maximum, picture, True)

    def check_interrupted(self) -> None:
        if self.interrupt_requested():
            raise Interrupted


class Node:
    """Base of all nodes. IMAGE values are list[PIL.Image.Image] in RGB, MASK values the same in L.
    An instance lives as long as consecutive prompts hold a node of the same id and class, so a loader may memoise."""

    CATEGORY: ClassVar[str] = "fluxgate"
    RETURN_TYPES: ClassVar[tuple[str, ...]] = ()
    RETURN_NAMES: ClassVar[tuple[str, ...]] = ()  # empty: the types are the names
    OUTPUT_NODE: ClassVar[bool] = False
    TITLE: ClassVar[str] = ""  # empty: the class name
    DESCRIPTION: ClassVar[str] = ""
    PYTHON_MODULE: ClassVar[str] = "nodes"

    @classmethod
    def INPUT_TYPES(cls, folders: ModelFolders) -> dict[str, dict[str, Any]]:
        """{"required": {name: (type, options)}, "optional": ..., "hidden": {name: kind}}; a combo's type is its list of choices."""
        return {"required": {}}

    # `*args` in these three lets subclasses name their own inputs: mypy then checks only `folders` or `context`.
    @classmethod
    def fingerprint(cls, folders: ModelFolders, *args: Any, **inputs: Any) -> object:
        """A value that changes when the node must run again although its inputs did not; NaN means always. Constant inputs only."""
        return None

    @classmethod
    def validate(cls, folders: ModelFolders, *args: Any, **inputs: Any) -> str | None:
        """What is wrong with the constant inputs, or None. Inputs named here are spared the range and choice checks."""
        return None

    def run(self, context: NodeContext, *args: Any, **inputs: Any) -> tuple[Any, ...] | NodeOutput:
        """Computes the outputs, one value per return type; absent optional inputs are not passed."""
        return ()


NodeClasses = dict[str, type[Node]]


def builtin_nodes() -> NodeClasses:
    """The node classes that every engine has, by class name."""
    # Named, not imported on top: these modules build on this one.
    flux: NodeClasses = importlib.import_module("local.engine.flux_nodes").FLUX_NODES
    return {**load_nodes("local.engine.image_nodes"), **flux}


def load_nodes(module: str) -> NodeClasses:
    """The `NODES` of an importable module."""
    classes: NodeClasses = importlib.import_module(module).NODES
    return classes


def describe_node(name: str, node_class: type[Node], folders: ModelFolders) -> dict[str, Any]:
    """One entry of /object_info."""
    inputs = node_class.INPUT_TYPES(folders)
    return {
        "input": inputs,
        "input_order": {kind: list(declared) for kind, declared in inputs.items()},
        "output": list(node_class.RETURN_TYPES),
        "output_is_list": [False] * len(node_class.RETURN_TYPES),
        "output_name": list(node_class.RETURN_NAMES or node_class.RETURN_TYPES),
        "name": name,
        "display_name": node_class.TITLE or name,
        "description": node_class.DESCRIPTION,
        "python_module": node_class.PYTHON_MODULE,
        "category": node_class.CATEGORY,
        "output_node": node_class.OUTPUT_NODE,
    }
