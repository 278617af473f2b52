"""Classifier-free guidance: the conditional prediction pushed away from the unconditional one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from latentdiff.devices import widest_float
from latentdiff.errors import InputError, suggest

__all__ = ["GUIDANCE_SCHEDULES", "adaptive_projected", "classifier_free", "guidance_scales", "rescaled"]

FLAT = 1e-6  # a standard deviation below this part of the largest value is rounding


def classifier_free(
    conditional: Tensor, unconditional: Tensor, scale: float | Tensor, rescale: float | Tensor = 0.0
) -> Tensor:
    """Combine two outputs of the network, in whatever it predicts.

    The combination is linear, so guiding the output or the x0 estimate is the same; only `rescale`, which measures
    standard deviations, depends on it and is meant for the output, as in diffusers.

    Args:
        conditional, unconditional: (B, C, H, W) outputs with the prompt and with the negative (or empty) prompt.
        scale: guidance scale, one number or (B,); 1 gives the conditional output back.
        rescale: 0 to 1, one number or (B,); how far the standard deviation of each image is drawn back to that of
            the conditional output, against over-exposure.

    Returns:
        (B, C, H, W).

    Source: Ho & Salimans 2022, arXiv 2207.12598, Eq. 6 with scale = 1 + w; Lin et al. 2023, arXiv 2305.08891.
    """
    guided = unconditional + _per_image(scale, conditional) * (conditional - unconditional)  # Ho & Salimans Eq. 6
    return rescaled(guided, conditional, rescale)


def rescaled(guided: Tensor, conditional: Tensor, rescale: float | Tensor) -> Tensor:
    """Scale guided outputs (B, C, H, W) towards the standard deviation of the conditional ones; flat ones stay.

    Source: Lin et al. 2023, arXiv 2305.08891, Eq. 14 to 16.
    """
    if not isinstance(rescale, Tensor) and rescale == 0:
        return guided
    axes = tuple(range(1, guided.ndim))
    spread, largest = guided.std(dim=axes, keepdim=True), guided.abs().amax(dim=axes, keepdim=True)
    ratio = conditional.std(dim=axes, keepdim=True) / spread  # Eq. 14
    ratio = torch.where(spread > FLAT * largest, ratio, 1.0)
    return torch.lerp(guided, guided * ratio, _per_image(rescale, guided))  # Eq. 15 and 16


def adaptive_projected(
    conditional: Tensor,
    unconditional: Tensor,
    scale: float | Tensor,
    *,
    parallel: float = 0.0,
    limit: float | None = None,
) -> Tensor:
    """Combine two x0 estimates so that a high scale sharpens without over-saturating: adaptive projected guidance.

    The part of their difference along the conditional estimate, which only raises contrast, is weakened, and the whole
    difference is kept within a ball. The paper's momentum, which remembers earlier steps, is left out.

    Args:
        conditional, unconditional: (B, C, H, W) x0 estimates with the prompt and with the negative (or empty) prompt.
        scale: guidance scale, one number or (B,); 1 gives the conditional estimate back.
        parallel: how much of the parallel part is kept; 1 without a limit is classifier-free guidance.
        limit: largest length of each image's difference, or None.

    Returns:
        (B, C, H, W).

    Source: Sadat et al. 2024, arXiv 2410.02416, algorithm 1.
    """
    axes, exact = tuple(range(1, conditional.ndim)), widest_float(conditional.device)
    difference = (conditional - unconditional).to(exact)
    if limit is not None:
        length = difference.square().sum(dim=axes, keepdim=True).sqrt()
        difference = difference * (limit / length.clamp(min=1e-12)).clamp(max=1)
    direction = conditional.to(exact)
    direction = direction / direction.square().sum(dim=axes, keepdim=True).sqrt().clamp(min=1e-12)
    along = (difference * direction).sum(dim=axes, keepdim=True) * direction
    update = (difference - along + parallel * along).to(conditional.dtype)
    return conditional + (_per_image(scale, conditional) - 1) * update


# share of the rows that lies behind, 0 (pure noise) to 1 -> factor of scale - 1; the rising ones average to 1
GUIDANCE_SCHEDULES: dict[str, Callable[[Tensor], Tensor]] = {
    "constant": torch.ones_like,
    "linear": lambda done: 2 * done,
    "cosine": lambda done: 1 - (math.pi * done).cos(),
}


def guidance_scales(
    sigmas: Tensor | Sequence[float],
    guidance_scale: float,
    guidance_interval: tuple[float, float] | None = None,
    guidance_schedule: str = "constant",
) -> Tensor:
    """Return the guidance scale of every row of a plan; where it is 1, the unconditional call can be left out.

    Args:
        sigmas: (R,) noise level of each row, `Plan.sigmas`.
        guidance_scale: finite; 1 and below mean no guidance, as in diffusers.
        guidance_interval: (low, high) in sigmas; guided where low < sigma <= high. None guides everywhere.
        guidance_schedule: a key of `GUIDANCE_SCHEDULES`: how scale - 1 changes from the first row to the last.

    Returns:
        (R,) float64.

    Raises:
        InputError: scale or interval is not finite or not ordered, or the schedule is unknown.

    Source: Kynkäänniemi et al. 2024, arXiv 2404.07724, section 3 (the piecewise guidance weight); Wang et al. 2024,
    arXiv 2404.13040, section 4 (schedules).
    """
    if not math.isfinite(guidance_scale):
        raise InputError(f"guidance_scale must be a finite number, got {guidance_scale}; try 7.5")
    if guidance_schedule not in GUIDANCE_SCHEDULES:
        raise InputError(
            f"guidance_schedule {guidance_schedule!r} is unknown{suggest(str(guidance_schedule), GUIDANCE_SCHEDULES)}"
        )
    sigmas = torch.as_tensor(sigmas)
    done = torch.linspace(0, 1, len(sigmas), dtype=torch.float64)
    scales = 1 + (max(float(guidance_scale), 1.0) - 1) * GUIDANCE_SCHEDULES[guidance_schedule](done)  # (R,)
    if guidance_interval is None:
        return scales
    low, high = guidance_interval
    if not 0 <= low < high:
        raise InputError(
            f"guidance_interval must be (low, high) in sigmas with 0 <= low < high, got ({low}, {high}); try (0.3, 5.0)"
        )
    return torch.where((sigmas > low) & (sigmas <= high), scales, 1.0)


def _per_image(value: float | Tensor, like: Tensor) -> float | Tensor:
    return value.to(like).reshape(-1, *[1] * (like.ndim - 1)) if isinstance(value, Tensor) else value
