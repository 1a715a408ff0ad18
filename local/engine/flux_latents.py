"""Nodes between pictures and latents. Inputs are ComfyUI's; the latents lie on the small model's native grid."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from PIL import Image

from local.engine.folders import ModelFolders
from local.engine.nodes import Node, NodeContext

if TYPE_CHECKING:
    from local.tinyflux.codec import Codec
    from local.tinyflux.graph import Latent


class EmptySD3LatentImage(Node):
    CATEGORY = "latent/sd3"
    RETURN_TYPES = ("LATENT",)
    PYTHON_MODULE = "comfy_extras.nodes_sd3"

    @classmethod
    def INPUT_TYPES(cls, folders: ModelFolders) -> dict[str, dict[str, Any]]:
        side = {"default": 1024, "min": 16, "max": 16384, "step": 16}
        batch = {"default": 1, "min": 1, "max": 4096}
        return {"required": {"width": ("INT", side), "height": ("INT", side), "batch_size": ("INT", batch)}}

    def run(self, context: NodeContext, width: int, height: int, batch_size: int) -> tuple[Latent]:
        from local.tinyflux.graph import make_empty_latent

        return (make_empty_latent(width, height, batch_size),)


class EmptyLatentImage(EmptySD3LatentImage):
    CATEGORY = "latent"
    TITLE = "Empty Latent Image"
    PYTHON_MODULE = "nodes"

    @classmethod
    def INPUT_TYPES(cls, folders: ModelFolders) -> dict[str, dict[str, Any]]:
        side = {"default": 512, "min": 16, "max": 16384, "step": 8}
        batch = {"default": 1, "min": 1, "max": 4096}
        return {"required": {"width": ("INT", side), "height": ("INT", side), "batch_size": ("INT", batch)}}


class VAEDecode(Node):
    CATEGORY = "latent"
    RETURN_TYPES = ("IMAGE",)
    TITLE = "VAE Decode"

    @classmethod
    def INPUT_TYPES(cls, folders: ModelFolders) -> dict[str, dict[str, Any]]:
        return {"required": {"samples": ("LATENT", {}), "vae": ("VAE", {})}}

    def run(self, context: NodeContext, samples: Latent, vae: Codec) -> tuple[list[Image.Image]]:
        from local.tinyflux.graph import decode_picture

        pictures = []
        for index in range(len(samples.samples)):
            context.check_interrupted()
            pictures.append(decode_picture(vae, samples.samples[index : index + 1], samples.width_px, samples.height_px))
        return (pictures,)


class VAEEncode(Node):
    CATEGORY = "latent"
    RETURN_TYPES = ("LATENT",)
    TITLE = "VAE Encode"

    @classmethod
    def INPUT_TYPES(cls, folders: ModelFolders) -> dict[str, dict[str, Any]]:
        return {"required": {"pixels": ("IMAGE",), "vae": ("VAE",)}}

    def run(self, context: NodeContext, pixels: list[Image.Image], vae: Codec) -> tuple[Latent]:
        from local.tinyflux.graph import encode_pictures

        return (encode_pictures(vae, pixels),)


class SetLatentNoiseMask(Node):
    CATEGORY = "latent/inpaint"
    RETURN_TYPES = ("LATENT",)
    TITLE = "Set Latent Noise Mask"

    @classmethod
    def INPUT_TYPES(cls, folders: ModelFolders) -> dict[str, dict[str, Any]]:
        return {"required": {"samples": ("LATENT",), "mask": ("MASK",)}}

    def run(self, context: NodeContext, samples: Latent, mask: list[Image.Image]) -> tuple[Latent]:
        from local.tinyflux.graph import mask_latent

        return (mask_latent(samples, mask),)


class RepeatLatentBatch(Node):
    CATEGORY = "latent/batch"
    RETURN_TYPES = ("LATENT",)
    TITLE = "Repeat Latent Batch"

    @classmethod
    def INPUT_TYPES(cls, folders: ModelFolders) -> dict[str, dict[str, Any]]:
        return {"required": {"samples": ("LATENT",), "amount": ("INT", {"default": 1, "min": 1, "max": 64})}}

    def run(self, context: NodeContext, samples: Latent, amount: int) -> tuple[Latent]:
        from local.tinyflux.graph import repeat_latent

        return (repeat_latent(samples, amount),)


LATENT_NODES: dict[str, type[Node]] = {
    node.__name__: node for node in (EmptySD3LatentImage, EmptyLatentImage, VAEDecode, VAEEncode, SetLatentNoiseMask, RepeatLatentBatch)
}
