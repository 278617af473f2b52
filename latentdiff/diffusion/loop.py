"""The sampling loop: applies samplers, which are tables of numbers, to a batch.

An explicit solver is a linear recurrence. An image keeps a few slots, slot 0 being the x at which the network is called
next. With D_i = denoise(slot 0) at sigma_i, row i of its table is

    slots' = matrices[i] @ [slots, D_i] + noise[i] * fresh standard normal noise

so a sampler is a function from falling sigmas to such rows (`samplers.py`), nothing is mutable, and images with
different samplers and step counts can share a batch. Tables are float64, applied in float32 (or float64 if x is).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from latentdiff.devices import copies_unwaited, widest_float
from latentdiff.diffusion.folding import Batch, fold
from latentdiff.diffusion.plan import Plan
from latentdiff.diffusion.prediction import Call, Denoise, Denoiser, Network, halves
from latentdiff.errors import InputError

__all__ = [
    "KnownRegion",
    "Question",
    "Questions",
    "Step",
    "answered",
    "draw_noise",
    "image_generator",
    "require_finite",
    "require_one_each",
    "sample",
    "sampling",
    "slerp",
    "start",
]


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


def slerp(first: Tensor, second: Tensor, amount: float) -> Tensor:
    """Turn noise (B, C, H, W) towards other noise along the great circle: in between it keeps the length of noise.

    Args:
        amount: 0 gives the first, 1 the second.

    Source: Shoemake 1985, SIGGRAPH, section 3.3.
    """
    axes = tuple(range(1, first.ndim))
    exact = widest_float(first.device)
    wide = [x.to(exact) for x in (first, second)]
    norms = [x.square().sum(dim=axes, keepdim=True).sqrt() for x in wide]
    cosine = (wide[0] * wide[1]).sum(dim=axes, keepdim=True) / (norms[0] * norms[1]).clamp(min=1e-12)
    nearly = 1 - max(1e-9, torch.finfo(exact).eps)
    angle = cosine.clamp(-nearly, nearly).acos()
    turned = ((1 - amount) * angle).sin() * first + (amount * angle).sin() * second
    return (turned / angle.sin()).to(first.dtype)


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


@dataclass(eq=False)
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


class Question(NamedTuple):
    """A call of the network that is due.

    Attributes:
        inputs: (b, C, H, W), what the network is given; see `prediction.Network`.
        call: where these images are in their runs.
    """

    inputs: Tensor
    call: Call


# Yields each Question, is sent the network's output for it, and yields the Step that follows.
Questions = Generator[Question | Step, Tensor, None]


class KnownRegion(NamedTuple):
    """Known latents of a part of the result, for inpainting with any model.

    The x0 estimate is replaced there, so x stays exactly on the path from its noise to the known latents, whatever the
    solver, and ends on them; the rest is sampled to fit.

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
    known: KnownRegion | None = None,
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
        InputError: not as many plans or generators as images, or known latents of another shape than x; at the end, if
            the result is not finite.
    """
    return answered(sampling(denoise, plans, x, generators, known), _denoiser(denoise).network)


def sampling(
    denoise: Denoise,
    plans: Plan | Sequence[Plan],
    x: Tensor,
    generators: Sequence[torch.Generator] | None = None,
    known: KnownRegion | None = None,
) -> Questions:
    """Run the plans like `sample`, but leave the calls of the network to the caller, who may join those of many runs.

    Arguments and errors are those of `sample`; of `denoise` only what does not call its network is used.
    """
    each = _one_per_image(plans, x)
    if generators is None and any(plan.noise.any() for plan in each):
        raise InputError("this sampler draws noise and needs one generator per image, got none; pass generators")
    if generators is not None:
        require_one_each(generators, x)
    if known is not None and (known.latents.shape != x.shape or known.mask.shape != (len(x), 1, *x.shape[2:])):
        shapes = f"{tuple(known.latents.shape)} and {tuple(known.mask.shape)}"
        raise InputError(f"known latents must have the shape {tuple(x.shape)} of x and one mask each, got {shapes}")
    return _run(_denoiser(denoise), each, x.to(torch.promote_types(x.dtype, torch.float32)), generators or [], known)


def answered(questions: Questions, network: Network) -> Iterator[Step]:
    """Yield the steps of a run whose questions a network answers."""
    for item in questions:
        while isinstance(item, Question):
            item = questions.send(network(item.inputs, item.call))
        yield item


def _denoiser(denoise: Denoise) -> Denoiser:
    return denoise if isinstance(denoise, Denoiser) else Denoiser(denoise, None)


def require_finite(x: Tensor, remedy: str = "use dtype float32 or a lower guidance_scale") -> None:
    """Raise InputError if a sampled x is not finite."""
    if not torch.isfinite(x.sum()) and not torch.isfinite(x).all():
        raise InputError(f"the network's output became NaN or infinite; {remedy}")


def _run(
    denoiser: Denoiser,
    plans: Sequence[Plan],
    x: Tensor,
    generators: Sequence[torch.Generator],
    known: KnownRegion | None,
) -> Questions:
    batch, draws = fold(denoiser, plans, x), [plan.noise.any(dim=1).tolist() for plan in plans]
    total, size, channels = max(len(plan) for plan in plans), batch.noise.shape[1], x.shape[1]
    denoised = torch.zeros_like(x)
    slots = torch.stack([x * batch.c_in[0], *[denoised] * (size - 1)])  # (S, B, C, H, W)
    begin, running = 0, list(range(len(x)))
    for end in sorted({len(plan) for plan in plans}):  # between two ends the same images run
        images = torch.tensor(running, device=x.device)
        part = batch.part(begin, end, images)
        sigmas, timesteps, *columns = (table.unbind() for table in (part.sigmas, part.timesteps, *part.columns()))
        numbers = torch.arange(begin, end, device=x.device)[:, None].expand(-1, len(running)).unbind()
        latents, mask = (None, None) if known is None else (known.latents[images].to(x), known.mask[images].to(x))
        ends = torch.tensor([len(plans[image]) == end for image in running], device=x.device)
        estimate = denoised[images] if denoiser.self_conditioning else None
        noisy = {row for row in range(begin, end) for image in running if draws[image][row]}
        for row, index in enumerate(range(begin, end)):
            call = Call(index, images, numbers[row], sigmas[row], timesteps[row])
            places = [slots[place] for place in range(size)]
            inputs = places[0]
            output = yield Question(inputs if estimate is None else torch.cat([inputs, estimate], dim=1), call)
            output, share = (output.to(x.dtype), None) if output.shape[1] == channels else halves(output.to(x.dtype))
            if denoiser.bounds_estimates:
                output = part.output(row, inputs, denoiser.bounded(part.estimate(row, inputs, output)))
            if latents is not None and mask is not None:
                output = torch.lerp(part.output(row, inputs, latents), output, mask)
            slots = _advance([column[row] for column in columns], places, output)
            if index in noisy:
                drawing = [generators[image] if draws[image][index] else None for image in running]
                noise = _fresh_noise(drawing, x)
                if share is not None:
                    noise = noise * (part.noise_range[row] * (share + 1) / 2).exp()
                slots.addcmul_(part.noise[row], noise)
            if latents is not None and mask is not None and index == end - 1:
                slots[0] = _landed(slots[0], latents, mask, ends)
            step = Step(
                index,
                total,
                partial(_next_x, x, images, part, row, slots),
                partial(_next_denoised, denoised, images, part, row, inputs, output),
            )
            if estimate is not None:
                estimate = part.estimate(row, inputs, output)
            yield step
        if end < total:
            x, denoised = step.x, step.denoised  # of the images that have ended; those of the others are not looked at
            staying = [place for place, image in enumerate(running) if len(plans[image]) > end]
            begin, running, slots = end, [running[place] for place in staying], slots[:, staying]
    require_finite(step.x)


def _landed(x: Tensor, latents: Tensor, mask: Tensor, ends: Tensor) -> Tensor:
    """Return x (b, C, H, W) with the known latents where nothing is drawn, in the images whose plan has ended.

    A plan that stops at the first training noise level would leave noise of that level on them.
    """
    return torch.where((mask == 0) & ends.reshape(-1, *[1] * (x.ndim - 1)), latents, x)


def _next_x(x: Tensor, images: Tensor, part: Batch, row: int, slots: Tensor) -> Tensor:
    return _replaced(x, images, slots[0] / part.c_next[row])


def _next_denoised(denoised: Tensor, images: Tensor, part: Batch, row: int, inputs: Tensor, output: Tensor) -> Tensor:
    return _replaced(denoised, images, part.estimate(row, inputs, output))


def _replaced(batch: Tensor, images: Tensor, values: Tensor) -> Tensor:
    """Return the batch with `values` in place of some of its images."""
    return values if len(values) == len(batch) else batch.index_copy(0, images, values)


def _advance(columns: Sequence[Tensor], slots: Sequence[Tensor], output: Tensor) -> Tensor:
    """Return one row of a table, its columns (S, b, 1, 1, 1), applied to slots and output, each (b, C, H, W).

    Column by column, so that an image gets the same additions in the same order in every batch, and neither TF32 nor
    autocast rounds x.
    """
    advanced = columns[-1] * output  # (S, b, C, H, W)
    for column, slot in zip(columns, slots):
        advanced.addcmul_(column, slot)
    return advanced


def _fresh_noise(generators: Sequence[torch.Generator | None], x: Tensor) -> Tensor:
    """Draw (b, C, H, W) on the CPU in float32, zeros for images without a generator, and bring it to x."""
    unwaited = copies_unwaited(x.device)
    noise = torch.zeros(len(generators), *x.shape[1:], pin_memory=unwaited)
    for one, generator in zip(noise, generators):
        if generator is not None:
            one.normal_(generator=generator)
    return noise.to(x.device, x.dtype, non_blocking=unwaited)


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    """Return one number per image as (B, 1, 1, 1) in the dtype and on the device of `like`."""
    return torch.tensor(values, dtype=like.dtype, device=like.device).reshape(-1, *[1] * (like.ndim - 1))


def _one_per_image(plans: Plan | Sequence[Plan], x: Tensor) -> list[Plan]:
    each = [plans] * len(x) if isinstance(plans, Plan) else list(plans)
    if len(each) != len(x):
        raise InputError(f"one plan per image is needed, got {len(each)} for {len(x)} images")
    return each
