"""From noise to latents: the native grid of a picture size, the noise of a seed, and the solvers of the flow.

A solver sees a function that predicts velocities; it knows no network, text or picture.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from local.tinyflux.grid import LATENT_CHANNELS

Velocity = Callable[[Tensor, Tensor], Tensor]  # latents (batch, 16, h, w), sigma () -> noise - picture, same shape
OnStep = Callable[[int, int, Tensor], None]  # step counted from 1, steps, the picture's latents as predicted now
Solver = Callable[[Velocity, Tensor, Tensor, OnStep], Tensor]  # velocity, start, sigmas, on_step -> latents

NATIVE_PX = 128  # side of the native square; other aspect ratios keep its area


def native_grid(width_px: int, height_px: int) -> tuple[int, int]:
    """Latent height and width, both even, of the picture that is resized to this size."""
    aspect = (width_px / height_px) ** 0.5
    pairs = NATIVE_PX / 16
    return max(4, round(pairs / aspect) * 2), max(4, round(pairs * aspect) * 2)


def draw_noise(seed: int, count: int, height: int, width: int) -> Tensor:
    """(count, 16, height, width) in one draw; picture i does not depend on count, because the values come in order."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, LATENT_CHANNELS, height, width, generator=generator)


def mix_noise(noise: Tensor, latents: Tensor, sigma: Tensor) -> Tensor:
    """The point on the straight line between a picture (sigma 0) and noise (sigma 1)."""
    return sigma * noise + (1 - sigma) * latents


def solve_euler(velocity: Velocity, start: Tensor, sigmas: Tensor, on_step: OnStep) -> Tensor:
    x, steps = start, len(sigmas) - 1
    for step in range(steps):
        v = velocity(x, sigmas[step])
        on_step(step + 1, steps, x - sigmas[step] * v)
        x = x + (sigmas[step + 1] - sigmas[step]) * v
    return x


def solve_heun(velocity: Velocity, start: Tensor, sigmas: Tensor, on_step: OnStep) -> Tensor:
    """Euler with a second look at the step's end; the last step, which ends at sigma 0, is plain Euler."""
    x, steps = start, len(sigmas) - 1
    for step in range(steps):
        v = velocity(x, sigmas[step])
        on_step(step + 1, steps, x - sigmas[step] * v)
        stride = sigmas[step + 1] - sigmas[step]
        if sigmas[step + 1] > 0:
            v = (v + velocity(x + stride * v, sigmas[step + 1])) / 2
        x = x + stride * v
    return x


def solve_dpmpp_2m(velocity: Velocity, start: Tensor, sigmas: Tensor, on_step: OnStep) -> Tensor:
    """DPM-Solver++(2M): one prediction per step, the previous one reused (Lu et al. 2022, algorithm 2)."""
    x, steps = start, len(sigmas) - 1
    log_sigmas = sigmas.log()
    previous: Tensor | None = None
    for step in range(steps):
        picture = x - sigmas[step] * velocity(x, sigmas[step])
        on_step(step + 1, steps, picture)
        stride = log_sigmas[step] - log_sigmas[step + 1]
        aim = picture
        if previous is not None and sigmas[step + 1] > 0:
            ratio = stride / (log_sigmas[step - 1] - log_sigmas[step]) / 2
            aim = (1 + ratio) * picture - ratio * previous
        x = sigmas[step + 1] / sigmas[step] * x - torch.expm1(-stride) * aim
        previous = picture
    return x


SOLVERS: dict[str, Solver] = {"euler": solve_euler, "ddim": solve_euler, "heun": solve_heun, "dpmpp_2m": solve_dpmpp_2m}


def choose_solver(name: str) -> Solver:
    """The solver of a ComfyUI sampler name; `ddim` is Euler there too."""
    if name not in SOLVERS:
        raise ValueError(f"sampler {name!r} is not implemented by the built-in small model; it has {', '.join(SOLVERS)}")
    return SOLVERS[name]
