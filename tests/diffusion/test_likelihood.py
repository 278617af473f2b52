"""Both likelihoods on Gaussian data, where the truth is known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from latentdiff.diffusion import Call, NoiseSchedule, as_denoiser, image_generator
from latentdiff.diffusion.likelihood import bound_term, ode_likelihood, prior_term, variational_bound
from latentdiff.diffusion.prediction import Denoiser
from latentdiff.errors import InputError

MEAN, STD = 0.1, 0.25
SCHEDULE = NoiseSchedule()


def denoise(x: Tensor, call: Call) -> Tensor:
    """The exact x0 estimate of data N(MEAN, STD^2)."""
    sigmas = call.sigmas.reshape(-1, *[1] * (x.ndim - 1))
    return MEAN + STD**2 / (STD**2 + sigmas**2) * (x - MEAN)


def data(count: int, size: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return MEAN + STD * torch.randn(count, 1, size, size, generator=generator, dtype=torch.float64)


def true_nats(x0: Tensor) -> Tensor:
    return torch.distributions.Normal(MEAN, STD).log_prob(x0).flatten(1).sum(dim=1)


def test_ode_finds_the_density() -> None:
    x0 = data(2, 8)
    found = ode_likelihood(denoise, SCHEDULE, x0, [image_generator(0), image_generator(1)])
    error = (found.nats - true_nats(x0)).abs() / x0[0].numel() / math.log(2)
    assert error.max() < 0.01
    # The Jacobian is a multiple of the identity, of which every probe measures the trace.
    assert found.standard_error.max() < 1e-6


def test_standard_error_is_that_of_the_probes() -> None:
    def coupled(x: Tensor, call: Call) -> Tensor:
        return denoise(x, call) + 0.2 * torch.tanh(x.roll(1, -1)) / (1 + call.sigmas.reshape(-1, 1, 1, 1))

    x0, errors = data(1, 8), []
    for seed in range(6):
        errors.append(ode_likelihood(coupled, SCHEDULE, x0, [image_generator(seed)], steps=20, probes=8))
    spread = torch.stack([found.nats for found in errors]).std()
    claimed = torch.stack([found.standard_error for found in errors]).mean()
    assert 0.3 < float(spread / claimed) < 3


def test_learned_variance_lies_between_the_fixed_ones() -> None:
    """With both ends learned the bound is that of the fixed variances, and a network that learns none is refused."""
    x0, timesteps = data(3, 8), torch.tensor([1, 40, 700])
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def learning(share: float) -> Denoiser:
        def network(x: Tensor, call: Call) -> Tensor:
            sigma = call.sigmas.reshape(-1, 1, 1, 1)
            inner = x * (1 + sigma**2).sqrt()
            return torch.cat([(inner - denoise(inner, call)) / sigma, torch.full_like(x, share)], dim=1)

        return as_denoiser(network, "epsilon")

    for share, variance in ((-1.0, "fixed_small"), (1.0, "fixed_large")):
        ours = bound_term(learning(share), SCHEDULE, x0, noise, timesteps, "learned_range")
        torch.testing.assert_close(ours, bound_term(denoise, SCHEDULE, x0, noise, timesteps, variance))
    with pytest.raises(InputError, match="learned_range needs a network of twice the channels"):
        bound_term(denoise, SCHEDULE, x0, noise, timesteps, "learned_range")


def test_with_the_exact_variance_the_bound_is_the_entropy() -> None:
    """For Gaussian data each reverse step is Gaussian; told its variance, all terms add up to the bits of the data."""
    schedule = NoiseSchedule(beta_schedule="squaredcos_cap_v2", num_train_timesteps=200)

    def network(x: Tensor, call: Call) -> Tensor:
        sigma, timesteps = call.sigmas.reshape(-1, 1, 1, 1), call.timesteps.long()
        inner = x * (1 + sigma**2).sqrt()
        unit, nothing = torch.ones_like(x[:, :1]), torch.zeros_like(x[:, :1])
        of_x0 = schedule.posterior(unit, nothing, timesteps)[0] - schedule.posterior(nothing, nothing, timesteps)[0]
        low, high = (schedule.posterior(x, x, timesteps, share * unit)[1] for share in (-1.0, 1.0))
        spread = STD**2 * sigma**2 / (STD**2 + sigma**2)
        first = (timesteps == 0).reshape(-1, 1, 1, 1)
        wanted = torch.where(first, spread.log(), (low.exp() + of_x0**2 * spread).log())
        share = torch.where(first & (high == low), 0.0, 2 * (wanted - low) / (high - low) - 1)
        return torch.cat([(inner - denoise(inner, call)) / sigma, share.expand_as(x)], dim=1)

    generator = torch.Generator().manual_seed(0)
    values = MEAN + STD * torch.randn(4, 1, 128, 128, generator=generator, dtype=torch.float64)
    x0 = ((values.clamp(-1, 1) + 1) * 127.5).round().div(127.5).sub(1)
    generators = [image_generator(seed) for seed in range(4)]
    bound = variational_bound(as_denoiser(network, "epsilon"), schedule, x0, generators, "learned_range")
    truth = -true_nats(x0) / x0[0].numel() / math.log(2) + math.log2(255 / 2)
    assert (bound.total - truth).mean().abs() < 0.01


def estimate_variance(timesteps: Tensor) -> Tensor:
    """How far the exact estimate of x0 is off, squared, on average."""
    sigmas = SCHEDULE.sigmas[timesteps]
    return STD**2 * sigmas**2 / (STD**2 + sigmas**2)


def expected_terms(timesteps: Tensor) -> Tensor:
    """L_{t-1} of the exact estimate, in closed form: its error, weighted as in Ho et al. 2020, Eq. 10."""
    alpha_bar, before = SCHEDULE.alphas_cumprod[timesteps], SCHEDULE.alphas_cumprod[timesteps - 1]
    weights = 0.5 * (before / (1 - before) - alpha_bar / (1 - alpha_bar))
    return weights * estimate_variance(timesteps) / math.log(2)


def test_bound_is_the_one_of_the_exact_estimate() -> None:
    x0 = ((data(16, 64) * 127.5 + 127.5).round() / 127.5 - 1).clamp(-1, 1)
    bound = variational_bound(denoise, SCHEDULE, x0, [image_generator(seed) for seed in range(16)])
    assert bound.terms.shape == (1000, 16) and (bound.terms[1:] > -1e-9).all()
    # L_0: the error of the estimate against a Gaussian decoder whose variance is that of timestep 1.
    _, log_variance = SCHEDULE.posterior(x0[:1], x0[:1], torch.tensor([0]))
    error = torch.linspace(-0.06, 0.06, 20_001, dtype=torch.float64)
    density = torch.distributions.Normal(0.0, estimate_variance(torch.tensor(0)).sqrt()).log_prob(error).exp()
    above, below = ((error + side / 255) * (-0.5 * log_variance.flatten()).exp() for side in (1, -1))
    surprise = -(torch.special.ndtr(above) - torch.special.ndtr(below)).clamp(min=1e-12).log2()
    expected = expected_terms(torch.arange(1, 1000)).sum() + (density * surprise).sum() * 0.12 / 20_000
    assert float((bound.total.mean() - expected).abs()) < 0.01
    assert float(bound.prior.max()) < 1e-4


def test_single_terms_agree_with_the_closed_form() -> None:
    x0, noise = data(2), torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    timesteps = torch.tensor([50, 600])
    found = bound_term(denoise, SCHEDULE, x0, noise, timesteps)
    torch.testing.assert_close(found, expected_terms(timesteps), rtol=0.1, atol=0)


def test_prior_is_the_kl_of_two_gaussians() -> None:
    x0 = data(3, 4)
    alpha_bar = SCHEDULE.alphas_cumprod[-1]
    kl = torch.distributions.kl_divergence(
        torch.distributions.Normal(alpha_bar.sqrt() * x0, (1 - alpha_bar).sqrt()), torch.distributions.Normal(0.0, 1.0)
    )
    torch.testing.assert_close(prior_term(SCHEDULE, x0), kl.flatten(1).mean(dim=1) / math.log(2), atol=1e-12, rtol=1e-6)


def test_refusals() -> None:
    zero_snr = NoiseSchedule(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    with pytest.raises(InputError, match="use the ODE instead"):
        variational_bound(denoise, zero_snr, data(1, 4), [image_generator(0)])
    with pytest.raises(InputError, match="got 0 for 1 images"):
        variational_bound(denoise, SCHEDULE, data(1, 4), [])
    with pytest.raises(InputError, match="probes must be 1 or more, got 0"):
        ode_likelihood(denoise, SCHEDULE, data(1, 4), [image_generator(0)], probes=0)
