"""`python -m bench.chaos.engine`: the built-in engine with a node that ticks, and a journal of every prompt it begins and ends.

The journal outlives the engine: what it did before it was killed still counts.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import time
from pathlib import Path
from typing import Any, NamedTuple

from aiohttp import web
from PIL import Image

from local.engine.engine import Engine, EngineOptions
from local.engine.executor import Executor, ExecutorOptions
from local.engine.folders import ModelFolders
from local.engine.nodes import Node, NodeContext
from local.engine.prompt_queue import Prompt
from local.engine.server import create_app


class ChaosTicks(Node):
    """Hands its picture on after `ticks` pauses, telling each; it uses no CPU."""

    CATEGORY = "bench"
    RETURN_TYPES = ("IMAGE",)

    @classmethod
    def INPUT_TYPES(cls, folders: ModelFolders) -> dict[str, dict[str, Any]]:
        return {
            "required": {"image": ("IMAGE",), "ticks": ("INT", {"default": 3, "min": 1}), "tick_ms": ("INT", {"default": 50, "min": 0})}
        }

    @classmethod
    def fingerprint(cls, folders: ModelFolders, *args: Any, **inputs: Any) -> object:
        return float("nan")  # a cached result would take no time

    def run(self, context: NodeContext, image: list[Image.Image], ticks: int, tick_ms: int) -> tuple[list[Image.Image]]:
        for tick in range(1, ticks + 1):
            time.sleep(tick_ms / 1000)
            context.progress(tick, ticks)
        return (image,)


NODES: dict[str, type[Node]] = {"ChaosTicks": ChaosTicks}


class Entry(NamedTuple):
    """One line of a journal. `word` is `start`, or how it ended: `success`, `error`."""

    word: str
    prompt_id: str
    job_id: str


def read_journal(path: Path) -> list[Entry]:
    if not path.exists():
        return []
    # A line that a kill cut short has no newline; the write is one call, so that was not seen yet.
    return [Entry(*line.split()) for line in path.read_text().splitlines()]


class JournaledExecutor(Executor):
    """Writes a line before a prompt begins and one after it ended."""

    journal: Path

    def execute(self, prompt: Prompt) -> dict[str, Any]:
        self._write("start", prompt)
        entry = super().execute(prompt)
        self._write(entry["status"]["status_str"], prompt)
        return entry

    def _write(self, word: str, prompt: Prompt) -> None:
        prefixes = [node["inputs"]["filename_prefix"] for node in prompt[2].values() if "filename_prefix" in node["inputs"]]
        with self.journal.open("a") as file:
            file.write(f"{word} {prompt[1]} {prefixes[0].partition('/')[0]}\n")


async def serve(port: int, folder: Path, journal: Path) -> None:
    engine = Engine(EngineOptions(folder, node_modules=["bench.chaos.engine"], execution=ExecutorOptions()))
    old = engine.executor
    engine.executor = JournaledExecutor(old.classes, old.folders, old.sockets, old.cache, old.options)
    engine.executor.journal = journal
    engine.start()
    runner = web.AppRunner(create_app(engine), access_log=None, handle_signals=False)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    await engine.sockets.publish()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.chaos.engine")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--base-directory", type=Path, required=True)
    parser.add_argument("--journal", type=Path, required=True)
    arguments = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    asyncio.run(serve(arguments.port, arguments.base_directory, arguments.journal))


if __name__ == "__main__":
    main()
