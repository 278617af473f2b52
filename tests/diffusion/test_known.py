"""Known latents: what is known of the result comes out as it is, whatever the solver."""

from __future__ import annotations

from dataclasses import replace

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
    assert torch.equal(final.x[..., :2], latents[..., :2])
    assert (final.x[..., 2:] - latents[..., 2:]).abs().mean() > 0.1


def test_known_latents_of_each_image_are_reached_when_its_own_plan_ends() -> None:
    """Also where the schedule ends at the first training noise level, and images of one batch end after each other."""
    schedule = replace(COSINE, set_alpha_to_one=False)
    plans = [make_plan(schedule, "ddim", 4), make_plan(schedule, "plms", 7)]
    latents = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(9))
    mask = torch.zeros(2, 1, *SHAPE[1:])
    mask[..., 2:] = 1
    x = start(plans, draw_noise([image_generator(0), image_generator(1)], SHAPE), latents)
    denoise, known = as_denoiser(network, "v_prediction"), KnownRegion(mask, latents)
    states = [step.x for step in sample(denoise, plans, x, known=known)]
    assert torch.equal(states[-1][..., :2], latents[..., :2])
    assert not torch.equal(states[3][1, ..., :2], latents[1, ..., :2])  # the other is still on its way
    assert torch.equal(states[3][0], states[-1][0])


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
