"""In which order the nodes of a graph run. It knows links and outputs, and refuses to run anything."""

from collections.abc import Callable
from typing import Any

from local.engine.cache import is_link


class DependencyCycle(Exception):
    """The nodes that remain wait for each other."""


class ExecutionOrder:
    """What is still to run for some outputs. ComfyUI's taste is kept, so that messages come in its order: among the nodes
    that are ready the first output goes first, then the first node that feeds one, then the first that feeds such a node."""

    def __init__(
        self,
        graph: dict[str, Any],
        outputs: list[str],
        *,
        is_cached: Callable[[str], bool],
        is_output: Callable[[str], bool],
        declared_inputs: Callable[[str], set[str]],
    ) -> None:
        self._is_output = is_output
        self._waits_for: dict[str, set[str]] = {}  # in order of discovery
        self._feeds: dict[str, list[str]] = {}
        for output in outputs:
            self._discover(graph, output, is_cached, declared_inputs)
        for node_id, sources in self._waits_for.items():
            for source in sources:
                self._feeds[source].append(node_id)

    def next(self) -> str | None:
        """A node whose inputs are all there, or None when nothing is left. DependencyCycle when nothing can go on."""
        if not self._waits_for:
            return None
        ready = [node_id for node_id, sources in self._waits_for.items() if not sources]
        if not ready:
            raise DependencyCycle(f"these nodes wait for each other: {', '.join(self._waits_for)}")
        for wanted in (self._is_output, self._feeds_output, self._feeds_feeder):
            for node_id in ready:
                if wanted(node_id):
                    return node_id
        return ready[0]

    def done(self, node_id: str) -> None:
        del self._waits_for[node_id]
        for fed in self._feeds.pop(node_id):
            self._waits_for[fed].discard(node_id)

    def _feeds_output(self, node_id: str) -> bool:
        return any(self._is_output(fed) for fed in self._feeds[node_id])

    def _feeds_feeder(self, node_id: str) -> bool:
        return any(self._feeds_output(fed) for fed in self._feeds[node_id])

    def _discover(
        self, graph: dict[str, Any], output: str, is_cached: Callable[[str], bool], declared_inputs: Callable[[str], set[str]]
    ) -> None:
        # Depth first from the last input to the first: the order in which ComfyUI comes to know its nodes.
        stack = [output]
        while stack:
            node_id = stack.pop()
            if node_id in self._waits_for:
                continue
            self._waits_for[node_id] = set()
            self._feeds[node_id] = []
            declared = declared_inputs(node_id)
            for name, value in graph[node_id]["inputs"].items():
                if name in declared and is_link(value) and not is_cached(value[0]):
                    self._waits_for[node_id].add(value[0])
                    stack.append(value[0])
