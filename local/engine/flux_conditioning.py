"""Nodes between a text and the sampler: encoding, guidance, the schedule's shift. Inputs are ComfyUI's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from local.engine.folders import ModelFolders
from local.engine.nodes import Node, NodeContext

if TYPE_CHECKING:
    from PIL import Image

    from local.tinyflux.codec import Codec
    from local.tinyflux.conditioning import Conditioning, TextEncoders
    from local.tinyflux.graph import Latent, Model

SHIFT_RANGE = {"min": 0.0, "max": 100.0, "step": 0.01}


class CLIPTextEncode(Node):
    CATEGORY = "conditioning"
    RETURN_TYPES = ("CONDITIONING",)
    TITLE = "CLIP Text Encode (Prompt)"

    @classmethod
    def INPUT_TYPES(cls, folders: ModelFolders) -> dict[str, dict[str, Any]]:
        return {"required": {"text": ("STRING", {"multiline": True, "dynamicPrompts": True}), "clip": ("CLIP", {})}}

    def run(self, context: NodeContext, text: str, clip: TextEncoders) -> tuple[Conditioning]:
        from local.tinyflux.graph import encode_text

        return (encode_text(clip, text),)


class FluxGuidance(Node):
    CATEGORY = "advanced/conditioning/flux"
    RETURN_TYPES = ("CONDITIONING",)
    PYTHON_MODULE = "comfy_extras.nodes_flux"

    @classmethod
    def INPUT_TYPES(cls, folders: ModelFolders) -> dict[str, dict[str, Any]]:
        guidance = ("FLOAT", {"default": 3.5, "min": 0.0, "max": 100.0, "step": 0.1})
        return {"required": {"conditioning": ("CONDITIONING", {}), "guidance": guidance}}

    def run(self, context: NodeContext, conditioning: Conditioning, guidance: float) -> tuple[Conditioning]:
        return (conditioning.guided(guidance),)


class ConditioningZeroOut(Node):
    CATEGORY = "advanced/conditioning"
    RETURN_TYPES = ("CONDITIONING",)

    @classmethod
    def INPUT_TYPES(cls, folders: ModelFolders) -> dict[str, dict[str, Any]]:
        return {"required": {"conditioning": ("CONDITIONING",)}}

    def run(self, context: NodeContext, conditioning: Conditioning) -> tuple[Conditioning]:
        return (conditioning.emptied(),)


class ModelSamplingFlux(Node):
    CATEGORY = "advanced/model"
    RETURN_TYPES = ("MODEL",)
    PYTHON_MODULE = "comfy_extras.nodes_model_advanced"

    @classmethod
    def INPUT_TYPES(cls, folders: ModelFolders) -> dict[str, dict[str, Any]]:
        side = {"default": 1024, "min": 16, "max": 16384, "step": 8}
        return {
            "required": {
                "model": ("MODEL",),
                "max_shift": ("FLOAT", {"default": 1.15, **SHIFT_RANGE}),
                "base_shift": ("FLOAT", {"default": 0.5, **SHIFT_RANGE}),
                "width": ("INT", side),
                "height": ("INT", side),
            }
        }

    def run(self, context: NodeContext, model: Model, max_shift: float, base_shift: float, width: int, height: int) -> tuple[Model]:
        from local.tinyflux.schedules import shift_for_size

        return (model.with_shift(shift_for_size(width, height, max_shift, base_shift)),)


class DifferentialDiffusion(Node):
    CATEGORY = "_for_testing"
    RETURN_TYPES = ("MODEL",)
    TITLE = "Differential Diffusion"
    PYTHON_MODULE = "comfy_extras.nodes_differential_diffusion"

    @classmethod
    def INPUT_TYPES(cls, folders: ModelFolders) -> dict[str, dict[str, Any]]:
        strength = ("FLOAT", {"default": 1.0, "min": 0.0, "max": 1.0, "step": 0.01})
        return {"required": {"model": ("MODEL", {})}, "optional": {"strength": strength}}

    def run(self, context: NodeContext, model: Model, strength: float = 1.0) -> tuple[Model]:
        return (model.with_soft_masks() if strength else model,)


class InpaintModelConditioning(Node):
    """The small model takes no picture beside its noise: as with every model that is none of Fill's, the mask alone counts."""

    CATEGORY = "conditioning/inpaint"
    RETURN_TYPES = ("CONDITIONING", "CONDITIONING", "LATENT")
    RETURN_NAMES = ("positive", "negative", "latent")

    @classmethod
    def INPUT_TYPES(cls, folders: ModelFolders) -> dict[str, dict[str, Any]]:
        conditioning = ("CONDITIONING",)
        return {
            "required": {
                "positive": conditioning,
                "negative": conditioning,
                "vae": ("VAE",),
                "pixels": ("IMAGE",),
                "mask": ("MASK",),
                "noise_mask": ("BOOLEAN", {"default": True}),
            }
        }

    def run(
        self,
        context: NodeContext,
        positive: Conditioning,
        negative: Conditioning,
        vae: Codec,
        pixels: list[Image.Image],
        mask: list[Image.Image],
        noise_mask: bool = True,
    ) -> tuple[Conditioning, Conditioning, Latent]:
        from local.tinyflux.graph import encode_pictures, mask_latent

        latent = encode_pictures(vae, pixels)
        return positive, negative, mask_latent(latent, mask) if noise_mask else latent


CONDITIONING_NODES: dict[str, type[Node]] = {
    node.__name__: node
    for node in (
        CLIPTextEncode,
        FluxGuidance,
        ConditioningZeroOut,
        ModelSamplingFlux,
        DifferentialDiffusion,
        InpaintModelConditioning,
    )
}
