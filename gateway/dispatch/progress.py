"""From ComfyUI's messages to a job's progress: which node is at work, how many are done, where loading time went. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from gateway.comfy.messages import Executing, ExecutionCached, Message, ProgressState, ProgressStep
from gateway.jobs.model import Progress


@dataclass(slots=True)
class ProgressTracker:
    """Feed it the messages of one prompt; it says when there is something new to show."""

    graph: dict[str, Any]
    current: Progress = field(default_factory=Progress)
    load_ms: int = 0
    _weights: dict[str, int] = field(default_factory=dict)
    _done: set[str] = field(default_factory=set)
    _node: str | None = None
    _node_since_ms: int = 0

    def __post_init__(self) -> None:
        self.current = Progress(nodes_total=len(self.graph))
        self._weights = {node: self._weigh(node) for node in self.graph}

    def apply(self, message: Message, at_ms: int) -> Progress | None:
        """The progress after this message, or None when nothing a person would see has changed."""
        if isinstance(message, ProgressStep):
            return self._show(step=int(message.data.value), steps=int(message.data.max))
        if isinstance(message, Executing):
            return self._enter(message.data.node, at_ms)
        if isinstance(message, ExecutionCached):
            self._done.update(message.data.nodes)
            return self._show() if message.data.nodes else None
        if isinstance(message, ProgressState):
            self._done.update(node for node, state in message.data.nodes.items() if state.state == "finished")
        return None

    def _enter(self, node: str | None, at_ms: int) -> Progress | None:
        if self._node is not None:
            self._done.add(self._node)
            if "Loader" in self._class_of(self._node):
                self.load_ms += at_ms - self._node_since_ms
        self._node, self._node_since_ms = node, at_ms
        return self._show() if node is not None else None

    def _class_of(self, node: str) -> str:
        return str(self.graph.get(node, {}).get("class_type", ""))

    def title_of(self, node: str) -> str:
        """What the artist called the node, else its class."""
        return str(self.graph.get(node, {}).get("_meta", {}).get("title") or self._class_of(node) or node)

    def completed(self) -> Progress:
        """The progress of a prompt that has ended well."""
        return Progress(value=1.0, nodes_done=len(self.graph), nodes_total=len(self.graph))

    def _weigh(self, node: str) -> int:
        """A sampler counts as many times as it has steps, so that the bar moves evenly."""
        steps = self.graph[node].get("inputs", {}).get("steps")
        return max(1, steps) if isinstance(steps, int) and "Scheduler" not in self._class_of(node) else 1

    def _show(self, step: int | None = None, steps: int | None = None) -> Progress:
        # A node whose id is unknown to the graph was made by ComfyUI at run time; it does not count.
        done = self._done & self.graph.keys()
        at_work = self._node if self._node in self.graph and self._node not in done else None
        share = self._weights[at_work] * step / steps if at_work and step is not None and steps else 0.0
        total = max(1, sum(self._weights.values()))
        self.current = Progress(
            value=round(min(1.0, (sum(self._weights[node] for node in done) + share) / total), 4),
            nodes_done=len(done),
            nodes_total=len(self.graph),
            current_node=self.title_of(self._node) if self._node else None,
            current_node_id=self._node,
            current_node_class=self._class_of(self._node) if self._node else None,
            step=step,
            steps=steps,
        )
        return self.current
