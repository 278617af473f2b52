"""How many pictures go through an autoencoder at once, and in which precision it runs while a U-Net is trained."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from latentdiff.training.config import ObjectiveConfig
from latentdiff.training.data import latents
from latentdiff.training.data.batches import Batch
from latentdiff.training.losses.diffusion import loss_terms
from latentdiff.training.monitor.reconstructions import in_parts
from torch import Tensor, nn

from latentdiff.diffusion import NoiseSchedule


@pytest.mark.parametrize(("side", "expected"), [(64, [64, 6]), (128, [16] * 4 + [6]), (512, [1] * 70)])
def test_pictures_are_encoded_by_their_pixels(side: int, expected: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """64 of 512 x 512 pixels would take 25 GB."""
    seen: list[int] = []

    class Autoencoder(nn.Module):
        config = SimpleNamespace(scaling_factor=2.0)

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(()))

        def encode(self, images: Tensor) -> Any:
            seen.append(len(images))
            return SimpleNamespace(mode=lambda: images[:, :, :1, :1])

    black = np.zeros((side, side, 3), dtype=np.uint8)
    monkeypatch.setattr(latents, "paint_all", lambda data, group: [black] * len(group))
    variants: Any = [SimpleNamespace(index=number) for number in range(70)]
    components: Any = SimpleNamespace(autoencoder=Autoencoder())
    found = latents._encode_pictures(None, variants, components)  # type: ignore[arg-type]
    assert seen == expected and found.shape == (70, 3, 1, 1) and bool((found == -2).all())


@pytest.mark.parametrize(("side", "most"), [(64, 32), (128, 32), (512, 2), (2048, 1)])
def test_an_autoencoder_is_measured_by_pixels_too(side: int, most: int) -> None:
    parts = in_parts(torch.empty(33, 3, side, side, device="meta"))
    assert max(map(len, parts)) == most and sum(map(len, parts)) == 33


def test_what_is_kept_of_a_picture_is_encoded_in_float32() -> None:
    """As it is while sampling; in float16 an autoencoder may overflow."""
    autocast: list[bool] = []

    def inputs(components: Any) -> Tensor:
        autocast.append(torch.is_autocast_enabled("cpu"))
        return torch.zeros(2, 5, 4, 4)

    def network(x: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        autocast.append(torch.is_autocast_enabled("cpu"))
        return x[:, :4]

    concat: Any = SimpleNamespace(inputs=inputs, levels=None)
    batch = Batch(torch.ones(2, 4, 4, 4), torch.zeros(2, 1, 8), torch.zeros(2, dtype=torch.bool), {}, concat)
    components: Any = SimpleNamespace(schedule=NoiseSchedule())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = loss_terms(network, components, ObjectiveConfig(), batch, torch.tensor([1, 2]), torch.ones(2, 4, 4, 4))
    assert autocast == [False, True] and terms["simple"].shape == (2,)
