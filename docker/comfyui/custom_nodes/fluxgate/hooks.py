"""Where ComfyUI's own functions are wrapped: the executor for timings, model loading, and what frees models.
Each function here puts in one feature or raises HostLacks; what it wraps behaves as before."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

from . import host
from .heap import Heap
from .timing import PromptTimings


def time_prompts(timings: PromptTimings) -> None:
    """The executor is told the prompt's id as its second argument."""

    def wrap(execute: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(execute)
        def timed(executor: Any, prompt: Any, prompt_id: Any, *args: Any, **kwargs: Any) -> Any:
            with timings.time_prompt(str(prompt_id)):
                return execute(executor, prompt, prompt_id, *args, **kwargs)

        return timed

    host.replace_attribute("execution", "PromptExecutor.execute", wrap)


def time_nodes(timings: PromptTimings) -> None:
    """A node whose work goes on in an asyncio task is timed up to its first wait only."""
    names: dict[type, str] = {}

    def wrap(run_node: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(run_node)
        async def timed(prompt_id: Any, node_id: Any, node: Any, *args: Any, **kwargs: Any) -> Any:
            node_class = node if isinstance(node, type) else type(node)
            with timings.time_node(str(node_id), name_class(node_class, names)):
                if not is_loader(node_class):
                    return await run_node(prompt_id, node_id, node, *args, **kwargs)
                with timings.time_load():
                    return await run_node(prompt_id, node_id, node, *args, **kwargs)

        return timed

    host.replace_attribute("execution", "get_output_data", wrap)


def name_class(node_class: type, names: dict[type, str]) -> str:
    """The `class_type` of graphs, which is not always the name of the Python class."""
    if node_class not in names:
        mappings: Mapping[str, type] = host.find_attribute("nodes", "NODE_CLASS_MAPPINGS")
        names.update({found: class_type for class_type, found in mappings.items()})
    return names.setdefault(node_class, node_class.__name__)


def is_loader(node_class: type) -> bool:
    """Loaders of models live in the menu under `loaders` (`advanced/loaders`, `loaders/video_models`); LoadImage does not."""
    return "loaders" in str(getattr(node_class, "CATEGORY", "")).split("/")


def time_loads(timings: PromptTimings) -> None:
    """Moving weights to the device, inside whichever node needs them first."""

    def wrap(load: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(load)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with timings.time_load():
                return load(*args, **kwargs)

        return timed

    host.replace_attribute("comfy.model_management", "load_models_gpu", wrap)


def thaw_when_models_go(heap: Heap) -> None:
    """A model in a dead cycle is freed only by a collection that can see it: after /free {free_memory}, or when ComfyUI finds it dead."""

    def wrap_reset(reset: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(reset)
        def resetting(*args: Any, **kwargs: Any) -> Any:
            heap.thaw()
            return reset(*args, **kwargs)

        return resetting

    def wrap_cleanup(cleanup: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(cleanup)
        def cleaning(*args: Any, **kwargs: Any) -> Any:
            if host.has_dead_models():
                heap.thaw()
            return cleanup(*args, **kwargs)

        return cleaning

    host.has_dead_models()  # raises here, once, rather than in every prompt
    host.replace_attribute("execution", "PromptExecutor.reset", wrap_reset)
    host.replace_attribute("comfy.model_management", "cleanup_models_gc", wrap_cleanup)


def freeze_when_up(heap: Heap) -> None:
    """The application starts after all extensions were loaded and before the first request."""

    async def freeze(_app: Any) -> None:
        heap.start()

    host.find_attribute("server", "PromptServer.instance.app").on_startup.append(freeze)
