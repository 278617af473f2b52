"""Prediction types: training target and denoiser are each other's inverse."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from latentdiff.diffusion import Call, NoiseSchedule, as_denoiser, make_plan, preconditioning, sample
from latentdiff.diffusion.prediction import PREDICTIONS, Thresholding
from latentdiff.errors import InputError


def call(sigmas: Tensor) -> Call:
    rows = torch.zeros(len(sigmas), dtype=torch.int64)
    return Call(0, torch.arange(len(sigmas)), rows, sigmas, torch.zeros_like(sigmas))


@pytest.mark.parametrize("prediction_type", list(PREDICTIONS))
@pytest.mark.parametrize("beta_schedule", ["linear", "squaredcos_cap_v2"])
def test_the_perfect_network_gives_x0_back(prediction_type: str, beta_schedule: str) -> None:
    schedule = NoiseSchedule(prediction_type=prediction_type, beta_schedule=beta_schedule)
    x0, noise = torch.randn(2, 5, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    timesteps = torch.tensor([0, 1, 500, 998, 999])
    x_vp, target = schedule.add_noise(x0, noise, timesteps), schedule.target(x0, noise, timesteps)
    sigmas = schedule.sigmas[timesteps]
    x = x_vp / preconditioning(prediction_type, sigmas).c_in.reshape(-1, 1, 1, 1)
    torch.testing.assert_close(x, x0 + sigmas.reshape(-1, 1, 1, 1) * noise)

    def network(model_input: Tensor, _: Call) -> Tensor:
        torch.testing.assert_close(model_input, x_vp)
        return target

    denoised = as_denoiser(network, prediction_type)(x, call(sigmas))
    torch.testing.assert_close(denoised, x0, atol=1e-10, rtol=1e-10)


def test_zero_terminal_snr_trains_on_pure_noise() -> None:
    schedule = NoiseSchedule(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    x0, noise = torch.randn(2, 1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(schedule.add_noise(x0, noise, torch.tensor([999])), noise)
    torch.testing.assert_close(schedule.target(x0, noise, torch.tensor([999])), -x0)


@pytest.mark.parametrize("prediction_type", list(PREDICTIONS))
def test_half_precision_data_is_noised_in_float32(prediction_type: str) -> None:
    schedule = NoiseSchedule(prediction_type=prediction_type)
    x0, noise = torch.randn(2, 1, 3, 4, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert schedule.add_noise(x0, noise, torch.tensor([7])).dtype == torch.float32


def test_half_precision_network_gives_an_estimate_in_the_dtype_of_x() -> None:
    x, sigmas = torch.ones(2, 1, 2, 2), torch.tensor([1.0, 2.0])
    assert as_denoiser(lambda inner, _: inner.bfloat16(), "v_prediction")(x, call(sigmas)).dtype == torch.float32


def test_input_of_the_network_has_unit_variance() -> None:
    sigmas = torch.tensor([0.0, 1.0, 2e4])
    torch.testing.assert_close(preconditioning("epsilon", sigmas).c_in ** 2 * (1 + sigmas**2), torch.ones(3))


def test_unknown_prediction_type_is_refused() -> None:
    with pytest.raises(InputError, match="did you mean 'epsilon'"):
        preconditioning("epsilom", torch.ones(1))


def test_thresholds_bound_each_image_by_its_own_quantile() -> None:
    x = torch.stack([torch.linspace(-3, 3, 48), torch.linspace(-0.5, 0.5, 48)]).reshape(2, 3, 4, 4)
    first, second = Thresholding(ratio=0.5, largest=10)(x)
    assert first.abs().max() == 1 and first[first.abs() < 1].abs().max() < 1
    torch.testing.assert_close(first, (x[0] / 1.5).clamp(-1, 1), atol=0.05, rtol=0)
    assert torch.equal(second, x[1])  # which is within the range already
    assert torch.equal(Thresholding(largest=1.0)(x), x.clamp(-1, 1))
    for values in ({"ratio": 1.5}, {"ratio": True}, {"largest": 0}, {"largest": float("inf")}):
        with pytest.raises(InputError, match="must be a number"):
            Thresholding(**values)


def test_a_denoiser_thresholds_alone_and_in_the_loop() -> None:
    """In the loop it holds for what the estimate is used for, not only for what is shown."""
    threshold = Thresholding(ratio=0.9, largest=2.0)
    denoise = as_denoiser(lambda x, call: 3 * x, "sample", thresholding=threshold)
    plan, x = make_plan(NoiseSchedule(prediction_type="sample"), "ddim", 3), torch.randn(1, 2, 4, 4) * 100
    steps = list(sample(denoise, plan, x))
    assert all(step.denoised.abs().max() <= 1 for step in steps) and steps[-1].x.abs().max() <= 1
    sigma, zeros = plan.sigmas[:1].float(), torch.zeros(1, dtype=torch.int64)
    alone = denoise(x, Call(0, zeros, zeros, sigma, plan.timesteps[:1].float()))
    torch.testing.assert_close(alone, steps[0].denoised)
