"""A sampler's table for one model: which noise levels are visited, and what happens at each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from latentdiff.diffusion.discretization import DISCRETIZATION_RULES, Discretization
from latentdiff.diffusion.samplers import SAMPLERS, Sampler
from latentdiff.diffusion.schedule import NoiseSchedule
from latentdiff.diffusion.spacing import SIGMA_SPACINGS
from latentdiff.diffusion.table import Table
from latentdiff.errors import InputError, suggest

__all__ = ["EXTERNAL", "Plan", "make_plan", "overshoot", "overshoot_note", "parse_sampler", "skipped_steps"]

LARGEST_OVERSHOOT = 3.0  # second-order samplers reach it in 2 to 4 calls
EXTERNAL = "diffusers:"  # in settings, before the class of a scheduler object that stood in for a sampler


@dataclass(frozen=True, eq=False)
class Plan:
    """All the numbers of one image's sampling run, float64 on the CPU, R rows with one network call each.

    Attributes:
        timesteps: (R,), the network's timestep input.
        sigmas: (R,), noise level of x when the network is called.
        matrices: (R, S, S + 1).
        noise: (R, S).
        init_noise_sigma: factor that makes standard normal noise the initial x of text-to-image.
        noise_range: (R,), see `Table`.
    """

    timesteps: Tensor
    sigmas: Tensor
    matrices: Tensor
    noise: Tensor
    init_noise_sigma: float
    noise_range: Tensor

    def __len__(self) -> int:
        return len(self.sigmas)

    def padded(self, rows: int, slots: int) -> Plan:
        """Return the same with as many rows and slots, those that are new all zero."""
        count, own = self.noise.shape
        if (count, own) == (rows, slots):
            return self
        matrices = self.matrices.new_zeros(rows, slots, slots + 1)
        matrices[:count, :own, :own], matrices[:count, :own, -1] = self.matrices[..., :-1], self.matrices[..., -1]
        more = rows - count
        return Plan(
            timesteps=pad(self.timesteps, (0, more)),
            sigmas=pad(self.sigmas, (0, more)),
            matrices=matrices,
            noise=pad(self.noise, (0, slots - own, 0, more)),
            init_noise_sigma=self.init_noise_sigma,
            noise_range=pad(self.noise_range, (0, more)),
        )


def parse_sampler(name: str) -> tuple[Sampler, str | None]:
    """Return the sampler called `name` and the sigma spacing that a suffix such as `_karras` asks for, or None.

    Raises:
        InputError: unknown name; the nearest one is offered.
    """
    if str(name).startswith(EXTERNAL):
        raise InputError(f"{name} was a scheduler object, which only Python can pass again; pass sampler=scheduler")
    base, spacing = str(name), None
    if base not in SAMPLERS and "_" in base:
        base, spacing = base.rsplit("_", 1)
    if base not in SAMPLERS or spacing not in {None, *SIGMA_SPACINGS}:
        ending = f"_{spacing}" if spacing in SIGMA_SPACINGS else ""
        near = [key + ending for key in SAMPLERS]
        near += [f"{base}_{other}" for other in SIGMA_SPACINGS if base in SAMPLERS]
        raise InputError(f"sampler {name!r} is unknown{suggest(str(name), near)}")
    return SAMPLERS[base], spacing


def make_plan(
    schedule: NoiseSchedule,
    sampler: str,
    num_inference_steps: int | None = None,
    *,
    sigmas: Sequence[float] | None = None,
    timesteps: Sequence[float] | None = None,
    eta: float = 0.0,
    strength: float = 1.0,
    resampling: int = 1,
) -> Plan:
    """Make the table of a sampling run.

    Args:
        schedule: the model's.
        sampler: a key of `SAMPLERS`, optionally followed by `_` and a key of `SIGMA_SPACINGS`, as in dpmpp_2m_karras.
        num_inference_steps: 1 to schedule.num_train_timesteps; or else
        sigmas: the noise levels themselves, falling; a last one of 0 is added where it is missing; or else
        timesteps: those of the network calls, falling, within those of training.
        eta: 0 to 1, for ddim only: 0 is deterministic, 1 as noisy as ddpm.
        strength: above 0, up to 1; image-to-image skips the first rows, keeping int(num_inference_steps * strength).
        resampling: how often each step is taken; before each repetition x is noised back to where the step began, which
            lets what an inpainting draws come to fit what is known.

    Raises:
        InputError: a value out of range, an unknown sampler, or a strength that leaves no row.

    Source: resampling: Lugmayr et al. 2022, arXiv 2201.09865, algorithm 1 with jumps of one step.
    """
    solver, _ = parse_sampler(sampler)
    levels = _levels(schedule, sampler, num_inference_steps, sigmas, timesteps)
    if not 0 <= eta <= 1:
        raise InputError(f"eta must be a number from 0 to 1, got {eta}; try 0")
    if eta and "eta" not in solver.takes:
        raise InputError(f"eta is an option of ddim, got eta={eta} with {sampler}; leave it out or choose ddim")
    skipped = skipped_steps(len(levels.timesteps), strength)
    visited = levels.sigmas[skipped:]
    offered = {
        "eta": eta,
        "middles": _middles(schedule, levels.timesteps[skipped:]),
        "skipped": skipped,
        "timesteps": levels.timesteps[skipped:],
        "variance": schedule.variance_type,
    }
    table = solver.table(visited, **{name: offered[name] for name in solver.takes})
    if resampling != 1:
        table = _resampled(table, visited, resampling, sampler)
    # Land in VP coordinates, x / sqrt(1 + sigma^2): a change only where the schedule does not end at sigma 0.
    landing = torch.ones_like(table.noise)
    if DISCRETIZATION_RULES[solver.rule].unit_variance_start:
        landing[-1, 0] = 1 / math.hypot(1, float(visited[-1]))
    nearest = (table.sigmas[:, None] - levels.sigmas[:-1]).abs().argmin(dim=1)  # equal, but for rounding
    return Plan(
        timesteps=torch.where(table.between, schedule.timesteps_of(table.sigmas), levels.timesteps[nearest]),
        sigmas=table.sigmas,
        matrices=table.matrices * landing[:, :, None],
        noise=table.noise * landing,
        init_noise_sigma=levels.init_noise_sigma,
        noise_range=table.noise_range,
    )


def _levels(
    schedule: NoiseSchedule,
    sampler: str,
    num_inference_steps: int | None,
    sigmas: Sequence[float] | None,
    timesteps: Sequence[float] | None,
) -> Discretization:
    """Return the noise levels that are visited: so many, or those given."""
    solver, spacing = parse_sampler(sampler)
    if [num_inference_steps, sigmas, timesteps].count(None) != 2:
        raise InputError("a plan needs either num_inference_steps or sigmas or timesteps; pass one, such as 20 steps")
    if spacing is not None and num_inference_steps is None:
        given = "timesteps" if sigmas is None else "sigmas"
        raise InputError(f"{given} are given, so {sampler} cannot space them; leave _{spacing} out")
    if sigmas is not None:
        return schedule.at_sigmas(sigmas, solver.rule)
    if timesteps is not None:
        return schedule.at_timesteps(timesteps, solver.rule)
    return schedule.discretize(num_inference_steps, solver.rule, spacing)  # type: ignore[arg-type]  # not None


def _middles(schedule: NoiseSchedule, timesteps: Tensor) -> Tensor:
    """Return the noise levels (N,) halfway between timesteps (N,) and the next ones, which rounds as diffusers does."""
    gaps = timesteps - pad(timesteps[1:], (0, 1))
    places = (timesteps - (gaps // 2)).clamp(min=0)
    return torch.from_numpy(np.interp(places.numpy(), np.arange(schedule.num_train_timesteps), schedule.sigmas.numpy()))


def _resampled(table: Table, visited: Tensor, resampling: int, sampler: str) -> Table:
    """Return a table each of whose steps is taken several times, all but the last ending with noise back to its level.

    The memory of a multistep solver is of earlier levels, so a repetition leaves it as it is.
    """
    if isinstance(resampling, bool) or not isinstance(resampling, int) or not 1 <= resampling <= 100:
        raise InputError(f"resampling must be an integer from 1 to 100, got {resampling!r}; try 5")
    slots = table.noise.shape[1]
    if len(table.sigmas) != len(visited) - 1 or sampler.startswith(("unipc", "dpmpp_2s")):
        raise InputError(f"resampling needs a sampler that calls the network once a step, got {sampler}; try dpmpp_2m")
    back = table.matrices.clone()
    back[:, 1:] = torch.eye(slots, slots + 1, dtype=back.dtype)[1:]
    renoised = torch.zeros_like(table.noise)
    renoised[:, 0] = (table.noise[:, 0] ** 2 + visited[:-1] ** 2 - visited[1:] ** 2).sqrt()
    rows = torch.arange(len(table.sigmas)).repeat_interleave(resampling)
    last = torch.arange(1, len(rows) + 1) % resampling == 0
    return Table(
        matrices=torch.where(last[:, None, None], table.matrices[rows], back[rows]),
        noise=torch.where(last[:, None], table.noise[rows], renoised[rows]),
        sigmas=table.sigmas[rows],
        between=table.between[rows],
        noise_range=table.noise_range[rows] * last,
    )


def overshoot(plan: Plan) -> float:
    """Return the variance of what a plan makes of standard normal data; 1 if it solves its equation.

    Few steps give less, which looks smooth. More is noise that is left, or a solver that has become unstable.
    """
    slots = plan.noise.shape[1]
    covariance = np.zeros((slots, slots))
    covariance[0, 0] = 1 + float(plan.sigmas[0]) ** 2
    for sigma, matrix, noise in zip(plan.sigmas.tolist(), plan.matrices.numpy(), plan.noise.numpy()):
        linear = matrix[:, :-1].copy()
        linear[:, 0] += matrix[:, -1] / (1 + sigma**2)  # the exact estimate of x
        covariance = linear @ covariance @ linear.T + np.outer(noise, noise)
    return float(abs(covariance[0, 0]))


def overshoot_note(plan: Plan, sampler: str) -> str | None:
    """Return a warning where a plan leaves noise or is unstable, None for a sound one; see `overshoot`."""
    variance = overshoot(plan)
    if variance <= LARGEST_OVERSHOOT:
        return None
    return (
        f"{sampler} in {len(plan)} calls leaves noise or is unstable: Gaussian data would come out with {variance:.3g} "
        "times its variance; take more steps, another spacing, or dpmpp_2m"
    )


def skipped_steps(num_inference_steps: int, strength: float) -> int:
    """Return how many steps image-to-image leaves out.

    Raises:
        InputError: strength is out of range or leaves no step.
    """
    if not 0 < strength <= 1:
        raise InputError(f"strength must be a number above 0 and up to 1, got {strength}; try 0.6")
    skipped = num_inference_steps - int(num_inference_steps * strength)
    if skipped == num_inference_steps:
        raise InputError(
            f"strength must leave at least one of {num_inference_steps} steps, got {strength}; "
            f"try strength {math.ceil(100 / num_inference_steps) / 100} or more steps"
        )
    return skipped
