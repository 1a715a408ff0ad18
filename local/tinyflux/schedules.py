"""Sigmas: how much noise is left before each step, from 1 (noise) to 0 (picture).

The named schedules follow ComfyUI's for Flux: a table of 10 000 shifted times, read in one of several rhythms.
"""

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

TABLE_SIZE = 10_000
FLUX_SHIFT = 1.15  # ComfyUI's for Flux without a ModelSamplingFlux node; exp(1.15) = 3.16, and the model was trained with 3
TRAINED_SHIFT = 3.0


def shift_time(time: Tensor, shift: float) -> Tensor:
    """Move times in 0..1 towards the noise; shift is the exponent mu."""
    return math.exp(shift) / (math.exp(shift) + (1 / time - 1))


@lru_cache(maxsize=16)
def sigma_table(shift: float) -> Tensor:
    """(10000,) sigmas in rising order; the last one is 1."""
    return shift_time(torch.arange(1, TABLE_SIZE + 1) / TABLE_SIZE, shift)


def shift_for_size(width_px: int, height_px: int, max_shift: float, base_shift: float) -> float:
    """The ModelSamplingFlux node's rule: base_shift at 256 tokens of 16x16 px, max_shift at 4096, a line through both."""
    slope = (max_shift - base_shift) / (4096 - 256)
    return width_px * height_px / 256 * slope + base_shift - 256 * slope


def end_at_zero(sigmas: list[float]) -> Tensor:
    return torch.tensor([*sigmas, 0.0])


def plan_simple(shift: float, steps: int) -> Tensor:
    table = sigma_table(shift)
    stride = len(table) / steps
    return end_at_zero([float(table[-(1 + int(step * stride))]) for step in range(steps)])


def plan_normal(shift: float, steps: int) -> Tensor:
    times = torch.linspace(1.0, float(sigma_table(shift)[0]), steps)
    return end_at_zero([float(shift_time(time, shift)) for time in times])


def plan_sgm_uniform(shift: float, steps: int) -> Tensor:
    times = torch.linspace(1.0, float(sigma_table(shift)[0]), steps + 1)[:-1]
    return end_at_zero([float(shift_time(time, shift)) for time in times])


def plan_ddim_uniform(shift: float, steps: int) -> Tensor:
    """May give a step more than asked, as ComfyUI's does."""
    table = sigma_table(shift)
    return end_at_zero(table[1 :: max(len(table) // steps, 1)].tolist()[::-1])


def plan_karras(shift: float, steps: int) -> Tensor:
    lowest, rho = float(sigma_table(shift)[0]), 7.0
    ramp = torch.linspace(0, 1, steps)
    return end_at_zero(((1 + ramp * (lowest ** (1 / rho) - 1)) ** rho).tolist())


def plan_exponential(shift: float, steps: int) -> Tensor:
    lowest = float(sigma_table(shift)[0])
    return end_at_zero(torch.linspace(0.0, math.log(lowest), steps).exp().tolist())


@lru_cache(maxsize=1)
def half_beta_curve(points: int = 20_001) -> tuple[np.ndarray, np.ndarray]:
    """Shares (0..0.5) and quantiles of the beta(0.6, 0.6) distribution; u = s ** (5/3) takes the pole at 0 away."""
    s = np.linspace(0.0, 0.5**0.6, points)
    density = (1 - s ** (5 / 3)) ** -0.4
    share = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return share / (2 * share[-1]), s ** (5 / 3)


def beta_quantile(share: np.ndarray) -> np.ndarray:
    """The inverse of the cumulative beta(0.6, 0.6) distribution, symmetric about 0.5."""
    shares, quantiles = half_beta_curve()
    mirrored = np.interp(np.minimum(share, 1 - share), shares, quantiles)
    quantile: np.ndarray = np.where(share <= 0.5, mirrored, 1 - mirrored)
    return quantile


def plan_beta(shift: float, steps: int) -> Tensor:
    """Dense at both ends; equal table rows are taken once, so that many steps may become fewer."""
    table = sigma_table(shift)
    rows = np.rint(beta_quantile(1 - np.linspace(0, 1, steps, endpoint=False)) * (len(table) - 1)).astype(int)
    return end_at_zero([float(table[row]) for row in dict.fromkeys(rows.tolist())])


SCHEDULES: dict[str, Callable[[float, int], Tensor]] = {
    "simple": plan_simple,
    "sgm_uniform": plan_sgm_uniform,
    "normal": plan_normal,
    "beta": plan_beta,
    "ddim_uniform": plan_ddim_uniform,
    "karras": plan_karras,
    "exponential": plan_exponential,
}


def plan_sigmas(name: str, steps: int, denoise: float = 1.0, shift: float = FLUX_SHIFT) -> Tensor:
    """(steps + 1,) sigmas ending at 0; with denoise < 1 the last `steps` of a longer plan, with denoise 0 none at all."""
    if name not in SCHEDULES:
        raise ValueError(f"scheduler {name!r} is not implemented by the built-in small model; it has {', '.join(SCHEDULES)}")
    if denoise <= 0:
        return torch.zeros(0)
    total = steps if denoise > 0.9999 else int(steps / denoise)
    return SCHEDULES[name](shift, total)[-(steps + 1) :]


def trained_sigmas(steps: int, strength: float = 1.0) -> Tensor:
    """The plan the model was measured with: diffusers' FlowMatchEulerDiscreteScheduler(shift=3); strength < 1 skips the first steps."""
    even = torch.linspace(1, 1 / steps, steps)
    shifted = TRAINED_SHIFT * even / (1 + (TRAINED_SHIFT - 1) * even)
    return torch.cat([shifted, torch.zeros(1)])[steps - max(1, round(steps * strength)) :]
