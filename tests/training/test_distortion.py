"""Distorted pictures: moved as before, turned, recoloured without another hue, and covered as often as is said."""

from __future__ import annotations

import colorsys
import math

import numpy as np
import pytest
import torch
from latentdiff.training.data.distortion import bent, covered, distorted, draw_distortion, placed, recoloured

PLACES = torch.tensor([[0.5, 1.0, -1.0], [1.0, 0.0, 0.0]])


def chances(count: int) -> torch.Tensor:
    return torch.tensor(np.stack([draw_distortion(np.random.default_rng(seed)) for seed in range(count)])).float()


def test_without_strength_a_view_is_placed_alone() -> None:
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = distorted(images, PLACES, chances(2), 0.0)
    assert torch.equal(found, placed(images, PLACES)) and torch.allclose(found[1], images[1], atol=1e-5)
    half = torch.nn.functional.avg_pool2d(images[0], 2)
    assert torch.allclose(found[0, :, :8, 8:], half, atol=1e-5)  # at half the size, in the corner at the right and top


def test_a_view_is_turned_by_the_angle() -> None:
    dot = torch.full((1, 3, 33, 33), -1.0)
    dot[:, :, 16, 26] = 1.0  # 10 pixels to the right of the middle
    quarter = bent(torch.tensor([[math.pi / 2 / math.radians(30), 0.0, 0.0]]))
    found = placed(dot, PLACES[1:], quarter)[0, 0]
    assert divmod(int(found.argmax()), 33) == (6, 16)
    assert torch.allclose(torch.linalg.det(bent(chances(9)[:, :3])), torch.ones(9))  # neither larger nor smaller


def test_colours_keep_their_hue_where_channels_keep_their_balance() -> None:
    red, given = torch.tensor([0.5, -0.4, -0.8])[None, :, None, None], chances(9)[:, 3:9]
    given[:, 3:] = 0
    for colour in recoloured(red.expand(9, 3, 2, 2), given):
        hue, _, _ = colorsys.rgb_to_hsv(*(colour[:, 0, 0] / 2 + 0.5).tolist())
        assert hue == pytest.approx(colorsys.rgb_to_hsv(0.75, 0.3, 0.1)[0], abs=0.03)
    assert torch.allclose(recoloured(red, torch.zeros(1, 6)), red)


@pytest.mark.parametrize("strength, share", [(0.0, 0.0), (0.5, 0.25), (1.0, 0.5)])
def test_as_many_are_covered_as_the_strength_says(strength: float, share: float) -> None:
    given = chances(2000)[:, 9:16]
    given[:, 1:3] = 0  # in the middle, where even a small box covers something
    given[:, 3] = 0
    found = covered(torch.full((2000, 3, 8, 8), 2.0), given, strength)
    assert (found != 2).flatten(1).any(dim=1).float().mean().item() == pytest.approx(share, abs=0.04)
