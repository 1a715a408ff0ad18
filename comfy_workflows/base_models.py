"""Base models as data: what `base_models.toml` says of each. Knows names, files and defaults, never a path or a download."""

import tomllib
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from comfy_workflows.errors import BrokenWorkflow


class FileSource(BaseModel):
    """Where one file of a base model comes from, and ComfyUI's folder below `models` that it belongs into."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    repository: str = Field(pattern=r"^[\w.-]{1,96}/[\w.-]{1,96}$", description="on Hugging Face")
    path: str = Field(pattern=r"^[\w.-]+(/[\w.-]+)*$", description="in the repository")
    folder: str = Field(pattern=r"^[a-z_]+$")


class BaseModelInfo(BaseModel):
    """One base model. `files` maps a loader's role (`unet`, `clip_l`, `t5`, `vae`) to the file name that ComfyUI lists."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1)
    title: str
    family: str = Field(min_length=1, description="LoRAs fit every base model of their family and no other")
    lora_families: tuple[str, ...] = Field(default=(), description="further families whose LoRAs fit this one")
    files: dict[str, str] = Field(min_length=1)
    sources: dict[str, FileSource] = Field(default={}, description="by role: where a file can be fetched; empty where it cannot")
    size_bytes: int = Field(gt=0, description="all files together")
    source: str = Field(description="where the files come from: a Hugging Face repository or a URL")
    trains_on: str | None = Field(default=None, description="the repository in diffusers layout to train on, where `source` has none")
    flavour: str = Field(default="", description="what SimpleTuner calls it within its family; empty for the first one")
    licence: str
    gated: bool = Field(default=False, description="whether the source asks for an account that accepted its terms")
    steps: int = Field(ge=1)
    guidance_scale: float = Field(ge=0)

    @model_validator(mode="after")
    def _need_all_sources(self) -> Self:
        if self.sources and self.sources.keys() != self.files.keys():
            raise ValueError(f"sources names {', '.join(sorted(self.sources))}; allowed is all of {', '.join(sorted(self.files))}, or none")
        return self


def read_base_models(path: Path) -> dict[str, BaseModelInfo]:
    """Reads one `base_models.toml`: a table per base model. Raises BrokenWorkflow naming the tables and the fields."""
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BrokenWorkflow(path.name, [f"{path}: {error}"]) from error
    found: dict[str, BaseModelInfo] = {}
    problems: list[str] = []
    for name, table in tables.items():
        try:
            found[name] = BaseModelInfo.model_validate({**table, "name": name} if isinstance(table, dict) else table)
        except ValidationError as error:
            problems += [f"{path}: {'.'.join(map(str, (name, *fault['loc'])))}: {fault['msg']}" for fault in error.errors()]
    if problems:
        raise BrokenWorkflow(path.name, problems)
    return found
