"""All workflows and base models of a deployment, by name. Reads folders once; holds nothing open."""

from collections.abc import Mapping
from pathlib import Path
from typing import Self

from comfy_workflows.base_models import BaseModelInfo, read_base_models
from comfy_workflows.errors import UnknownBaseModel, UnknownWorkflow
from comfy_workflows.request_model import LoraRequest
from comfy_workflows.workflow import Filled, Workflow, load_workflow

__all__ = ["BaseModelInfo", "Catalog", "Filled", "LoraRequest", "Workflow"]

PACKAGE_FOLDER = Path(__file__).parent
BASE_MODELS_FILE = "base_models.toml"


class Catalog:
    def __init__(self, workflows: Mapping[str, Workflow], base_models: Mapping[str, BaseModelInfo]) -> None:
        self._workflows = dict(workflows)
        self.base_models = dict(base_models)

    @classmethod
    def load(cls, *folders: Path) -> Self:
        """Reads folders that hold workflow folders and, optionally, a base_models.toml; without any, the package's own.

        A name in a later folder replaces the same name in an earlier one. Raises BrokenWorkflow.
        """
        chosen = folders or (PACKAGE_FOLDER,)
        base_models = collect_base_models(*chosen)
        found = {path.name: load_workflow(path, base_models) for folder in chosen for path in find_workflow_folders(folder)}
        return cls(found, base_models)

    def put(self, workflow: Workflow) -> None:
        """Add a workflow, or replace the one of its name."""
        self._workflows[workflow.name] = workflow

    def drop(self, name: str) -> None:
        self._workflows.pop(name, None)

    def __contains__(self, name: str) -> bool:
        return name in self._workflows

    def names(self) -> list[str]:
        return sorted(self._workflows)

    def get(self, name: str) -> Workflow:
        """Raises UnknownWorkflow."""
        try:
            return self._workflows[name]
        except KeyError:
            raise UnknownWorkflow(name, self._workflows) from None

    def base_model(self, name: str) -> BaseModelInfo:
        """Raises UnknownBaseModel."""
        try:
            return self.base_models[name]
        except KeyError:
            raise UnknownBaseModel(name, self.base_models) from None


def collect_base_models(*folders: Path) -> dict[str, BaseModelInfo]:
    """The base models of all folders together, the later ones replacing the earlier of the same name."""
    found: dict[str, BaseModelInfo] = {}
    for folder in folders:
        path = folder / BASE_MODELS_FILE
        if path.is_file():
            found |= read_base_models(path)
    return found


def find_workflow_folders(folder: Path) -> list[Path]:
    """The workflow folders in `folder`: those with a graph or bindings, `folder` itself when it is one."""
    candidates = [folder, *sorted(path for path in folder.iterdir() if path.is_dir())]
    return [path for path in candidates if (path / "graph.json").is_file() or (path / "bindings.toml").is_file()]
