"""Samplers as tables of numbers, and how to write one down."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = ["Rows", "Table", "steps"]

Vector = np.ndarray  # coefficients of the slots and of D, (S + 1,) float64


def steps(sigmas: Tensor) -> Iterator[tuple[float, float]]:
    """Yield each noise level with the one that follows."""
    return pairwise(sigmas.tolist())


class Table(NamedTuple):
    """The R rows of a solver with S slots, float64.

    Attributes:
        matrices: (R, S, S + 1), from the slots and D to the next slots.
        noise: (R, S), factors of the fresh noise that joins them.
        sigmas: (R,), the noise level of slot 0 when the network is called; a step may take several calls.
        between: (R,) bool, whether that is a level of the solver's own and not one of the grid.
        noise_range: (R,), natural logarithm of how many times larger the noise of slot 0 may be where the network
            learns its variance; 0 where that makes no difference.
    """

    matrices: Tensor
    noise: Tensor
    sigmas: Tensor
    between: Tensor
    noise_range: Tensor


class Rows:
    """Collects the rows of a table.

    Args:
        slots: how many; slot 0 is the x at which the network is called, the others are the solver's memory.
    """

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.matrices: list[Vector] = []
        self.noise: list[list[float]] = []
        self.sigmas: list[float] = []
        self.between: list[bool] = []
        self.noise_range: list[float] = []

    @property
    def state(self) -> Vector:
        """Slots and D before a row, as unit vectors: `x, *memory, D = rows.state`."""
        return np.eye(self.slots + 1)

    def add(
        self,
        sigma: float,
        *slots: Vector,
        noise: float = 0.0,
        noise_range: float = 0.0,
        keep_noise: bool = False,
        between: bool = False,
    ) -> None:
        """Add the row whose network call is at `sigma`.

        Args:
            slots: what the slots become; those left out become 0.
            noise: factor of the fresh noise that joins slot 0.
            keep_noise: remember the noise itself in the last slot.
            noise_range, between: see `Table`.
        """
        row = np.zeros((self.slots, self.slots + 1))
        row[: len(slots)] = slots
        self.matrices.append(row)
        self.noise.append([noise, *[0.0] * (self.slots - 2), *[float(keep_noise)] * (self.slots > 1)])
        self.sigmas.append(sigma)
        self.between.append(between)
        self.noise_range.append(noise_range)

    def table(self) -> Table:
        """Return all rows."""
        numbers = (self.noise, self.sigmas, self.between, self.noise_range)
        return Table(*(torch.from_numpy(np.array(column)) for column in (self.matrices, *numbers)))
