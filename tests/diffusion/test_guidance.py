"""Classifier-free guidance: arithmetic, equality with diffusers' formula, intervals and refusals."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from latentdiff.diffusion import classifier_free, guidance_scales, preconditioning
from latentdiff.diffusion.guidance import GUIDANCE_SCHEDULES, adaptive_projected, rescaled
from latentdiff.errors import InputError


@pytest.fixture
def outputs() -> tuple[Tensor, Tensor]:
    conditional, unconditional = torch.randn(2, 3, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    return conditional, unconditional


def test_scale_one_is_the_conditional_and_zero_the_unconditional(outputs: tuple[Tensor, Tensor]) -> None:
    conditional, unconditional = outputs
    torch.testing.assert_close(classifier_free(conditional, unconditional, 1.0), conditional)
    torch.testing.assert_close(classifier_free(conditional, unconditional, 0.0), unconditional)


def test_scales_of_a_batch_are_the_scales_of_its_images(outputs: tuple[Tensor, Tensor]) -> None:
    conditional, unconditional = outputs
    scales, rescales = torch.tensor([1.0, 4.0, 7.5]), torch.tensor([0.0, 0.5, 1.0])
    together = classifier_free(conditional, unconditional, scales, rescales)
    for i in range(3):
        part = slice(i, i + 1)
        alone = classifier_free(conditional[part], unconditional[part], float(scales[i]), float(rescales[i]))
        torch.testing.assert_close(together[part], alone)


def test_guiding_the_output_is_guiding_the_estimate(outputs: tuple[Tensor, Tensor]) -> None:
    conditional, unconditional = outputs
    x, (c_skip, c_out, _) = torch.full_like(conditional, 3.0), preconditioning("v_prediction", torch.tensor(2.0))
    estimates = [c_skip * x + c_out * output for output in (conditional, unconditional)]
    guided = classifier_free(conditional, unconditional, 7.5)
    torch.testing.assert_close(c_skip * x + c_out * guided, classifier_free(estimates[0], estimates[1], 7.5))


def test_rescale_restores_the_standard_deviation(outputs: tuple[Tensor, Tensor]) -> None:
    conditional, unconditional = outputs
    rescaled = classifier_free(conditional, unconditional, 7.5, rescale=1.0)
    torch.testing.assert_close(rescaled.std(dim=(1, 2, 3)), conditional.std(dim=(1, 2, 3)))


def test_interval_is_open_below_and_closed_above() -> None:
    sigmas = torch.tensor([10.0, 5.0, 2.0, 1.0, 0.5], dtype=torch.float64)
    assert guidance_scales(sigmas, 7.5, (1.0, 5.0)).tolist() == [1.0, 7.5, 7.5, 1.0, 1.0]
    assert guidance_scales(sigmas, 7.5).tolist() == [7.5] * 5


@pytest.mark.parametrize("scale", [1.0, 0.5, 0.0, -3.0])
def test_scales_up_to_one_mean_no_guidance(scale: float) -> None:
    assert guidance_scales(torch.ones(2), scale).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_bad_scale(scale: float) -> None:
    with pytest.raises(InputError, match=r"guidance_scale must be a finite number, got .*; try 7\.5"):
        guidance_scales(torch.ones(2), scale)


@pytest.mark.parametrize("interval", [(2.0, 1.0), (-1.0, 1.0), (float("nan"), 1.0), (0.0, float("nan"))])
def test_bad_interval(interval: tuple[float, float]) -> None:
    with pytest.raises(InputError, match="guidance_interval must be"):
        guidance_scales(torch.ones(2), 7.5, interval)


def test_adaptive_projected_guidance_without_its_means_is_classifier_free() -> None:
    conditional, unconditional = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    guided = adaptive_projected(conditional, unconditional, 4.0, parallel=1.0)
    torch.testing.assert_close(guided, classifier_free(conditional, unconditional, 4.0))


def test_adaptive_projected_guidance_adds_nothing_along_the_estimate_and_is_limited() -> None:
    conditional, unconditional = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    scales = torch.tensor([1.0, 4.0, 20.0])
    update = (adaptive_projected(conditional, unconditional, scales, limit=2.0) - conditional).flatten(1)
    torch.testing.assert_close((update * conditional.flatten(1)).sum(1), torch.zeros(3), atol=1e-3, rtol=0)
    assert (update.norm(dim=1) <= 2.0 * (scales - 1) + 1e-4).all()
    assert torch.equal(update[0], torch.zeros_like(update[0]))


def test_schedules_rise_and_keep_the_mean() -> None:
    sigmas = torch.linspace(10, 0.1, 101, dtype=torch.float64)
    for name in GUIDANCE_SCHEDULES:
        scales = guidance_scales(sigmas, 5.0, guidance_schedule=name)
        assert float(scales.mean()) == pytest.approx(5.0) and (scales.diff() >= 0).all()
    assert guidance_scales(sigmas, 5.0, guidance_schedule="linear")[0] == 1
    with pytest.raises(InputError, match="did you mean 'cosine'"):
        guidance_scales(sigmas, 5.0, guidance_schedule="cosin")


def test_rescaling_leaves_flat_outputs_finite() -> None:
    """A standard deviation of zero, or of rounding alone, is nothing to divide by."""
    conditional = torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    for flat in (torch.zeros(1, 2, 4, 4), torch.full((1, 2, 4, 4), 3.0), 3 + 1e-8 * conditional):
        torch.testing.assert_close(rescaled(flat, conditional, 0.7), flat)
        torch.testing.assert_close(rescaled(flat, flat, 0.7), flat)
    assert torch.isfinite(rescaled(1e-20 * conditional, conditional, 1.0)).all()
