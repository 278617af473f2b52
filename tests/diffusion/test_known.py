"""Known latents: what is known of the result comes out as it is, whatever the solver."""

from __future__ import annotations

import pytest
import torch

from latentdiff.diffusion import (
    SAMPLERS,
    KnownRegion,
    as_denoiser,
    draw_noise,
    image_generator,
    make_plan,
    sample,
    start,
)
from latentdiff.errors import InputError
from tests.diffusion.test_samplers import COSINE, SHAPE, network


@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_known_latents_come_out_as_they_are(sampler: str) -> None:
    """Half of the picture is known: it is reached exactly by every solver, and the rest is drawn to fit."""
    plan, generators = make_plan(COSINE, sampler, 12), [image_generator(0), image_generator(1)]
    latents = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(9))
    mask = torch.zeros(2, 1, *SHAPE[1:])
    mask[..., 2:] = 1
    denoise = as_denoiser(network, "v_prediction")
    x = start(plan, draw_noise(generators, SHAPE), latents)
    *_, final = sample(denoise, plan, x, generators, KnownRegion(mask, latents))
    atol = 0.02 if sampler == "deis" else 2e-3  # deis stops at the lowest trained noise level
    torch.testing.assert_close(final.x[..., :2], latents[..., :2], atol=atol, rtol=0)
    assert (final.x[..., 2:] - latents[..., 2:]).abs().mean() > 0.1


def test_a_mask_of_ones_changes_nothing() -> None:
    plan, generators = make_plan(COSINE, "dpmpp_2m", 6), [image_generator(0)]
    x = start(plan, draw_noise(generators, SHAPE))
    denoise = as_denoiser(network, "v_prediction")
    known = KnownRegion(torch.ones(1, 1, *SHAPE[1:]), torch.zeros(1, *SHAPE))
    *_, plain = sample(denoise, plan, x)
    *_, masked = sample(denoise, plan, x, known=known)
    torch.testing.assert_close(masked.x, plain.x)
    with pytest.raises(InputError, match=r"known latents must have the shape \(1, 2, 4, 4\) of x"):
        sample(denoise, plan, x, known=KnownRegion(known.mask, torch.zeros(2, *SHAPE)))
