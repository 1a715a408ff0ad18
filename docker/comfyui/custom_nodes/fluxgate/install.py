"""Puts every part into the running ComfyUI, each on its own: a part that does not fit this version is left out with one line in the log."""

from __future__ import annotations

import logging
from collections.abc import Callable

from . import hooks, host
from .heap import Heap
from .routes import Companion
from .save_image import FluxgateSaveImage
from .timing import PromptTimings
from .writes import WriteQueue

log = logging.getLogger(__name__)


def install() -> tuple[dict[str, type], dict[str, str]]:
    """The node classes and their names in the menu, as ComfyUI asks for them."""
    timings, writes = PromptTimings(), WriteQueue()
    heap = Heap(timings.is_idle)
    companion = Companion(heap, timings, writes)
    parts: dict[str, Callable[[], None]] = {
        "prompt_timing": lambda: hooks.time_prompts(timings),
        "node_timing": lambda: hooks.time_nodes(timings),
        "load_timing": lambda: hooks.time_loads(timings),
        "heap_thaw": lambda: hooks.thaw_when_models_go(heap),
        "heap_freeze": lambda: hooks.freeze_when_up(heap),
        "routes": lambda: companion.add_routes(host.find_attribute("server", "PromptServer.instance.routes")),
    }
    companion.features.update({name: fits(name, part) for name, part in parts.items()})
    # Without the thaw a frozen model in a dead cycle would keep its memory for ever; the start-up heap holds no model.
    heap.may_refreeze = companion.features["prompt_timing"] and companion.features["heap_thaw"]
    if not companion.features["routes"]:
        return {}, {}  # without its route nobody can tell a failed write from a missing one, so the node stays away
    companion.features["save_image"] = True
    FluxgateSaveImage.writes = writes
    return {"FluxgateSaveImage": FluxgateSaveImage}, {"FluxgateSaveImage": "Save Image (Fluxgate)"}


def fits(name: str, part: Callable[[], None]) -> bool:
    try:
        part()
    except Exception as error:  # noqa: BLE001  # boundary: another ComfyUI may differ in any way, and must start all the same
        log.warning("fluxgate: %s is off: %s", name, error)
        return False
    return True
