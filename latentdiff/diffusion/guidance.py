"""Classifier-free guidance: the conditional prediction pushed away from the unconditional one."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from latentdiff.errors import InputError

__all__ = ["classifier_free", "guidance_scales"]


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
    if not isinstance(rescale, Tensor) and rescale == 0:
        return guided
    axes = tuple(range(1, guided.ndim))
    ratio = conditional.std(dim=axes, keepdim=True) / guided.std(dim=axes, keepdim=True)  # Lin et al. Eq. 14
    return torch.lerp(guided, guided * ratio, _per_image(rescale, guided))  # Lin et al. Eq. 15 and 16


def guidance_scales(
    sigmas: Tensor, guidance_scale: float, guidance_interval: tuple[float, float] | None = None
) -> Tensor:
    """Return the guidance scale of every row of a plan; where it is 1, the unconditional call can be left out.

    Args:
        sigmas: (R,) noise level of each row, `Plan.sigmas`.
        guidance_scale: finite; 1 and below mean no guidance, as in diffusers.
        guidance_interval: (low, high) in sigmas; guided where low < sigma <= high. None guides everywhere.

    Returns:
        (R,) float64.

    Raises:
        InputError: scale or interval is not finite or not ordered.

    Source: Kynkäänniemi et al. 2024, arXiv 2404.07724, section 3 (the piecewise guidance weight).
    """
    if not math.isfinite(guidance_scale):
        raise InputError(f"guidance_scale must be a finite number, got {guidance_scale}; try 7.5")
    scales = torch.full_like(sigmas, max(float(guidance_scale), 1.0), dtype=torch.float64)  # (R,)
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
