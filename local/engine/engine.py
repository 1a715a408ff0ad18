"""One engine put together: folders, nodes, sockets, queue, executor and the thread that runs prompts."""

import asyncio
import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from local.engine.cache import CacheMode, NodeCache
from local.engine.executor import Executor, ExecutorOptions
from local.engine.folders import ModelFolders
from local.engine.nodes import builtin_nodes, load_nodes
from local.engine.prompt_queue import Prompt, PromptQueue
from local.engine.sockets import Sockets

logger = logging.getLogger("fluxgate.engine")


@dataclass(frozen=True)
class EngineOptions:
    base_directory: Path
    model_directories: Sequence[Path] = ()
    node_modules: Sequence[str] = ()
    cache_mode: CacheMode = "classic"
    cache_size: int = 0
    execution: ExecutorOptions = field(default_factory=ExecutorOptions)


class Engine:
    """Made inside the event loop that serves it."""

    def __init__(self, options: EngineOptions) -> None:
        self.folders = ModelFolders(options.base_directory, options.model_directories)
        self.classes = builtin_nodes()
        for module in options.node_modules:
            self.classes.update(load_nodes(module))
        self.sockets = Sockets(asyncio.get_running_loop())
        self.queue = PromptQueue(self._announce_queue)
        self.executor = Executor(
            self.classes, self.folders, self.sockets, NodeCache(options.cache_mode, options.cache_size), options.execution
        )

    def start(self) -> None:
        """Prepares the folders and begins to run prompts, in a thread that ends with the process."""
        self.folders.prepare()
        threading.Thread(target=self._run_prompts, name="prompts", daemon=True).start()

    def queue_info(self) -> dict[str, Any]:
        return {"exec_info": {"queue_remaining": self.queue.remaining()}}

    def _announce_queue(self) -> None:
        self.sockets.send("status", {"status": self.queue_info()})

    def _run_prompts(self) -> None:
        while True:
            prompt, flags = self.queue.take()
            if prompt is not None:
                self._run_prompt(prompt)
            if flags:
                self.executor.cache.clear()

    def _run_prompt(self, prompt: Prompt) -> None:
        prompt_id = prompt[1]
        try:
            entry = self.executor.execute(prompt)
        except Exception:  # boundary: a fault of the engine itself must not end the only thread that runs prompts
            logger.exception("prompt %s broke the engine", prompt_id)
            entry = {"outputs": {}, "status": {"status_str": "error", "completed": False, "messages": []}, "meta": {}}
        client_id = prompt[3].get("client_id")
        self.queue.finish(entry)
        if client_id is not None:
            # Only now is the history written: this message is what a client may rely on.
            self.sockets.send("executing", {"node": None, "prompt_id": prompt_id}, client_id)
