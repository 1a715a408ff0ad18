"""Loader nodes: file names become a MODEL, CLIP or VAE of the built-in small model. Inputs are ComfyUI's.

torch is imported when a node runs, so that an engine lists its nodes at once.
"""

from __future__ import annotations

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

from local.engine.folders import ModelFolders
from local.engine.nodes import Node, NodeContext

if TYPE_CHECKING:
    from local.tinyflux.codec import Codec
    from local.tinyflux.conditioning import TextEncoders
    from local.tinyflux.graph import Model

logger = logging.getLogger(__name__)

WEIGHT_DTYPES = {"default": None, "fp8_e4m3fn": "float8_e4m3fn", "fp8_e4m3fn_fast": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2"}
CLIP_TYPES = ["sdxl", "sd3", "flux", "hunyuan_video", "hidream", "hunyuan_image"]
STRENGTH = ("FLOAT", {"default": 1.0, "min": -100.0, "max": 100.0, "step": 0.01})


def warm_up() -> None:
    """Import now what the nodes import when they first run: torch takes seconds, and nobody waits yet."""
    try:
        import_module("local.tinyflux.weights")
        import_module("local.tinyflux.conditioning")
        import_module("local.tinyflux.sampling")
    except ImportError as error:
        logger.warning("the model's own nodes will fail here: %s", error)


class UNETLoader(Node):
    CATEGORY = "advanced/loaders"
    RETURN_TYPES = ("MODEL",)
    TITLE = "Load Diffusion Model"

    @classmethod
    def INPUT_TYPES(cls, folders: ModelFolders) -> dict[str, dict[str, Any]]:
        return {"required": {"unet_name": (folders.names("diffusion_models"),), "weight_dtype": (list(WEIGHT_DTYPES),)}}

    def run(self, context: NodeContext, unet_name: str, weight_dtype: str) -> tuple[Model]:
        import torch

        from local.tinyflux.graph import Model
        from local.tinyflux.weights import load_transformer

        dtype_name = WEIGHT_DTYPES[weight_dtype]
        path = context.folders.path("diffusion_models", unet_name)
        return (Model(load_transformer(path, getattr(torch, dtype_name) if dtype_name else None)),)


class DualCLIPLoader(Node):
    CATEGORY = "advanced/loaders"
    RETURN_TYPES = ("CLIP",)

    @classmethod
    def INPUT_TYPES(cls, folders: ModelFolders) -> dict[str, dict[str, Any]]:
        files = folders.names("text_encoders")
        return {
            "required": {"clip_name1": (files,), "clip_name2": (files,), "type": (CLIP_TYPES,)},
            "optional": {"device": (["default", "cpu"], {"advanced": True})},
        }

    def run(self, context: NodeContext, clip_name1: str, clip_name2: str, type: str, device: str = "default") -> tuple[TextEncoders]:
        from local.tinyflux.graph import pair_text_encoders

        if type != "flux":
            raise ValueError(f"type {type!r} is not implemented by the built-in small model; it has 'flux'")
        folder = "text_encoders"
        return (pair_text_encoders(context.folders.path(folder, clip_name1), context.folders.path(folder, clip_name2)),)


class VAELoader(Node):
    CATEGORY = "loaders"
    RETURN_TYPES = ("VAE",)
    TITLE = "Load VAE"

    @classmethod
    def INPUT_TYPES(cls, folders: ModelFolders) -> dict[str, dict[str, Any]]:
        return {"required": {"vae_name": (folders.names("vae"),)}}

    def run(self, context: NodeContext, vae_name: str) -> tuple[Codec]:
        from local.tinyflux.weights import load_codec

        return (load_codec(context.folders.path("vae", vae_name)),)


class LoraLoaderModelOnly(Node):
    CATEGORY = "loaders"
    RETURN_TYPES = ("MODEL",)
    TITLE = "Load LoRA"

    @classmethod
    def INPUT_TYPES(cls, folders: ModelFolders) -> dict[str, dict[str, Any]]:
        return {"required": {"model": ("MODEL",), "lora_name": (folders.names("loras"),), "strength_model": STRENGTH}}

    def run(self, context: NodeContext, model: Model, lora_name: str, strength_model: float) -> tuple[Model]:
        return (add_lora(context, model, lora_name, strength_model),)


class LoraLoader(Node):
    CATEGORY = "loaders"
    RETURN_TYPES = ("MODEL", "CLIP")
    TITLE = "Load LoRA (Model and CLIP)"
    DESCRIPTION = "The small model's text encoders take no LoRA: CLIP passes as it is."

    @classmethod
    def INPUT_TYPES(cls, folders: ModelFolders) -> dict[str, dict[str, Any]]:
        return {
            "required": {
                "model": ("MODEL", {}),
                "clip": ("CLIP", {}),
                "lora_name": (folders.names("loras"), {}),
                "strength_model": STRENGTH,
                "strength_clip": STRENGTH,
            }
        }

    def run(
        self, context: NodeContext, model: Model, clip: TextEncoders, lora_name: str, strength_model: float, strength_clip: float
    ) -> tuple[Model, TextEncoders]:
        return add_lora(context, model, lora_name, strength_model), clip


def add_lora(context: NodeContext, model: Model, name: str, strength: float) -> Model:
    """Read and match the file now, so that a broken one fails at its own node; strength 0 does not even open it, as in ComfyUI."""
    from local.tinyflux.weights import load_lora

    if strength == 0:
        return model
    lora = load_lora(context.folders.path("loras", name), model.transformer)
    for key in lora.unknown_keys:
        logger.warning("lora key not loaded: %s", key)
    return model.with_lora(lora, strength)


LOADER_NODES: dict[str, type[Node]] = {
    node.__name__: node for node in (UNETLoader, DualCLIPLoader, VAELoader, LoraLoaderModelOnly, LoraLoader)
}
