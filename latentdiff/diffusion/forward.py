"""Tabulate the forward process: rates and posterior of every timestep."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["posterior_tables", "rate_tables"]


def rate_tables(alphas_cumprod: Tensor, power: int) -> Tensor:
    """Return signal and noise rate of what the network sees, (2, T) float64.

    Args:
        alphas_cumprod: (T,) float64.
        power: see `prediction.Prediction`.
    """
    signal_rates, noise_rates = alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()
    if power == 1:
        total = signal_rates + noise_rates
        signal_rates, noise_rates = signal_rates / total, noise_rates / total
    return torch.stack([signal_rates, noise_rates])


def posterior_tables(alphas_cumprod: Tensor) -> Tensor:
    """Return factors of x_0 and x_t in the posterior mean, logarithms of small and large variance and of beta.

    Args:
        alphas_cumprod: (T,) float64.

    Returns:
        (5, T) float64.

    Source: Ho et al. 2020, arXiv 2006.11239, Eq. 7.
    """
    before = torch.cat([alphas_cumprod.new_ones(1), alphas_cumprod[:-1]])  # at t - 1
    betas = 1 - alphas_cumprod / before
    small = betas * (1 - before) / (1 - alphas_cumprod)
    small[0] = small[1] if len(small) > 1 else betas[0]
    of_x0 = before.sqrt() * betas / (1 - alphas_cumprod)
    of_x_t = (alphas_cumprod / before).sqrt() * (1 - before) / (1 - alphas_cumprod)
    return torch.stack([of_x0, of_x_t, small.log(), torch.cat([small[:1], betas[1:]]).log(), betas.log()])
