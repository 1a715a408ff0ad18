"""Nodes that turn noise into latents, step by step. Inputs are ComfyUI's, names that the small model lacks included."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from local.engine.folders import ModelFolders
from local.engine.nodes import Node, NodeContext

if TYPE_CHECKING:
    from torch import Tensor

    from local.tinyflux.conditioning import Conditioning
    from local.tinyflux.graph import GraphGuider, Latent, Model
    from local.tinyflux.sampling import Solver

# A real instance offers all of these; choosing one that is not implemented fails when the node runs, and names those that are.
# fmt: off
SAMPLER_NAMES = [
    "euler", "euler_cfg_pp", "euler_ancestral", "euler_ancestral_cfg_pp", "heun", "heunpp2", "dpm_2", "dpm_2_ancestral", "lms",
    "dpm_fast", "dpm_adaptive", "dpmpp_2s_ancestral", "dpmpp_2s_ancestral_cfg_pp", "dpmpp_sde", "dpmpp_sde_gpu", "dpmpp_2m",
    "dpmpp_2m_cfg_pp", "dpmpp_2m_sde", "dpmpp_2m_sde_gpu", "dpmpp_2m_sde_heun", "dpmpp_2m_sde_heun_gpu", "dpmpp_3m_sde",
    "dpmpp_3m_sde_gpu", "ddpm", "lcm", "ipndm", "ipndm_v", "deis", "res_multistep", "res_multistep_cfg_pp", "res_multistep_ancestral",
    "res_multistep_ancestral_cfg_pp", "gradient_estimation", "gradient_estimation_cfg_pp", "er_sde", "seeds_2", "seeds_3", "sa_solver",
    "sa_solver_pece", "ddim", "uni_pc", "uni_pc_bh2",
]
# fmt: on
SCHEDULER_NAMES = ["simple", "sgm_uniform", "karras", "exponential", "ddim_uniform", "beta", "normal", "linear_quadratic", "kl_optimal"]

SEED = {"default": 0, "min": 0, "max": 2**64 - 1, "control_after_generate": True}
STEPS = {"default": 20, "min": 1, "max": 10000}
CFG = {"default": 8.0, "min": 0.0, "max": 100.0, "step": 0.1, "round": 0.01}
DENOISE = {"default": 1.0, "min": 0.0, "max": 1.0, "step": 0.01}


class RandomNoise(Node):
    CATEGORY = "sampling/custom_sampling/noise"
    RETURN_TYPES = ("NOISE",)
    PYTHON_MODULE = "comfy_extras.nodes_custom_sampler"

    @classmethod
    def INPUT_TYPES(cls, folders: ModelFolders) -> dict[str, dict[str, Any]]:
        return {"required": {"noise_seed": ("INT", SEED)}}

    def run(self, context: NodeContext, noise_seed: int) -> tuple[int]:
        return (noise_seed,)


class KSamplerSelect(Node):
    CATEGORY = "sampling/custom_sampling/samplers"
    RETURN_TYPES = ("SAMPLER",)
    PYTHON_MODULE = "comfy_extras.nodes_custom_sampler"

    @classmethod
    def INPUT_TYPES(cls, folders: ModelFolders) -> dict[str, dict[str, Any]]:
        return {"required": {"sampler_name": (SAMPLER_NAMES,)}}

    def run(self, context: NodeContext, sampler_name: str) -> tuple[Solver]:
        from local.tinyflux.sampling import choose_solver

        return (choose_solver(sampler_name),)


class BasicScheduler(Node):
    CATEGORY = "sampling/custom_sampling/schedulers"
    RETURN_TYPES = ("SIGMAS",)
    PYTHON_MODULE = "comfy_extras.nodes_custom_sampler"

    @classmethod
    def INPUT_TYPES(cls, folders: ModelFolders) -> dict[str, dict[str, Any]]:
        return {"required": {"model": ("MODEL",), "scheduler": (SCHEDULER_NAMES,), "steps": ("INT", STEPS), "denoise": ("FLOAT", DENOISE)}}

    def run(self, context: NodeContext, model: Model, scheduler: str, steps: int, denoise: float) -> tuple[Tensor]:
        from local.tinyflux.schedules import plan_sigmas

        return (plan_sigmas(scheduler, steps, denoise, model.shift),)


class BasicGuider(Node):
    CATEGORY = "sampling/custom_sampling/guiders"
    RETURN_TYPES = ("GUIDER",)
    PYTHON_MODULE = "comfy_extras.nodes_custom_sampler"

    @classmethod
    def INPUT_TYPES(cls, folders: ModelFolders) -> dict[str, dict[str, Any]]:
        return {"required": {"model": ("MODEL",), "conditioning": ("CONDITIONING",)}}

    def run(self, context: NodeContext, model: Model, conditioning: Conditioning) -> tuple[GraphGuider]:
        from local.tinyflux.graph import GraphGuider

        return (GraphGuider(model, conditioning),)


class CFGGuider(Node):
    CATEGORY = "sampling/custom_sampling/guiders"
    RETURN_TYPES = ("GUIDER",)
    PYTHON_MODULE = "comfy_extras.nodes_custom_sampler"

    @classmethod
    def INPUT_TYPES(cls, folders: ModelFolders) -> dict[str, dict[str, Any]]:
        conditioning = ("CONDITIONING",)
        return {"required": {"model": ("MODEL",), "positive": conditioning, "negative": conditioning, "cfg": ("FLOAT", CFG)}}

    def run(self, context: NodeContext, model: Model, positive: Conditioning, negative: Conditioning, cfg: float) -> tuple[GraphGuider]:
        from local.tinyflux.graph import GraphGuider

        return (GraphGuider(model, positive, negative, cfg),)


class SamplerCustomAdvanced(Node):
    CATEGORY = "sampling/custom_sampling"
    RETURN_TYPES = ("LATENT", "LATENT")
    RETURN_NAMES = ("output", "denoised_output")
    PYTHON_MODULE = "comfy_extras.nodes_custom_sampler"

    @classmethod
    def INPUT_TYPES(cls, folders: ModelFolders) -> dict[str, dict[str, Any]]:
        return {
            "required": {
                "noise": ("NOISE",),
                "guider": ("GUIDER",),
                "sampler": ("SAMPLER",),
                "sigmas": ("SIGMAS",),
                "latent_image": ("LATENT",),
            }
        }

    def run(
        self, context: NodeContext, noise: int, guider: GraphGuider, sampler: Solver, sigmas: Tensor, latent_image: Latent
    ) -> tuple[Latent, Latent]:
        return sample_watched(context, guider, sampler, sigmas, latent_image, noise)


class KSampler(Node):
    CATEGORY = "sampling"
    RETURN_TYPES = ("LATENT",)

    @classmethod
    def INPUT_TYPES(cls, folders: ModelFolders) -> dict[str, dict[str, Any]]:
        return {
            "required": {
                "model": ("MODEL", {}),
                "seed": ("INT", SEED),
                "steps": ("INT", STEPS),
                "cfg": ("FLOAT", CFG),
                "sampler_name": (SAMPLER_NAMES, {}),
                "scheduler": (SCHEDULER_NAMES, {}),
                "positive": ("CONDITIONING", {}),
                "negative": ("CONDITIONING", {}),
                "latent_image": ("LATENT", {}),
                "denoise": ("FLOAT", DENOISE),
            }
        }

    def run(
        self,
        context: NodeContext,
        model: Model,
        seed: int,
        steps: int,
        cfg: float,
        sampler_name: str,
        scheduler: str,
        positive: Conditioning,
        negative: Conditioning,
        latent_image: Latent,
        denoise: float = 1.0,
    ) -> tuple[Latent]:
        from local.tinyflux.graph import GraphGuider
        from local.tinyflux.sampling import choose_solver
        from local.tinyflux.schedules import plan_sigmas

        sigmas = plan_sigmas(scheduler, steps, denoise, model.shift)
        guider = GraphGuider(model, positive, negative, cfg)
        return (sample_watched(context, guider, choose_solver(sampler_name), sigmas, latent_image, seed)[0],)


def sample_watched(
    context: NodeContext, guider: GraphGuider, solver: Solver, sigmas: Tensor, latent: Latent, seed: int
) -> tuple[Latent, Latent]:
    """Sample, tell each step, and stop between two network passes when the prompt is interrupted."""
    from local.tinyflux.graph import preview_picture, sample

    def tell(step: int, steps: int, predicted: Tensor) -> None:
        context.progress(step, steps, preview_picture(predicted) if context.previews_enabled else None)

    return sample(guider, solver, sigmas, latent, seed, tell, context.check_interrupted)


SAMPLING_NODES: dict[str, type[Node]] = {
    node.__name__: node for node in (RandomNoise, KSamplerSelect, BasicScheduler, BasicGuider, CFGGuider, SamplerCustomAdvanced, KSampler)
}
