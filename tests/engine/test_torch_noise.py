"""Noise without torch is torch's: to the bit where it has the same polynomials, else to rounding."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from latentdiff.diffusion.loop import draw_noise, image_generator
from latentdiff.engine.torch_noise import TorchNoise, agrees_with_torch

SHAPES = [(4, 16, 16), (16,), (4, 8, 9), (3, 17), (4, 16, 16)]  # in turn, some no multiple of 16
SAME = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


@pytest.mark.parametrize("seed", [0, 7, 2**32 + 5, 2**63 - 1])
def test_numbers_are_those_of_torch(seed: int) -> None:
    noise, generator = TorchNoise(seed), image_generator(seed)
    for shape in SHAPES:
        drawn, expected = noise.draw(shape), draw_noise([generator], shape)[0].numpy()
        assert drawn.dtype == np.float32 and drawn.shape == shape
        assert np.abs(drawn - expected).max() < 1e-5
        assert not SAME or np.array_equal(drawn, expected)


def test_many_numbers_are_those_of_torch() -> None:
    drawn, expected = TorchNoise(3).draw((2**20,)), torch.randn(2**20, generator=image_generator(3)).numpy()
    assert np.array_equal(drawn, expected) if SAME else np.abs(drawn - expected).max() < 1e-5


def test_it_is_known_whether_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    assert agrees_with_torch() or not SAME
    draw = TorchNoise.draw
    monkeypatch.setattr(TorchNoise, "draw", lambda noise, shape: np.nextafter(draw(noise, shape), np.float32(9)))
    assert not agrees_with_torch()
