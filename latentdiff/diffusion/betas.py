"""Compute beta schedules of the forward process, under diffusers' names."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["BETA_SCHEDULES"]


def _linear(count: int, start: float, end: float) -> Tensor:
    """Ho et al. 2020, arXiv 2006.11239, section 4: betas rise linearly."""
    return torch.linspace(start, end, count, dtype=torch.float64)


def _scaled_linear(count: int, start: float, end: float) -> Tensor:
    """Rombach et al. 2022, arXiv 2112.10752, and all of Stable Diffusion: the roots of the betas rise linearly."""
    return torch.linspace(start**0.5, end**0.5, count, dtype=torch.float64) ** 2


def _cosine(count: int, start: float, end: float) -> Tensor:
    """Nichol & Dhariwal 2021, arXiv 2102.09672, Eq. 17: alphas_cumprod follows a squared cosine; no ends to choose."""
    time = torch.arange(count + 1, dtype=torch.float64) / count
    alphas_cumprod = torch.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - alphas_cumprod[1:] / alphas_cumprod[:-1]).clamp(max=0.999)


def _sigmoid(count: int, start: float, end: float) -> Tensor:
    """Xu et al. 2022, arXiv 2203.02923 (GeoDiff): betas rise along a sigmoid from -6 to 6."""
    return torch.linspace(-6, 6, count, dtype=torch.float64).sigmoid() * (end - start) + start


def _geometric(count: int, start: float, end: float) -> Tensor:
    """Betas rise by the same factor at each step, as the noise levels of Song & Ermon 2019, arXiv 1907.05600, do."""
    return torch.logspace(math.log10(start), math.log10(end), count, dtype=torch.float64)


def _angle(count: int, start: float, end: float) -> Tensor:
    """Signal rate cos(angle), noise rate sin(angle), the angle rising evenly between signal rates 0.95 and 0.02.

    Salimans & Ho 2022, arXiv 2202.00512, section 4, whose angle phi this is; no ends to choose.
    """
    angles = torch.linspace(math.acos(0.95), math.acos(0.02), count, dtype=torch.float64)
    alphas_cumprod = torch.cat([torch.ones(1, dtype=torch.float64), angles.cos() ** 2])
    return 1 - alphas_cumprod[1:] / alphas_cumprod[:-1]


def _flow(count: int, start: float, end: float) -> Tensor:
    """Lipman et al. 2023, arXiv 2210.02747, Eq. 20: noise rate t against signal rate 1 - t, pure noise at the end."""
    time = torch.arange(count + 1, dtype=torch.float64) / count
    alphas_cumprod = (1 - time) ** 2 / ((1 - time) ** 2 + time**2)
    return 1 - alphas_cumprod[1:] / alphas_cumprod[:-1]


# name -> (num_train_timesteps T, beta_start, beta_end) -> betas (T,) float64
BETA_SCHEDULES: dict[str, Callable[[int, float, float], Tensor]] = {
    "linear": _linear,
    "scaled_linear": _scaled_linear,
    "squaredcos_cap_v2": _cosine,
    "sigmoid": _sigmoid,
    "geometric": _geometric,
    "angle": _angle,
    "flow": _flow,
}
