"""Windows over a map: they cover it, their weights add up to one, and none of them shows in what is drawn."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from latentdiff.engine import tiled_denoising
from latentdiff.engine.tiled_denoising import Windows, _filled, _weights, make_windows

SIZES = [(8, 8), (9, 8), (20, 33), (64, 7), (1, 1), (1, 40), (100, 3), (17, 16)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("side", "multiple"), [((8, 8), 1), ((8, 8), 2), ((16, 8), 4), ((5, 12), 4), ((3, 3), 1)])
def test_windows_cover_the_map_and_share_a_quarter(size: tuple[int, int], side: tuple[int, int], multiple: int) -> None:
    windows = make_windows(*size, side, multiple)
    axes = ((windows.rows, windows.tall), (windows.columns, windows.wide))
    for length, most, (starts, own) in zip(size, side, axes):
        assert starts[0] == 0 and length <= starts[-1] + own < length + multiple
        assert own <= -(-most // multiple) * multiple
        assert all(number % multiple == 0 for number in (*starts, own))
        gaps = [second - first for first, second in pairwise(starts)]
        assert all(0 < gap <= max(multiple, own - own // 4) for gap in gaps)
        total = torch.zeros(starts[-1] + own, dtype=torch.float64)
        for start, weights in zip(starts, _weights(starts, own)):
            assert weights.min() > 0
            total[start : start + own] += weights
        assert torch.allclose(total, torch.ones_like(total), rtol=0, atol=1e-15)


def test_weights_rise_smoothly() -> None:
    """At the edge of a window, inside the map, it has next to no say; no step is larger than it has to be."""
    windows = make_windows(40, 40, (16, 16), 1)
    for place, weights in enumerate(_weights(windows.rows, 16)):
        assert (float(weights[0]) < 0.05) == (place > 0)
        assert (float(weights[-1]) < 0.05) == (place < len(windows.rows) - 1)
        assert weights.diff().abs().max() < 0.5  # over the four places that two windows share


def test_a_map_is_mirrored_as_far_as_it_takes() -> None:
    x = torch.arange(3.0).reshape(1, 1, 1, 3)
    filled = _filled(x, Windows(1, 3, (0,), (0,), 2, 10))
    assert filled[0, 0].tolist() == [[0, 1, 2, 2, 1, 0, 0, 1, 2, 2]] * 2


def halving(inputs: Tensor, rows: Tensor) -> Tensor:
    """A network that needs sides divisible by four: it sees far, and returns fewer channels."""
    assert inputs.shape[2] % 4 == inputs.shape[3] % 4 == 0
    coarse = F.avg_pool2d(inputs, 4)
    fine = F.interpolate(coarse, scale_factor=4, mode="nearest") * rows[:, None, None, None]
    return (inputs + fine)[:, :2].tanh()


MapNetwork = Callable[[Tensor, Tensor], Tensor]


def tiled(network: MapNetwork, windows: Windows | None) -> MapNetwork:
    """Return a network that looks at a map through windows."""
    look = tiled_denoising.tiled(windows)

    def joined(inputs: Tensor, rows: Tensor) -> Tensor:
        looks = look(inputs)
        window = next(looks)
        while True:
            try:
                window = looks.send(network(window, rows))
            except StopIteration as done:
                return done.value

    return joined


def test_one_window_over_all_is_the_network_itself() -> None:
    inputs, rows = torch.randn(3, 4, 12, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 2, 3])
    for windows in (None, make_windows(12, 8, (12, 8), 4), make_windows(12, 8, (99, 9), 4)):
        seen = next(tiled_denoising.tiled(windows)(inputs))
        assert seen is inputs and torch.equal(tiled(halving, windows)(inputs, rows), halving(inputs, rows))
    ragged = make_windows(11, 6, (12, 8), 4)
    assert len(ragged) == 1 and not ragged.is_map
    own = tiled(halving, ragged)(inputs[:, :, :11, :6], rows)
    assert torch.equal(own, halving(_filled(inputs[:, :, :11, :6], ragged), rows)[:, :, :11, :6])  # to the bit


def test_pointwise_networks_do_not_see_windows() -> None:
    inputs = torch.randn(2, 3, 21, 50, generator=torch.Generator().manual_seed(0))
    network = tiled(lambda x, rows: x.sin() * rows[:, None, None, None], make_windows(21, 50, (8, 12), 4))
    expected = inputs.sin() * torch.tensor([1.0, 2.0])[:, None, None, None]
    assert torch.allclose(network(inputs, torch.tensor([1, 2])), expected, atol=1e-6)
    half = tiled(lambda x, rows: x, make_windows(21, 50, (8, 12), 4))(inputs.half(), torch.tensor([1, 1]))
    assert half.dtype == torch.float32 and torch.allclose(half, inputs.half().float(), atol=1e-6)


def test_a_network_that_sees_far_leaves_no_seams() -> None:
    """Where windows begin and end, what is joined jumps no more than elsewhere; put side by side, it does."""
    inputs = torch.randn(1, 2, 48, 48, generator=torch.Generator().manual_seed(0))
    rows = torch.ones(1)

    def brightness(x: Tensor, rows: Tensor) -> Tensor:
        return x.mean(dim=(2, 3), keepdim=True).expand_as(x) * 10 + torch.linspace(0, 1, x.shape[3])

    windows = make_windows(48, 48, (16, 16), 4)
    joined = tiled(brightness, windows)(inputs, rows)
    jumps = joined.diff(dim=3).abs().amax(dim=(0, 1, 2))
    edges = sorted({place - 1 for start in windows.columns for place in (start, start + 16) if 0 < place < 48})
    inside = [place for place in range(47) if place not in edges]
    assert jumps[edges].max() < 0.2 * jumps[inside].max()
    apart = torch.cat([brightness(part, rows) for part in inputs.split(16, dim=3)], dim=3)
    assert apart.diff(dim=3).abs()[..., [15, 31]].max() > 10 * jumps[edges].max()
