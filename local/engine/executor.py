"""Runs one graph after the other and tells what happens, message by message in ComfyUI's order.
It refuses to know HTTP."""

import threading
import time
import traceback
from dataclasses import dataclass
from typing import Any

from local.engine.cache import CacheEntry, NodeCache, is_link, sign_nodes
from local.engine.folders import ModelFolders
from local.engine.nodes import Interrupted, Node, NodeClasses, NodeContext, NodeOutput
from local.engine.ordering import ExecutionOrder
from local.engine.progress import Progress
from local.engine.prompt_queue import Prompt
from local.engine.sockets import RunningNode, Sockets


@dataclass(frozen=True)
class ExecutorOptions:
    previews_enabled: bool = False
    metadata_enabled: bool = True


class Executor:
    """What outlives a prompt: the cache, the interrupt flag and the node that is running now."""

    def __init__(self, classes: NodeClasses, folders: ModelFolders, sockets: Sockets, cache: NodeCache, options: ExecutorOptions) -> None:
        self.classes = classes
        self.folders = folders
        self.sockets = sockets
        self.cache = cache
        self.options = options
        self.running_node: RunningNode = (None, None)
        self._interrupt = threading.Event()

    def interrupt(self) -> None:
        """Stops the running prompt at its next progress step or node; without one it is forgotten at the next start."""
        self._interrupt.set()

    def interrupt_requested(self) -> bool:
        return self._interrupt.is_set()

    def execute(self, prompt: Prompt) -> dict[str, Any]:
        """Runs it to its end and returns its history entry without the prompt: outputs, status, meta."""
        self._interrupt.clear()
        return PromptRun(self, prompt).run()


class PromptRun:
    """One execution of one prompt."""

    def __init__(self, executor: Executor, prompt: Prompt) -> None:
        _, self.prompt_id, self.graph, extra_data, self.outputs = prompt
        self.executor = executor
        self.cache = executor.cache
        self.client_id: str | None = extra_data.get("client_id")
        pnginfo = extra_data.get("extra_pnginfo")
        self.extra_pnginfo: dict[str, Any] = pnginfo if isinstance(pnginfo, dict) else {}
        self.progress = Progress(executor.sockets, self.prompt_id, self.client_id)
        self.messages: list[tuple[str, dict[str, Any]]] = []
        self.executed: list[str] = []

    def run(self) -> dict[str, Any]:
        self.executor.running_node = (self.client_id, None)
        self._record("execution_start", {})
        keys = sign_nodes(self.graph, self.executor.classes, self.executor.folders)
        self.cache.open_prompt(keys, [(node_id, self._class_of(node_id)) for node_id in self.graph])
        self._record("execution_cached", {"nodes": [node_id for node_id in self.graph if self.cache.get(node_id)]})
        completed = self._run_nodes()
        if completed:
            self._record("execution_success", {})
        self.executor.running_node = (self.client_id, None)
        return self._history_entry(completed)

    def _run_nodes(self) -> bool:
        order = ExecutionOrder(
            self.graph,
            self.outputs,
            is_cached=lambda node_id: self.cache.get(node_id) is not None,
            is_output=lambda node_id: self._class_of(node_id).OUTPUT_NODE,
            declared_inputs=self._declared_inputs,
        )
        node_id = self.outputs[0]
        inputs: dict[str, Any] = {}
        try:
            while (following := order.next()) is not None:
                node_id, inputs = following, {}
                if not self._repeat_cached(node_id):
                    self._start(node_id)
                    inputs = self._gather_inputs(node_id)
                    self._run_node(node_id, inputs)
                order.done(node_id)
        except Interrupted:
            self._record("execution_interrupted", self._blame(node_id), broadcast=True)
            return False
        except Exception as error:  # noqa: BLE001  boundary: whatever a node raises becomes a message
            self._record("execution_error", {**self._blame(node_id), **self._explain(error, node_id, inputs)})
            return False
        return True

    def _repeat_cached(self, node_id: str) -> bool:
        entry = self.cache.get(node_id)
        if entry is None:
            return False
        self._tell("executed", {"node": node_id, "display_node": node_id, "output": entry.ui})
        self.progress.finish(node_id)
        return True

    def _start(self, node_id: str) -> None:
        self.progress.start(node_id)
        self.executor.running_node = (self.client_id, node_id)
        self._tell("executing", {"node": node_id, "display_node": node_id})

    def _run_node(self, node_id: str, inputs: dict[str, Any]) -> None:
        context = self._context(node_id)
        context.check_interrupted()
        returned = self.cache.instance(node_id, self._class_of(node_id)).run(context, **inputs)
        result, ui = (returned.result, returned.ui) if isinstance(returned, NodeOutput) else (returned, {})
        if ui:
            self._tell("executed", {"node": node_id, "display_node": node_id, "output": ui})
        meta = {"node_id": node_id, "display_node": node_id, "parent_node": None, "real_node_id": node_id}
        self.cache.put(node_id, CacheEntry(result, ui or None, meta))
        self.progress.finish(node_id)
        self.executed.append(node_id)

    def _context(self, node_id: str) -> NodeContext:
        def report(value: int, maximum: int, picture: Any, full_size: bool) -> None:
            self.progress.report(node_id, value, maximum, picture, full_size)

        options = self.executor.options
        return NodeContext(
            folders=self.executor.folders,
            node_id=node_id,
            prompt=self.graph,
            extra_pnginfo=self.extra_pnginfo,
            previews_enabled=options.previews_enabled,
            metadata_enabled=options.metadata_enabled,
            interrupt_requested=self.executor.interrupt_requested,
            report=report,
        )

    def _gather_inputs(self, node_id: str) -> dict[str, Any]:
        """The declared inputs that the graph gives; links become the values they point at."""
        declared = self._declared_inputs(node_id)
        values = {name: value for name, value in self.graph[node_id]["inputs"].items() if name in declared}
        return {name: self._follow(value) if is_link(value) else value for name, value in values.items()}

    def _follow(self, link: list[Any]) -> Any:
        entry = self.cache.get(link[0])
        assert entry is not None
        return entry.result[link[1]]

    def _declared_inputs(self, node_id: str) -> set[str]:
        declared = self._class_of(node_id).INPUT_TYPES(self.executor.folders)
        return {*declared.get("required", {}), *declared.get("optional", {})}

    def _class_of(self, node_id: str) -> type[Node]:
        return self.executor.classes[self.graph[node_id]["class_type"]]

    def _tell(self, kind: str, data: dict[str, Any]) -> None:
        """To the submitter alone: nobody hears it when the prompt names no client."""
        if self.client_id is not None:
            self.executor.sockets.send(kind, {**data, "prompt_id": self.prompt_id}, self.client_id)

    def _record(self, kind: str, data: dict[str, Any], *, broadcast: bool = False) -> None:
        """Into the history, and to the submitter; with `broadcast` to everybody when the prompt names no client."""
        message = {"prompt_id": self.prompt_id, **data, "timestamp": int(time.time() * 1000)}
        self.messages.append((kind, message))
        if self.client_id is not None or broadcast:
            self.executor.sockets.send(kind, message, self.client_id)

    def _blame(self, node_id: str) -> dict[str, Any]:
        return {"node_id": node_id, "node_type": self.graph[node_id]["class_type"], "executed": list(self.executed)}

    def _explain(self, error: Exception, node_id: str, inputs: dict[str, Any]) -> dict[str, Any]:
        hidden = self._class_of(node_id).INPUT_TYPES(self.executor.folders).get("hidden", {})
        known = {"PROMPT": self.graph, "EXTRA_PNGINFO": self.extra_pnginfo or None}
        shown = {**inputs, **{name: known[kind] for name, kind in hidden.items() if kind in known}}
        return {
            "exception_message": f"{error}\n",
            "exception_type": full_type_name(type(error)),
            "traceback": traceback.format_tb(error.__traceback__),
            "current_inputs": {name: [_show(value)] for name, value in shown.items()},
            "current_outputs": list(self.graph),
        }

    def _history_entry(self, completed: bool) -> dict[str, Any]:
        shown = {node_id: entry for node_id in self.graph if (entry := self.cache.get(node_id)) is not None and entry.ui is not None}
        return {
            "outputs": {node_id: entry.ui for node_id, entry in shown.items()},
            "status": {"status_str": "success" if completed else "error", "completed": completed, "messages": self.messages},
            "meta": {node_id: entry.meta for node_id, entry in shown.items()},
        }


def full_type_name(error: type[BaseException]) -> str:
    """`ValueError`, or `package.module.Name` for one that is not built in."""
    return error.__qualname__ if error.__module__ == "builtins" else f"{error.__module__}.{error.__qualname__}"


def _show(value: Any) -> Any:
    return value if value is None or isinstance(value, int | float | bool | str) else str(value)
