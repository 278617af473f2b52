"""Samplers as tables of numbers, and the one loop that runs them.

An explicit solver is a linear recurrence. An image keeps a few slots, slot 0 being the x at which the network is called
next. With D_i = denoise(slot 0) at sigma_i, row i of its table is

    slots' = matrices[i] @ [slots, D_i] + noise[i] * fresh standard normal noise

so a sampler is a function from falling sigmas to such rows (`solvers.py`), nothing is mutable, and images with
different samplers and step counts can share a batch. Tables are float64, applied in float32 (or float64 if x is).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from latentdiff.diffusion.prediction import Call, Denoise, Denoiser
from latentdiff.diffusion.schedule import NoiseSchedule
from latentdiff.diffusion.solvers import SAMPLERS, Sampler, ddim_inversion
from latentdiff.diffusion.spacing import SIGMA_SPACINGS
from latentdiff.errors import InputError, suggest

__all__ = [
    "FOREIGN",
    "SAMPLERS",
    "Known",
    "Plan",
    "Step",
    "draw_noise",
    "image_generator",
    "make_inversion_plan",
    "make_plan",
    "parse_sampler",
    "sample",
    "start",
]


FOREIGN = "diffusers:"  # in settings, before the class of a scheduler object that stood in for a sampler


@dataclass(frozen=True, eq=False)
class Plan:
    """All the numbers of one image's sampling run, float64 on the CPU, R rows with one network call each.

    Attributes:
        timesteps: (R,), what the network is told.
        sigmas: (R,), noise level of x when the network is called.
        matrices: (R, S, S + 1).
        noise: (R, S).
        init_noise_sigma: factor that makes standard normal noise the initial x of text-to-image.
    """

    timesteps: Tensor
    sigmas: Tensor
    matrices: Tensor
    noise: Tensor
    init_noise_sigma: float

    def __len__(self) -> int:
        return len(self.sigmas)


def parse_sampler(name: str) -> tuple[Sampler, str | None]:
    """Return the sampler called `name` and the sigma spacing that a suffix such as `_karras` asks for, or None.

    Raises:
        InputError: unknown name; the nearest one is offered.
    """
    if str(name).startswith(FOREIGN):
        raise InputError(f"{name} was a scheduler object, which only Python can pass again; pass sampler=scheduler")
    base, spacing = str(name), None
    if base not in SAMPLERS and "_" in base:
        base, spacing = base.rsplit("_", 1)
    if base not in SAMPLERS or spacing not in {None, *SIGMA_SPACINGS}:
        ending = f"_{spacing}" if spacing in SIGMA_SPACINGS else ""
        raise InputError(f"sampler {name!r} is unknown{suggest(str(name), [key + ending for key in SAMPLERS])}")
    return SAMPLERS[base], spacing


def make_plan(
    schedule: NoiseSchedule, sampler: str, num_inference_steps: int, *, eta: float = 0.0, strength: float = 1.0
) -> Plan:
    """Make the table of a sampling run.

    Args:
        schedule: of the model.
        sampler: a key of `SAMPLERS`, optionally followed by `_` and a key of `SIGMA_SPACINGS`, as in dpmpp_2m_karras.
        num_inference_steps: 1 to schedule.num_train_timesteps.
        eta: 0 to 1, for ddim only: 0 is deterministic, 1 as noisy as ddpm.
        strength: above 0, up to 1; image-to-image skips the first rows, keeping int(num_inference_steps * strength).

    Raises:
        InputError: a value out of range, an unknown sampler, or a strength that leaves no row.
    """
    solver, spacing = parse_sampler(sampler)
    grid = schedule.sampling_grid(num_inference_steps, solver.rule, spacing)
    if not 0 <= eta <= 1:
        raise InputError(f"eta must be a number from 0 to 1, got {eta}; try 0")
    if eta and "eta" not in solver.takes:
        raise InputError(f"eta is an option of ddim, got eta={eta} with {sampler}; leave it out or choose ddim")
    skipped = skipped_steps(num_inference_steps, strength)
    sigmas = grid.sigmas[skipped:]
    offered = {"eta": eta, "timesteps": grid.timesteps[skipped:]}
    matrices, noise, levels, between = solver.table(sigmas, **{name: offered[name] for name in solver.takes})
    # Land in VP coordinates, x / sqrt(1 + sigma^2): a change only where the schedule does not end at sigma 0.
    landing = torch.ones_like(noise)
    landing[-1, 0] = 1 / math.hypot(1, float(sigmas[-1]))
    nearest = (levels[:, None] - grid.sigmas[:-1]).abs().argmin(dim=1)  # on the grid, but for rounding
    timesteps = torch.where(between, schedule.timesteps_of(levels), grid.timesteps[nearest])
    return Plan(timesteps, levels, matrices * landing[:, :, None], noise * landing, grid.init_noise_sigma)


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


def make_inversion_plan(schedule: NoiseSchedule, num_inference_steps: int, iterations: int = 1) -> Plan:
    """Make the table that turns scaled latents into the noise from which `ddim` makes them again.

    Run it with `sample(denoise, plan, latents)`; the last x is what `start` takes as `noise`.

    Args:
        schedule: of the model.
        num_inference_steps: of the run to invert.
        iterations: 1 or more network calls a step; see `solvers.ddim_inversion`.

    Raises:
        InputError: a number out of range.
    """
    if iterations < 1:
        raise InputError(f"iterations must be 1 or more, got {iterations}; try 3")
    grid = schedule.sampling_grid(num_inference_steps, SAMPLERS["ddim"].rule)
    matrices, noise, levels, _ = ddim_inversion(grid.sigmas, iterations)
    matrices[-1, 0] /= grid.init_noise_sigma
    timesteps = grid.timesteps.flip(0).repeat_interleave(iterations)
    return Plan(timesteps, levels, matrices, noise, grid.init_noise_sigma)


def image_generator(seed: int) -> torch.Generator:
    """Return the random numbers of one image, a CPU generator: first its initial noise, then what its sampler draws.

    Raises:
        InputError: seed is not an integer from 0 to 2^64 - 1.
    """
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or not 0 <= seed < 2**64:
        raise InputError(f"seed must be an integer from 0 to 2^64 - 1, got {seed!r}; try 0")
    return torch.Generator("cpu").manual_seed(int(seed))


def draw_noise(generators: Sequence[torch.Generator], shape: Sequence[int]) -> Tensor:
    """Draw standard normal noise of `shape` (C, H, W) from each image's own generator: (B, C, H, W) float32, CPU."""
    return torch.stack(
        [torch.randn(tuple(shape), generator=generator, dtype=torch.float32) for generator in generators]
    )


def require_one_each(generators: Sequence[torch.Generator], images: Tensor) -> None:
    """Raise InputError unless there are as many generators as images."""
    if len(generators) != len(images):
        raise InputError(f"one generator per image is needed, got {len(generators)} for {len(images)} images")


def start(plans: Plan | Sequence[Plan], noise: Tensor, image_latents: Tensor | None = None) -> Tensor:
    """Return the initial x (B, C, H, W), in sigma coordinates, in the dtype and on the device of `noise`.

    Args:
        plans: one for all images or one for each.
        noise: (B, C, H, W) standard normal.
        image_latents: (B, C, H, W) scaled latents of the images to start from; None for text-to-image.

    Source: Karras et al. 2022, arXiv 2206.00364, section 2 (x = x0 + sigma noise).
    """
    each = _one_per_image(plans, noise)
    if image_latents is None:
        return noise * _column([plan.init_noise_sigma for plan in each], noise)
    return image_latents + noise * _column([float(plan.sigmas[0]) for plan in each], noise)


@dataclass(frozen=True, eq=False)
class Step:
    """The state of a batch after one row; images whose plan has ended stay as they were.

    Attributes:
        index: rows done before this one; the first Step has 0.
        total: rows of the longest plan.
        make_x, make_denoised: what `x` and `denoised` are computed by, when they are asked for.
    """

    index: int
    total: int
    make_x: Callable[[], Tensor] = field(repr=False)
    make_denoised: Callable[[], Tensor] = field(repr=False)

    @cached_property
    def x(self) -> Tensor:
        """(B, C, H, W) in sigma coordinates; after the last row the sampled latents. Not to be written into."""
        return self.make_x()

    @cached_property
    def denoised(self) -> Tensor:
        """(B, C, H, W), each image's newest x0 estimate, for previews. Not to be written into."""
        return self.make_denoised()


class Known(NamedTuple):
    """What is known of the result beforehand, for inpainting with any model.

    The x0 estimate is replaced there, so x stays exactly on the path from its noise to the known latents, whatever the
    solver, and the rest is drawn to fit.

    Attributes:
        mask: (B, 1, H, W) in [0, 1], 1 where the result is to be drawn, 0 where it is known.
        latents: (B, C, H, W) scaled latents.

    Source: Lugmayr et al. 2022, arXiv 2201.09865, Eq. 8, in terms of the estimate.
    """

    mask: Tensor
    latents: Tensor


def sample(
    denoise: Denoise,
    plans: Plan | Sequence[Plan],
    x: Tensor,
    generators: Sequence[torch.Generator] | None = None,
    known: Known | None = None,
) -> Iterator[Step]:
    """Run the plans row by row, yielding after each; the last Step's `x` is the result.

    Args:
        denoise: made by `prediction.as_denoiser`, or any function (x (b, C, H, W), call) -> x0 estimate (b, C, H, W).
            Images whose plan has ended are left out of x; `call.images` says which remain.
        plans: one for all images or one for each.
        x: (B, C, H, W) from `start`, on the device of the network; half precision is raised to float32.
        generators: one per image, the ones its initial noise came from; None if no plan draws noise.
        known: for inpainting; x must then come from `start` with the known latents as the images to start from.

    Raises:
        InputError: not as many plans or generators as images, or known latents of another shape than x.
    """
    each = _one_per_image(plans, x)
    if generators is None and any(plan.noise.any() for plan in each):
        raise InputError("this sampler draws noise and needs one generator per image, got none; pass generators")
    if generators is not None:
        require_one_each(generators, x)
    denoiser = denoise if isinstance(denoise, Denoiser) else Denoiser(denoise, None)
    if known is not None and (known.latents.shape != x.shape or known.mask.shape != (len(x), 1, *x.shape[2:])):
        shapes = f"{tuple(known.latents.shape)} and {tuple(known.mask.shape)}"
        raise InputError(f"known latents must have the shape {tuple(x.shape)} of x and one mask each, got {shapes}")
    return _run(denoiser, each, x.to(torch.promote_types(x.dtype, torch.float32)), generators or [], known)


def _run(
    denoiser: Denoiser,
    plans: Sequence[Plan],
    x: Tensor,
    generators: Sequence[torch.Generator],
    known: Known | None,
) -> Iterator[Step]:
    batch, draws = _folded(denoiser, plans, x), [plan.noise.any(dim=1).tolist() for plan in plans]
    total, size, denoised = max(len(plan) for plan in plans), batch.noise.shape[1], torch.zeros_like(x)
    slots = torch.stack([x * batch.c_in[0], *[denoised] * (size - 1)])  # (S, B, C, H, W)
    begin, running = 0, list(range(len(x)))
    for end in sorted({len(plan) for plan in plans}):  # between two ends the same images run
        images = torch.tensor(running, device=x.device)
        sigmas, timesteps, c_next, of_input, of_output, noise, *columns = batch.rows(begin, end, images)
        latents, mask = (None, None) if known is None else (known.latents[images], known.mask[images])
        numbers = torch.arange(begin, end, device=x.device)[:, None].expand(-1, len(running)).unbind()
        for row, index in enumerate(range(begin, end)):
            call = Call(index, images, numbers[row], sigmas[row], timesteps[row])
            inputs = slots[0]
            output = denoiser.network(inputs, call).to(x.dtype)  # (b, C, H, W)
            if latents is not None and mask is not None:
                exact = (latents - of_input[row] * inputs) / of_output[row]
                output = torch.lerp(exact, output, mask)
            slots = _advance([column[row] for column in columns], slots, output)
            if any(draws[image][index] for image in running):
                drawing = [generators[image] if draws[image][index] else None for image in running]
                slots = torch.addcmul(slots, noise[row], _fresh_noise(drawing, x))
            step = Step(
                index,
                total,
                partial(_replaced, x, images, torch.div, slots[0], c_next[row]),
                partial(_replaced, denoised, images, _estimate, inputs, output, of_input[row], of_output[row]),
            )
            yield step
        x, denoised = step.x, step.denoised  # of the images that have ended; those of the others are not looked at
        staying = [place for place, image in enumerate(running) if len(plans[image]) > end]
        begin, running, slots = end, [running[place] for place in staying], slots[:, staying]


def _estimate(inputs: Tensor, output: Tensor, of_input: Tensor, of_output: Tensor) -> Tensor:
    return of_input * inputs + of_output * output


def _replaced(batch: Tensor, images: Tensor, make: Callable[..., Tensor], *arguments: Tensor) -> Tensor:
    """Return the batch with what `make` returns in place of some of its images."""
    values = make(*arguments)
    return values if len(values) == len(batch) else batch.index_copy(0, images, values)


def _advance(columns: Sequence[Tensor], slots: Tensor, output: Tensor) -> Tensor:
    """Return one row of a table, its columns (S, b, 1, 1, 1), applied to slots (S, b, C, H, W) and output (b, C, H, W).

    Column by column, so that an image gets the same additions in the same order in every batch, and neither TF32 nor
    autocast rounds x.
    """
    advanced = columns[-1] * output  # (S, b, C, H, W)
    for column, slot in zip(columns, slots):
        advanced = torch.addcmul(advanced, column, slot)
    return advanced


def _fresh_noise(generators: Sequence[torch.Generator | None], x: Tensor) -> Tensor:
    """Draw (b, C, H, W) on the CPU in float32, zeros for images without a generator, and bring it to x."""
    shape = x.shape[1:]
    noise = torch.stack([torch.zeros(shape) if one is None else draw_noise([one], shape)[0] for one in generators])
    if x.device.type == "cuda":
        noise = noise.pin_memory()  # the copy then waits for nothing
    return noise.to(x.device, x.dtype, non_blocking=True)


class _Batch(NamedTuple):
    """The tables of a batch for a network's own inputs and outputs: slot 0 is what the network is given.

    sigmas, timesteps, c_in, c_next, of_input, of_output: (R, B, 1, 1, 1), the first two without the ones; c_next is the
    c_in of the next row, and denoised = of_input * input + of_output * output.
    noise: (R, S, B, 1, 1, 1).
    matrices: (R, S, S + 1, B, 1, 1, 1).
    """

    sigmas: Tensor
    timesteps: Tensor
    c_in: Tensor
    c_next: Tensor
    of_input: Tensor
    of_output: Tensor
    noise: Tensor
    matrices: Tensor

    def rows(self, begin: int, end: int, images: Tensor) -> list[Sequence[Tensor]]:
        """Return sigmas, timesteps, c_next, of_input, of_output, noise and each column as one tensor a row."""
        tables = [self.sigmas, self.timesteps, self.c_next, self.of_input, self.of_output]
        picked = [table[begin:end].index_select(1, images) for table in tables]
        noise = self.noise[begin:end].index_select(2, images)
        columns = self.matrices[begin:end].index_select(3, images).unbind(2)
        return [table.unbind() for table in (*picked, noise, *columns)]


def _folded(denoiser: Denoiser, plans: Sequence[Plan], x: Tensor) -> _Batch:
    """Join the plans of a batch, zeros where one has fewer rows or slots than the largest, and fold the denoiser in.

    With D = c_skip x + c_out F and the network's input u = c_in x, a row on (x, ..., D) becomes one on (u, ..., F).
    """
    rows, size = max(len(plan) for plan in plans), max(plan.noise.shape[1] for plan in plans)
    sigmas, timesteps = torch.zeros(2, rows, len(plans), dtype=torch.float64)
    matrices = torch.zeros(rows, size, size + 1, len(plans), dtype=torch.float64)
    noise = torch.zeros(rows, size, len(plans), dtype=torch.float64)
    for image, plan in enumerate(plans):
        count, slots = plan.noise.shape
        sigmas[:count, image], timesteps[:count, image] = plan.sigmas, plan.timesteps
        matrices[:count, :slots, :slots, image] = plan.matrices[:, :, :-1]
        matrices[:count, :slots, -1, image] = plan.matrices[:, :, -1]
        noise[:count, :slots, image] = plan.noise
    c_skip, c_out, c_in = denoiser.factors(sigmas)  # (R, B)
    c_next = torch.cat([c_in[1:], torch.ones_like(c_in[:1])])
    c_next[[len(plan) - 1 for plan in plans], range(len(plans))] = 1  # the last row lands in VP coordinates
    matrices[:, :, 0] = (matrices[:, :, 0] + matrices[:, :, -1] * c_skip[:, None]) / c_in[:, None]
    matrices[:, :, -1] *= c_out[:, None]
    matrices[:, 0] *= c_next[:, None]
    noise[:, 0] *= c_next
    ones = [1] * (x.ndim - 1)
    tables = (c_in, c_next, c_skip / c_in, c_out, noise, matrices)
    shaped = [table.reshape(*table.shape, *ones) for table in tables]
    return _Batch(*(table.to(x.dtype).to(x.device) for table in (sigmas, timesteps, *shaped)))


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    """Return one number per image as (B, 1, 1, 1) in the dtype and on the device of `like`."""
    return torch.tensor(values, dtype=like.dtype, device=like.device).reshape(-1, *[1] * (like.ndim - 1))


def _one_per_image(plans: Plan | Sequence[Plan], x: Tensor) -> list[Plan]:
    each = [plans] * len(x) if isinstance(plans, Plan) else list(plans)
    if len(each) != len(x):
        raise InputError(f"one plan per image is needed, got {len(each)} for {len(x)} images")
    return each
