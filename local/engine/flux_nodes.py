"""The node classes that run the built-in small model, by the names ComfyUI gives them."""

from local.engine.flux_conditioning import CONDITIONING_NODES
from local.engine.flux_latents import LATENT_NODES
from local.engine.flux_loaders import LOADER_NODES
from local.engine.flux_sampling import SAMPLING_NODES
from local.engine.nodes import Node

FLUX_NODES: dict[str, type[Node]] = {**LOADER_NODES, **CONDITIONING_NODES, **LATENT_NODES, **SAMPLING_NODES}
