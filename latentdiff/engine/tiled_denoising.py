"""Denoise large latents in overlapping windows that share every sampling step (MultiDiffusion).

At every call of the network its output is computed window by window and joined with weights that rise smoothly from a
window's edge and add up to one, so that no seam can arise: the sampler has one x, and noise of the whole. One window
over everything, of sides that the network can halve as often as it does, is the network itself.

Source: Bar-Tal et al. 2023, arXiv 2302.08113, Eq. 5 (the least-squares fit of all windows is their weighted mean).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

__all__ = ["Windows", "make_windows", "tiled"]

OVERLAP = 1 / 4  # of a window's side, at least

# Yields each window of a map (b, C, tall, wide), is sent the network's output for it, and returns the joined map.
Looks = Generator[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Windows:
    """The windows in which a map is looked at.

    Attributes:
        height, width: of the map.
        rows, columns: where they start, along each side of the map as it is filled up by reflection.
        tall, wide: of each window; filled up, the map ends where the last ones do.
    """

    height: int
    width: int
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    tall: int
    wide: int

    def __len__(self) -> int:
        return len(self.rows) * len(self.columns)

    @property
    def is_map(self) -> bool:
        """Whether there is one window, and it is the map as it stands."""
        return (self.tall, self.wide) == (self.height, self.width)


def make_windows(height: int, width: int, side: tuple[int, int], multiple: int) -> Windows:
    """Return windows that cover a map, evenly spaced, each two neighbours sharing a quarter of their side or more.

    Args:
        height, width: of the map.
        side: height and width of a window at most, above 0; they are rounded up to `multiple`.
        multiple: of which all sides and places of windows are, so that what the network halves lies on one grid.
    """
    (rows, tall), (columns, wide) = (
        _starts(-(-length // multiple), -(-most // multiple)) for length, most in zip((height, width), side)
    )
    return Windows(
        height,
        width,
        tuple(start * multiple for start in rows),
        tuple(start * multiple for start in columns),
        tall * multiple,
        wide * multiple,
    )


def _starts(length: int, most: int) -> tuple[list[int], int]:
    """Return where the windows of one axis start, and how long they are, in units of the multiple."""
    if length <= most:
        return [0], length
    step = max(1, most - math.ceil(most * OVERLAP))
    count = 1 + -(-(length - most) // step)
    return [i * (length - most) // (count - 1) for i in range(count)], most


def tiled(windows: Windows | None) -> Callable[[Tensor], Looks]:
    """Return how a map is looked at through windows: what is called for each map.

    Args:
        windows: of all maps, whose sides are multiples of theirs; None for the whole map at once.
    """
    if windows is None or windows.is_map:
        return _whole
    heights, widths = (_weights(starts, side) for starts, side in _axes(windows))
    shares = torch.stack([torch.outer(down, along) for down, along in product(heights, widths)])  # (n, tall, wide)
    sent: dict[torch.device, Tensor] = {}  # the same in float32, once for each device

    def joined(inputs: Tensor) -> Looks:
        filled = _filled(inputs, windows)
        if inputs.device not in sent:
            sent[inputs.device] = shares.to(inputs.device, torch.float32)
        total: Tensor | None = None
        for (top, left), share in zip(product(windows.rows, windows.columns), sent[inputs.device]):
            place = (..., slice(top, top + windows.tall), slice(left, left + windows.wide))
            output = (yield filled[place]).float()
            if total is None:
                total = output.new_zeros(*output.shape[:2], *filled.shape[2:])
            total[place] += output * share
        assert total is not None
        return total[..., : windows.height, : windows.width]

    return joined


def _whole(inputs: Tensor) -> Looks:
    return (yield inputs)


def _axes(windows: Windows) -> tuple[tuple[tuple[int, ...], int], tuple[tuple[int, ...], int]]:
    return (windows.rows, windows.tall), (windows.columns, windows.wide)


def _weights(starts: tuple[int, ...], side: int) -> list[Tensor]:
    """Return the weights (side,) of each window along one axis, float64; their sum is one at every place."""
    rise = (torch.arange(side, dtype=torch.float64) + 0.5) / side  # (side,)
    bump = (math.pi * rise).sin().square()
    total = torch.zeros(starts[-1] + side, dtype=torch.float64)
    for start in starts:
        total[start : start + side] += bump
    return [bump / total[start : start + side] for start in starts]


def _filled(inputs: Tensor, windows: Windows) -> Tensor:
    """Return a map that reaches to the end of the last windows, mirrored at its border, however small it is."""
    for axis, (starts, side) in zip((2, 3), _axes(windows)):
        length = inputs.shape[axis]
        places = torch.arange(starts[-1] + side, device=inputs.device) % (2 * length)
        inputs = inputs.index_select(axis, torch.minimum(places, 2 * length - 1 - places))
    return inputs
