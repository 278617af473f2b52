"""Space noise levels: Karras, exponential, polyexponential, beta."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

__all__ = ["SIGMA_SPACINGS", "beta", "exponential", "karras", "polyexponential"]


def karras(sigma_max: float, sigma_min: float, count: int, rho: float = 7.0) -> np.ndarray:
    """Return `count` levels whose rho-th roots fall evenly. Source: Karras et al. 2022, arXiv 2206.00364, Eq. 5."""
    return np.linspace(sigma_max ** (1 / rho), sigma_min ** (1 / rho), count) ** rho


def exponential(sigma_max: float, sigma_min: float, count: int) -> np.ndarray:
    """Return `count` levels whose logarithms fall evenly, as diffusers' use_lu_lambdas does too.

    Source: Lu et al. 2022, arXiv 2206.00927, section 3.3.
    """
    return polyexponential(sigma_max, sigma_min, count, rho=1.0)


def polyexponential(sigma_max: float, sigma_min: float, count: int, rho: float = 2.0) -> np.ndarray:
    """Return `count` levels whose logarithms fall as the power `rho` of an even ramp: above 1, more of the low ones.

    Source: the sampler collection k-diffusion, where it comes from.
    """
    ramp = np.linspace(1, 0, count) ** rho
    return np.exp(math.log(sigma_min) + ramp * math.log(sigma_max / sigma_min))


def beta(sigma_max: float, sigma_min: float, count: int, alpha: float = 0.6, b: float = 0.6) -> np.ndarray:
    """Return `count` levels at even quantiles of a beta distribution, more at both ends.

    Source: Lee et al. 2024, arXiv 2407.12173, section 4.
    """
    from scipy.stats import beta as distribution

    return sigma_min + distribution.ppf(np.linspace(1, 0, count), alpha, b) * (sigma_max - sigma_min)


# (sigma_max, sigma_min, N) -> falling noise levels (N,)
SIGMA_SPACINGS: dict[str, Callable[[float, float, int], np.ndarray]] = {
    "karras": karras,
    "exponential": exponential,
    "polyexponential": polyexponential,
    "beta": beta,
}
