"""Likelihood of data under a diffusion model, in bits per dimension: variational bound and probability-flow ODE.

Everything is about whatever the network denoises. For a latent model that is latents, and the result is no likelihood
of pictures: it says nothing of what the autoencoder adds or loses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from latentdiff.devices import widest_float
from latentdiff.diffusion.loop import draw_noise, require_one_each
from latentdiff.diffusion.prediction import Call, Denoise, Denoiser
from latentdiff.diffusion.schedule import NoiseSchedule
from latentdiff.errors import InputError

__all__ = ["Bound", "OdeLikelihood", "bound_nats", "bound_term", "ode_likelihood", "prior_term", "variational_bound"]

LEVELS = 255  # steps between the 8-bit values of [-1, 1]


@dataclass(frozen=True)
class Bound:
    """The variational bound of a batch, in bits per dimension.

    Attributes:
        prior: (B,), L_T: how far the end of the forward process is from standard normal noise.
        terms: (T, B), L_{t-1} of each timestep; the first, L_0, is that of the decoder of 8-bit data.
    """

    prior: Tensor
    terms: Tensor

    @property
    def total(self) -> Tensor:
        """The bound itself, (B,)."""
        return self.prior + self.terms.sum(dim=0)


@dataclass(frozen=True)
class OdeLikelihood:
    """Log likelihood by the probability-flow ODE.

    Attributes:
        nats: (B,) log density of the data, summed over dimensions.
        standard_error: (B,) of `nats`, from the spread over the probes; NaN with one probe.
        dimensions: of one image.
    """

    nats: Tensor
    standard_error: Tensor
    dimensions: int

    def bits_per_dim(self, scale: float = 1.0) -> Tensor:
        """Return the negative log2 density per dimension (B,) of data measured in units of `scale`.

        Dequantised 8-bit data in [-1, 1] has a scale of 2 / 256: its bits per dimension are those of the integers.
        """
        return -self.nats / self.dimensions / math.log(2) - math.log2(scale)


def prior_term(schedule: NoiseSchedule, x0: Tensor) -> Tensor:
    """Return L_T = KL(q(x_T | x_0) || N(0, I)) in bits per dimension, (B,).

    Source: Ho et al. 2020, arXiv 2006.11239, Eq. 5.
    """
    alpha_bar = float(schedule.alphas_cumprod[-1])
    # 0.5 (variance + mean^2 - 1 - log variance) with variance 1 - alpha_bar
    constant = 0.5 * (-alpha_bar - math.log1p(-alpha_bar))
    return (constant + 0.5 * alpha_bar * x0.square()).flatten(1).mean(dim=1) / math.log(2)


@torch.no_grad()
def bound_term(
    denoise: Denoise,
    schedule: NoiseSchedule,
    x0: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    variance: str = "fixed_small",
    *,
    eight_bit: bool = True,
) -> Tensor:
    """Return one sample of L_{t-1} for each image, or of L_0 where its timestep is 0, in bits per dimension (B,).

    Args:
        denoise: see `prediction.as_denoiser`; called in sigma coordinates.
        x0: (B, C, H, W) data.
        noise: (B, C, H, W) standard normal.
        timesteps: (B,) int64.
        variance: "fixed_small", "fixed_large", or "learned_range" where the network of a `Denoiser` says it.
        eight_bit: see `bound_nats`.

    Raises:
        InputError: the variance is to be learned, but the network does not.

    Source: Ho et al. 2020, arXiv 2006.11239, Eq. 5 and 13; Nichol & Dhariwal 2021, arXiv 2102.09672, section 2.1.
    """
    alpha_bar = schedule.on("alphas_cumprod", x0.device, x0.dtype)[0, timesteps].reshape(-1, *[1] * (x0.ndim - 1))
    x_t = alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * noise  # Ho et al. Eq. 4
    places = torch.arange(len(x0), device=x0.device)
    sigmas = schedule.on("sigmas", x0.device, x0.dtype)[0, timesteps]
    call = Call(0, places, torch.zeros_like(places), sigmas, timesteps.to(x0.dtype))
    denoiser = denoise if isinstance(denoise, Denoiser) else Denoiser(denoise, None)
    estimate, share = denoiser.with_variance(x_t / alpha_bar.sqrt(), call)
    if variance == "learned_range" and share is None:
        raise InputError("learned_range needs a network of twice the channels, got one of as many; use fixed_small")
    learned = share if variance == "learned_range" and share is not None else variance
    nats = bound_nats(schedule, x0, x_t, estimate, timesteps, learned, eight_bit=eight_bit)
    return nats.flatten(1).mean(dim=1) / math.log(2)


def bound_nats(
    schedule: NoiseSchedule,
    x0: Tensor,
    x_t: Tensor,
    estimate: Tensor,
    timesteps: Tensor,
    variance: str | Tensor,
    *,
    eight_bit: bool = True,
) -> Tensor:
    """Return L_{t-1}, or L_0 where the timestep is 0, of every dimension in nats: (B, C, H, W).

    Args:
        x0, x_t, estimate: (B, C, H, W) data, what the forward process made of it, and the network's x0 estimate.
        timesteps: (B,) int64.
        variance: see `NoiseSchedule.posterior`.
        eight_bit: whether x0 are 8-bit values scaled to [-1, 1]; of others, such as latents, L_0 is a density.
    """
    true_mean, true_log = schedule.posterior(x0, x_t, timesteps)
    mean, log_variance = schedule.posterior(estimate, x_t, timesteps, variance)
    kl = 0.5 * (log_variance - true_log + (true_log - log_variance).exp() - 1)
    kl = kl + 0.5 * (true_mean - mean).square() * (-log_variance).exp()
    if eight_bit:
        decoder = -discretised(x0, mean, log_variance)
    else:
        decoder = 0.5 * (math.log(2 * math.pi) + log_variance + (x0 - mean).square() * (-log_variance).exp())
    return torch.where((timesteps == 0).reshape(-1, *[1] * (x0.ndim - 1)), decoder, kl)


def variational_bound(
    denoise: Denoise,
    schedule: NoiseSchedule,
    x0: Tensor,
    generators: Sequence[torch.Generator],
    variance: str = "fixed_small",
    *,
    eight_bit: bool = True,
) -> Bound:
    """Return every term of the bound, one noise sample for each timestep and image: T calls of the network.

    Args:
        denoise, x0, variance, eight_bit: see `bound_term`.
        generators: one per image.

    Raises:
        InputError: the schedule ends in pure noise, or not as many generators as images.
    """
    if schedule.ends_in_pure_noise:
        raise InputError("the bound needs some signal at the last timestep, got zero terminal SNR; use the ODE instead")
    require_one_each(generators, x0)
    terms = []
    for timestep in range(schedule.num_train_timesteps):
        noise = draw_noise(generators, x0.shape[1:]).to(x0)
        timesteps = torch.full((len(x0),), timestep, device=x0.device)
        terms.append(bound_term(denoise, schedule, x0, noise, timesteps, variance, eight_bit=eight_bit))
    return Bound(prior_term(schedule, x0), torch.stack(terms))


def ode_likelihood(
    denoise: Denoise,
    schedule: NoiseSchedule,
    x0: Tensor,
    generators: Sequence[torch.Generator],
    *,
    steps: int = 200,
    probes: int = 2,
) -> OdeLikelihood:
    """Integrate the probability-flow ODE from data to noise, with the change of volume along it.

    Heun's method on falling-rate (Karras) noise levels; the divergence by Hutchinson's estimator with +-1 probes.

    Args:
        denoise: see `prediction.as_denoiser`; differentiable in x.
        x0: (B, C, H, W).
        generators: one per image, for the probes.
        steps: 1 or more; each is two calls of the network.
        probes: 1 or more, each a backward pass of every call; two or more give a standard error.

    Raises:
        InputError: steps or probes below 1, or not as many generators as images.

    Source: Song et al. 2021, arXiv 2011.13456, Eq. 39 and 40, in the sigma coordinates of Karras et al. 2022,
    arXiv 2206.00364, Eq. 3.
    """
    for name, value in (("steps", steps), ("probes", probes)):
        if value < 1:
            raise InputError(f"{name} must be 1 or more, got {value}; try 200 steps and 2 probes")
    require_one_each(generators, x0)
    levels = schedule.discretize(steps + 1, "dpm", "karras").sigmas[:-1].flip(0)
    timesteps = schedule.timesteps_of(levels).tolist()
    exact = widest_float(x0.device)
    signs = [
        torch.stack([torch.randint(0, 2, x0.shape[1:], generator=one) for one in generators]) for _ in range(probes)
    ]
    directions = torch.stack(signs).to(x0) * 2 - 1  # (P, B, C, H, W)
    x, volumes = x0, x0.new_zeros(probes, len(x0), dtype=exact)
    places = list(zip(levels.tolist(), timesteps))
    for (sigma, timestep), (following, next_timestep) in pairwise(places):
        step = following - sigma
        slope, divergence = _slope(denoise, x, sigma, timestep, directions)
        ahead = _slope(denoise, x + step * slope, following, next_timestep, directions)
        x, volumes = x + step / 2 * (slope + ahead[0]), volumes + step / 2 * (divergence + ahead[1])
    variance = 1 + float(levels[-1]) ** 2  # of x at the last level, whose VP form is standard normal
    dimensions = x0[0].numel()
    prior = -0.5 * (
        x.to(exact).square().flatten(1).sum(dim=1) / variance + dimensions * math.log(2 * math.pi * variance)
    )
    error = volumes.std(dim=0) / math.sqrt(probes) if probes > 1 else torch.full_like(prior, math.nan)
    return OdeLikelihood(prior + volumes.mean(dim=0), error, dimensions)


def _slope(denoise: Denoise, x: Tensor, sigma: float, timestep: float, directions: Tensor) -> tuple[Tensor, Tensor]:
    """Return dx/dsigma (B, C, H, W) and its divergence (P, B), estimated along each of `directions` (P, B, C, H, W)."""
    places = torch.arange(len(x), device=x.device)
    sigmas, timesteps = (torch.full((len(x),), value, dtype=x.dtype, device=x.device) for value in (sigma, timestep))
    with torch.enable_grad():
        inputs = x.detach().requires_grad_()
        slope = (inputs - denoise(inputs, Call(0, places, torch.zeros_like(places), sigmas, timesteps))) / sigma
        products = [torch.autograd.grad((slope * one).sum(), inputs, retain_graph=True)[0] for one in directions]
    return slope.detach(), (torch.stack(products) * directions).to(widest_float(x.device)).flatten(2).sum(dim=2)


def discretised(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Return the log probability of 8-bit values scaled to [-1, 1], a Gaussian integrated over each value's interval.

    Source: Ho et al. 2020, arXiv 2006.11239, Eq. 13.
    """
    scale = (-0.5 * log_variance).exp()
    above, below = (scale * (x - mean + side / LEVELS) for side in (1, -1))
    cumulative_above = torch.where(x > 1 - 0.5 / LEVELS, torch.ones_like(x), torch.special.ndtr(above))
    cumulative_below = torch.where(x < -1 + 0.5 / LEVELS, torch.zeros_like(x), torch.special.ndtr(below))
    return (cumulative_above - cumulative_below).clamp(min=1e-12).log()
