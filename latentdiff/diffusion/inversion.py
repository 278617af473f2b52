"""DDIM inversion: from data back to the noise that it is drawn from."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor

from latentdiff.diffusion.plan import Plan
from latentdiff.diffusion.samplers import SAMPLERS
from latentdiff.diffusion.schedule import NoiseSchedule
from latentdiff.diffusion.table import Rows, Table
from latentdiff.errors import InputError

__all__ = ["ddim_inversion", "make_inversion_plan"]


def make_inversion_plan(schedule: NoiseSchedule, num_inference_steps: int, iterations: int = 1) -> Plan:
    """Make the table that turns scaled latents into the noise from which `ddim` makes them again.

    Run it with `sample(denoise, plan, latents)`; the last x is what `start` takes as `noise`.

    Args:
        schedule: the model's.
        num_inference_steps: steps of the run to invert.
        iterations: 1 or more network calls a step; see `ddim_inversion`.

    Raises:
        InputError: a number out of range.
    """
    if iterations < 1:
        raise InputError(f"iterations must be 1 or more, got {iterations}; try 3")
    grid = schedule.discretize(num_inference_steps, SAMPLERS["ddim"].rule)
    table = ddim_inversion(grid.sigmas, iterations)
    table.matrices[-1, 0] /= grid.init_noise_sigma
    timesteps = grid.timesteps.flip(0).repeat_interleave(iterations)
    return Plan(timesteps, table.sigmas, table.matrices, table.noise, grid.init_noise_sigma, table.noise_range)


def ddim_inversion(sigmas: Tensor, iterations: int = 1) -> Table:
    """Invert `ddim` at eta 0, from data to noise: the levels are climbed in the opposite order.

    Each step solves the equation that the forward step is for the x it started from: a Newton iteration, in which the
    estimate is taken to change with x as that of standard normal data does. It begins where the last noise estimate
    leads.

    Args:
        sigmas: (N + 1,) float64, falling, as those of the forward run.
        iterations: network calls a step; one is the usual approximation, more come closer to what the run started from.

    Source: Mokady et al. 2023, arXiv 2211.09794, section 3.1; Pan et al. 2023, arXiv 2309.04907, Eq. 8 (iterations).
    """
    rows, levels = Rows(2), sigmas.flip(0).tolist()
    for index, (start, sigma) in enumerate(pairwise(levels)):
        share = (sigma - start) / sigma
        slope = 1 - share * (1 - 1 / (1 + sigma**2))  # of the residual, over x
        for iteration in range(iterations):
            x, base, D = rows.state
            base = base if index or iteration else x
            solution = x - (x - base - share * (x - D)) / slope
            if iteration < iterations - 1 or index == len(levels) - 2:
                rows.add(sigma, solution, base)
            else:
                rows.add(sigma, solution + (levels[index + 2] - sigma) * (x - D) / sigma, solution)
    return rows.table()
