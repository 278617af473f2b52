"""Fold a model into the tables of a batch, so that rows are applied to what its network takes and gives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from latentdiff.diffusion.plan import Plan
from latentdiff.diffusion.prediction import Denoiser

__all__ = ["Batch", "fold", "folded"]


class Batch(NamedTuple):
    """Tables of a batch, in terms of the network's own inputs and outputs: slot 0 is its next input.

    sigmas, timesteps: (R, B).
    c_in, c_next, of_input, of_output, noise_range: (R, B, 1, 1, 1); c_next is the c_in of the next row, and denoised =
        of_input * input + of_output * output.
    noise: (R, S, B, 1, 1, 1).
    matrices: (R, S, S + 1, B, 1, 1, 1).
    """

    sigmas: Tensor
    timesteps: Tensor
    c_in: Tensor
    c_next: Tensor
    of_input: Tensor
    of_output: Tensor
    noise_range: Tensor
    noise: Tensor
    matrices: Tensor

    def part(self, begin: int, end: int, images: Tensor) -> Batch:
        """Return some rows of some images."""
        if begin == 0 and end == len(self.sigmas) and len(images) == self.sigmas.shape[1]:
            return self
        *tables, noise, matrices = (table[begin:end] for table in self)
        picked = [table.index_select(1, images) for table in tables]
        return Batch._make([*picked, noise.index_select(2, images), matrices.index_select(3, images)])

    def columns(self) -> tuple[Tensor, ...]:
        """Return each column of the matrices, (R, S, B, 1, 1, 1)."""
        return self.matrices.unbind(2)

    def estimate(self, row: int, inputs: Tensor, output: Tensor) -> Tensor:
        """Return the x0 estimates (B, C, H, W) of a row."""
        return self.of_input[row] * inputs + self.of_output[row] * output

    def output(self, row: int, inputs: Tensor, estimate: Tensor) -> Tensor:
        """Return the outputs (B, C, H, W) of a row that would give these x0 estimates."""
        return (estimate - self.of_input[row] * inputs) / self.of_output[row]


def fold(denoiser: Denoiser, plans: Sequence[Plan], x: Tensor) -> Batch:
    """Join the plans of a batch, zeros where one has fewer rows or slots than the largest, and fold the denoiser in.

    With D = c_skip x + c_out F and the network's input u = c_in x, a row on (x, ..., D) becomes one on (u, ..., F).
    """
    rows, size = max(len(plan) for plan in plans), max(plan.noise.shape[1] for plan in plans)
    each = [plan.padded(rows, size) for plan in plans]
    sigmas, timesteps, noise_range, noise, matrices = (  # in NumPy, whose small operations are quicker
        np.stack([getattr(plan, name).numpy() for plan in each], axis=-1)
        for name in ("sigmas", "timesteps", "noise_range", "noise", "matrices")
    )
    c_skip, c_out, c_in = (factor.numpy() for factor in denoiser.factors(torch.from_numpy(sigmas)))  # (R, B)
    c_next = np.append(c_in[1:], np.ones_like(c_in[:1]), axis=0)
    c_next[[len(plan) - 1 for plan in plans], range(len(plans))] = 1  # the last row lands in VP coordinates
    matrices[:, :, 0] = (matrices[:, :, 0] + matrices[:, :, -1] * c_skip[:, None]) / c_in[:, None]
    matrices[:, :, -1] *= c_out[:, None]
    matrices[:, 0] *= c_next[:, None]
    noise[:, 0] *= c_next
    tables = (c_in, c_next, c_skip / c_in, c_out, noise_range, noise, matrices)
    shaped = [table.reshape(*table.shape, *[1] * (x.ndim - 1)) for table in tables]
    return Batch(*(torch.from_numpy(table).to(x.dtype).to(x.device) for table in (sigmas, timesteps, *shaped)))


def folded(denoiser: Denoiser, plan: Plan) -> dict[str, np.ndarray]:
    """Return the numbers of a plan as they are applied to one image, float32, by the names in `Batch`.

    Returns:
        c_in, c_next (R,), noise (R, S), matrices (R, S, S + 1): rows on the network's own inputs and outputs.
    """
    batch = fold(denoiser, [plan], torch.zeros(1))
    return {name: getattr(batch, name)[..., 0].numpy() for name in ("c_in", "c_next", "noise", "matrices")}
