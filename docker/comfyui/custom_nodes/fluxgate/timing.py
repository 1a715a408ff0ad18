"""How long each of the last prompts took: in whole, in each node, and in loading models. Knows no ComfyUI."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

PROMPTS_KEPT = 1000
NODES_KEPT = 500  # per prompt: a graph that expands itself in a loop would fill the memory


@dataclass
class NodeTime:
    id: str
    class_name: str
    duration_s: float = 0.0
    load_s: float = 0.0


@dataclass
class PromptTime:
    prompt_id: str
    began_s: float
    duration_s: float | None = None
    load_s: float = 0.0
    nodes: list[NodeTime] = field(default_factory=list)


class PromptTimings:
    """One prompt at a time runs on the executor thread; other threads only read."""

    def __init__(self, kept: int = PROMPTS_KEPT, read_clock_s: Callable[[], float] = time.perf_counter) -> None:
        self._kept = kept
        self._read_clock_s = read_clock_s
        self._prompts: OrderedDict[str, PromptTime] = OrderedDict()
        self._lock = threading.Lock()
        self._prompt: PromptTime | None = None
        self._executor_thread = 0
        self._node: NodeTime | None = None
        self._loads_open = 0

    def is_idle(self) -> bool:
        return self._prompt is None

    @contextmanager
    def time_prompt(self, prompt_id: str) -> Iterator[None]:
        prompt = PromptTime(prompt_id, self._read_clock_s())
        with self._lock:
            self._prompts.pop(prompt_id, None)  # a second run of the same id replaces the first
            self._prompts[prompt_id] = prompt
            while len(self._prompts) > self._kept:
                self._prompts.popitem(last=False)
        self._prompt, self._executor_thread, self._node, self._loads_open = prompt, threading.get_ident(), None, 0
        try:
            yield
        finally:
            prompt.duration_s = self._read_clock_s() - prompt.began_s
            self._prompt = None

    @contextmanager
    def time_node(self, node_id: str, class_name: str) -> Iterator[None]:
        """A node that is run once per item of a list appears once, with the sum."""
        prompt, outer = self._prompt, self._node
        node = NodeTime(node_id, class_name)
        if prompt is not None and len(prompt.nodes) < NODES_KEPT:
            prompt.nodes.append(node)
        self._node = node
        began_s = self._read_clock_s()
        try:
            yield
        finally:
            node.duration_s = self._read_clock_s() - began_s
            self._node = outer

    @contextmanager
    def time_load(self) -> Iterator[None]:
        """Counts the outermost load only; a load on another thread does not hold up the prompt and is not counted."""
        prompt, node = self._prompt, self._node
        if prompt is None or threading.get_ident() != self._executor_thread or self._loads_open:
            yield
            return
        self._loads_open += 1
        began_s = self._read_clock_s()
        try:
            yield
        finally:
            took_s = self._read_clock_s() - began_s
            self._loads_open -= 1
            prompt.load_s += took_s
            if node is not None:
                node.load_s += took_s

    def describe(self, prompt_id: str) -> dict[str, Any] | None:
        """Milliseconds; `load_ms` and `execution_ms` add up to the whole. None for a prompt that is not known (any more)."""
        with self._lock:
            prompt = self._prompts.get(prompt_id)
        if prompt is None:
            return None
        done = prompt.duration_s is not None
        whole_s = self._read_clock_s() - prompt.began_s if prompt.duration_s is None else prompt.duration_s
        return {
            "prompt_id": prompt.prompt_id,
            "done": done,
            "load_ms": to_ms(prompt.load_s),
            "execution_ms": to_ms(max(0.0, whole_s - prompt.load_s)),
            "nodes": [
                {"id": node.id, "class": node.class_name, "ms": to_ms(node.duration_s), "load_ms": to_ms(node.load_s)}
                for node in list(prompt.nodes)
            ],
        }


def to_ms(seconds: float) -> float:
    return round(1000 * seconds, 3)
