"""Container files as data, for tests: Dockerfiles, the compose files, the manifests, and what docker/versions.env puts in.
It reads them as their tools would, as far as these files go; where the tools are at hand, tests ask them too."""

from __future__ import annotations

import json
import re
import shutil
import sysconfig
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

import yaml

ROOT = Path(__file__).parents[1]
DOCKER = ROOT / "docker"
DOCKERFILES = sorted(DOCKER.glob("*/Dockerfile"))
SETTINGS_SERVICES = ("gateway", "trainer")
_VARIABLE = re.compile(r"\$\{(\w+)(?:(:?[-?])([^}]*))?\}|\$\$")


class _Loader(yaml.SafeLoader):
    """Compose's own tags: `!override` replaces what is merged into, `!reset` takes it out."""


def _construct(loader: _Loader, suffix: str, node: yaml.Node) -> Any:
    if isinstance(node, yaml.MappingNode):
        return loader.construct_mapping(node, deep=True)
    return loader.construct_sequence(node, deep=True) if isinstance(node, yaml.SequenceNode) else None


_Loader.add_multi_constructor("!", _construct)


def find_program(name: str) -> str | None:
    """A tool on the PATH, or beside this python."""
    return shutil.which(name) or shutil.which(name, path=sysconfig.get_path("scripts"))


def read_versions() -> dict[str, str]:
    lines = (DOCKER / "versions.env").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def fill(value: Any, variables: dict[str, str]) -> Any:
    """Compose's interpolation, in every text of the value."""

    def replace(match: re.Match[str]) -> str:
        name, operator, other = match.groups()
        if name is None:
            return "$"
        given = variables.get(name)
        if operator == ":-":
            return given or other
        if operator == "-":
            return other if given is None else given
        if given is None and operator != "?":
            assert operator == ":?", f"${{{name}}} is nowhere set"
        assert given, f"${{{name}}} must be set: {other}"
        return given

    if isinstance(value, str):
        return _VARIABLE.sub(replace, value)
    if isinstance(value, dict):
        return {key: fill(item, variables) for key, item in value.items()}
    return [fill(item, variables) for item in value] if isinstance(value, list) else value


def read_compose(*names: str, **variables: str) -> dict[str, dict[str, Any]]:
    """Services by name, of the files merged in order: maps are merged, all else is replaced."""

    def merge(one: Any, other: Any) -> Any:
        if isinstance(one, dict) and isinstance(other, dict):
            return one | {key: merge(one.get(key), item) for key, item in other.items()}
        return other

    services: dict[str, Any] = {}
    for name in names:
        services = merge(services, yaml.load((ROOT / name).read_text(), _Loader)["services"])
    filled: dict[str, dict[str, Any]] = fill(services, {**read_versions(), **variables})
    return filled


class Instruction(NamedTuple):
    name: str
    rest: str


def read_dockerfile(path: Path) -> list[Instruction]:
    """Instructions in order, each on one line, without comments."""
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [Instruction(*line.split(maxsplit=1)) for line in joined.splitlines() if line.strip()]


def read_environment(path: Path) -> dict[str, str]:
    """What the last stage sets."""
    found: dict[str, str] = {}
    for name, rest in read_dockerfile(path):
        if name == "FROM":
            found = {}
        elif name == "ENV":
            found |= dict(pair.split("=", 1) for pair in rest.split())
    return found


def read_command(path: Path) -> list[str]:
    """ENTRYPOINT and CMD, in their JSON form."""
    last = {name: json.loads(rest) for name, rest in read_dockerfile(path) if name in ("ENTRYPOINT", "CMD")}
    return [*last.get("ENTRYPOINT", []), *last.get("CMD", [])]


def list_copied(path: Path) -> Iterator[str]:
    """Sources of each COPY from the context."""
    for name, rest in read_dockerfile(path):
        words = [word for word in rest.split() if not word.startswith("--chown")]
        if name == "COPY" and not words[0].startswith("--from"):
            yield from words[:-1]


def is_let_through(path: str) -> bool:
    """Whether .dockerignore leaves the path in the context: the last line that matches it, or a folder above, decides."""
    folders = [path, *map(str, list(Path(path).parents)[:-1])]
    verdict = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if line and not line.startswith("#"):
            pattern = line.removeprefix("!")
            anywhere = pattern.removeprefix("**/")
            if any(fnmatch(Path(folder).name if anywhere != pattern else folder, anywhere) for folder in folders):
                verdict = line.startswith("!")
    return verdict


def list_manifests(*folders: str) -> list[dict[str, Any]]:
    """Every object written in these folders of docker/k8s, without kustomizations."""
    files = [path for folder in folders for path in sorted((DOCKER / "k8s" / folder).glob("*.yaml")) if path.stem != "kustomization"]
    return [thing for path in files for thing in yaml.safe_load_all(path.read_text()) if thing]


def list_containers(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    pod = manifest.get("spec", {}).get("template", {}).get("spec", {})
    return [*pod.get("initContainers", []), *pod.get("containers", [])]
