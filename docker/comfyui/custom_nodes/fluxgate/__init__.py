"""The companion of Fluxgate inside ComfyUI: a frozen heap, pictures written beside the next run, timings and tidying over HTTP.
Optional: a ComfyUI without it serves the gateway as before."""

from .install import install

NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS = install()

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
