"""Which results of earlier prompts may stand in for running a node again.
It knows input signatures and three keeping rules, and refuses to know what a result is."""

import hashlib
import json
import math
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from local.engine.folders import ModelFolders
from local.engine.nodes import Node, NodeClasses

CacheMode = Literal["classic", "lru", "none"]


@dataclass(frozen=True)
class CacheEntry:
    """What one node gave. `ui` is None for a node that showed nothing; `meta` names the node id it first ran under."""

    result: tuple[Any, ...]
    ui: dict[str, Any] | None
    meta: dict[str, Any]


class NodeCache:
    """classic keeps the results of the previous prompt only, lru the `size` latest, none nothing beyond the prompt."""

    def __init__(self, mode: CacheMode, size: int = 0) -> None:
        self._mode = mode
        self._size = size
        self._keys: dict[str, str] = {}
        self._entries: dict[str, CacheEntry] = {}
        self._instances: dict[tuple[str, type[Node]], Node] = {}

    def open_prompt(self, keys: dict[str, str], classes: Iterable[tuple[str, type[Node]]]) -> None:
        """Turns to a prompt: its signatures by node id, and its nodes; drops what the keeping rule drops."""
        self._keys = keys
        if self._mode == "none":
            self.clear()
        used = set(keys.values())
        stale = [key for key in self._entries if key not in used]
        if self._mode == "lru":
            stale = stale[: max(0, len(self._entries) - self._size)]
        for key in stale:
            del self._entries[key]
        # Insertion order is the order of use: results of this prompt become the newest.
        self._entries.update({key: self._entries.pop(key) for key in used & self._entries.keys()})
        alive = set(classes)
        self._instances = {key: instance for key, instance in self._instances.items() if key in alive}

    def get(self, node_id: str) -> CacheEntry | None:
        return self._entries.get(self._keys[node_id])

    def put(self, node_id: str, entry: CacheEntry) -> None:
        self._entries[self._keys[node_id]] = entry

    def instance(self, node_id: str, node_class: type[Node]) -> Node:
        key = (node_id, node_class)
        if key not in self._instances:
            self._instances[key] = node_class()
        return self._instances[key]

    def clear(self) -> None:
        self._entries.clear()
        self._instances.clear()


def is_link(value: object) -> bool:
    """[node id, output slot]"""
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], int)


def sign_nodes(graph: dict[str, Any], classes: NodeClasses, folders: ModelFolders) -> dict[str, str]:
    """A signature per node: equal signatures mean equal class, inputs and ancestry. Node ids do not count."""
    keys: dict[str, str] = {}
    for node_id in graph:
        _sign_node(node_id, graph, classes, folders, keys)
    return keys


def _sign_node(node_id: str, graph: dict[str, Any], classes: NodeClasses, folders: ModelFolders, keys: dict[str, str]) -> str:
    if node_id in keys:
        return keys[node_id]
    keys[node_id] = f"unrepeatable:{uuid.uuid4().hex}"  # stands while a cycle leads back here, and for nodes that must always run
    node = graph.get(node_id)
    inputs = node.get("inputs") if isinstance(node, dict) else None
    if not isinstance(inputs, dict):
        return keys[node_id]
    node_class = classes[graph[node_id]["class_type"]]
    constants = {name: value for name, value in inputs.items() if not is_link(value)}
    links = {name: [_sign_node(link[0], graph, classes, folders, keys), link[1]] for name, link in inputs.items() if is_link(link)}
    try:
        fingerprint = node_class.fingerprint(folders, **constants)
    except (OSError, TypeError, ValueError, LookupError):
        fingerprint = math.nan  # such as a file that is gone: run the node and let it say so
    if not (isinstance(fingerprint, float) and math.isnan(fingerprint)):
        text = json.dumps([graph[node_id]["class_type"], repr(fingerprint), constants, links], sort_keys=True)
        keys[node_id] = hashlib.sha256(text.encode()).hexdigest()
    return keys[node_id]
