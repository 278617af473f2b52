"""Tune the table of a sampler: choose all numbers of a few-step solver by gradient, against the result of many steps.

No weight changes. Noise levels, the timesteps that the network is told, and the factors of x and of the last estimates
begin as those of DPM-Solver++(2M); what is minimised is how far the latents of a few steps are from those of many
steps from the same noise, with the same prompts and guidance.

Source: gradient through all steps: Watson et al. 2022, arXiv 2202.05830; the result of many steps as the aim, and
timesteps apart from noise levels: Tong et al. 2024, arXiv 2405.15506; coefficients of a multistep solver: Frankel et
al. 2025, arXiv 2502.17423.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from latentdiff.checkpoints import Components
from latentdiff.diffusion import Call, Plan, classifier_free, draw_noise, image_generator, make_plan, sample, start
from latentdiff.diffusion.prediction import Denoise
from latentdiff.diffusion.schedule import NoiseSchedule
from latentdiff.diffusion.tuned import HISTORY, TunedTable
from latentdiff.generation.run import prepare_drawing
from latentdiff.generation.text import BatchConditioning
from latentdiff.pipeline import Pipeline

from .loop.run import seeded

TEACHER, TEACHER_STEPS = "dpmpp_2m", 64
INITIAL = ("dpmpp_2m", "dpmpp_2m_karras", "dpmpp_2m_exponential")  # the nearest of these is tuned
TRAINED_ON, MEASURED_ON = 96, 32  # noises
ITERATIONS, BATCH, LEARNING_RATE = 300, 4, 0.01
LARGE = 100e6  # parameters of a U-Net from which on activations are computed twice instead of kept
ROUNDING = 1e-3  # of the loss of an image, which grows like the distance above it and like its square below
OF_TIMESTEPS = 30.0  # what a unit of the parameters is
DIGITS = 10  # kept of each number

Denoising = Callable[[Sequence[int]], Denoise]
"""Numbers of samples -> the guided denoiser of these."""


@dataclass(frozen=True)
class Targets:
    """Samples with what many steps make of them.

    Attributes:
        noise, results: (N, C, h, w), where a run starts, of unit variance, and the latents where it ends.
        denoising: see `Denoising`.
    """

    noise: Tensor
    results: Tensor
    denoising: Denoising

    def distance(self, plan: Plan, batch: int = BATCH) -> float:
        """Return the root mean square distance of what a plan makes of the noise from the results, image by image."""
        found = []
        with torch.no_grad():
            for numbers in torch.arange(len(self.noise)).split(batch):
                denoise = self.denoising(numbers.tolist())
                *_, last = sample(denoise, plan, start(plan, self.noise[numbers]))
                found.append(per_image(last.x - self.results[numbers]))
        return float(torch.cat(found).mean())


class Solver(nn.Module):
    """The numbers of a multistep solver of N steps, so parametrised that any values make noise levels that fall.

    At zero they are those of the plan that it begins with, one of DPM-Solver++(2M): x becomes sigma' / sigma x +
    (1 - sigma' / sigma) times a weighted sum of the last estimates, which is exact for estimates that do not change.

    Args:
        plan: of a multistep solver that ends at noise level 0.
        schedule: of the model.
    """

    def __init__(self, plan: Plan, schedule: NoiseSchedule) -> None:
        super().__init__()
        count = len(plan)
        levels = torch.cat([plan.sigmas, plan.sigmas.new_zeros(1)])
        share = 1 - levels[1:] / levels[:-1]  # (N,)
        weights = torch.zeros(count, HISTORY, dtype=torch.float64)
        weights[:, 0] = plan.matrices[:, 0, -1] / share
        if plan.matrices.shape[1] > 1:
            weights[:, 1] = plan.matrices[:, 0, 1] / share
        self.register_buffer("first", plan.sigmas[0])
        self.register_buffer("falls", (plan.sigmas[:-1] / plan.sigmas[1:]).log())  # (N - 1,)
        self.register_buffer("weights", weights)
        self.register_buffer("table", schedule.sigmas.clamp(max=float(plan.sigmas[0])).log())
        self.first: Tensor
        self.falls: Tensor
        self.weights: Tensor
        self.table: Tensor
        numbers = {"fall": (count - 1,), "told": (count,), "kept": (count,), "weighed": (count, HISTORY)}
        for name, shape in numbers.items():
            setattr(self, name, nn.Parameter(torch.zeros(shape, dtype=torch.float64)))
        self.fall: nn.Parameter
        self.told: nn.Parameter
        self.kept: nn.Parameter
        self.weighed: nn.Parameter

    def numbers(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return noise levels, timesteps and factors of x, each (N,), and those of the estimates (N, HISTORY)."""
        falls = self.falls * self.fall.exp()
        sigmas = torch.cat([self.first[None], self.first * (-falls.cumsum(0)).exp()])  # (N,)
        following = torch.cat([sigmas[1:], sigmas.new_zeros(1)])
        timesteps = _interpolated(sigmas.log(), self.table) + OF_TIMESTEPS * self.told
        ratio = following / sigmas
        of_x = ratio + self.kept * ((1 + following**2) / (1 + sigmas**2)).sqrt()  # in units of unit variance
        used = torch.ones_like(self.weights).tril()  # no estimates before the first
        of_estimates = (1 - ratio)[:, None] * (self.weights + self.weighed) * used
        return sigmas, timesteps.clamp(0, len(self.table) - 1.0), of_x, of_estimates

    def forward(self, x: Tensor, denoise: Denoise) -> Tensor:
        """Return the result (b, C, h, w) of a run from x (b, C, h, w), in sigma coordinates."""
        images, estimates = torch.arange(len(x), device=x.device), list[Tensor]()
        columns = [column.to(x.device, x.dtype) for column in self.numbers()]
        for index, (sigma, timestep, of_x, of_estimates) in enumerate(zip(*columns)):
            each = (torch.full_like(images, index), sigma.expand(len(x)), timestep.expand(len(x)))
            estimates = [denoise(x, Call(index, images, *each)), *estimates][:HISTORY]
            x = of_x * x
            for factor, estimate in zip(of_estimates, estimates):
                x = x + factor * estimate
        return x

    def table_of(self, guidance_scale: float, distance: float, before: float) -> TunedTable:
        """Return the numbers as they are kept."""
        *columns, of_estimates = (column.detach().tolist() for column in self.numbers())
        sigmas, timesteps, of_x = (tuple(map(_rounded, column)) for column in columns)
        rows = tuple(tuple(map(_rounded, row[: index + 1])) for index, row in enumerate(of_estimates))
        return TunedTable(sigmas, timesteps, of_x, rows, guidance_scale, _rounded(distance), _rounded(before))


def tune(
    schedule: NoiseSchedule,
    steps: int,
    training: Targets,
    held_out: Targets,
    guidance_scale: float = 1.0,
    iterations: int = ITERATIONS,
    seed: int = 0,
    report: Callable[[str], object] = print,
) -> tuple[TunedTable, str]:
    """Tune the table of so many steps, and return it with the name of the sampler that it began as.

    Args:
        schedule: of the model.
        steps: calls of the network.
        training, held_out: samples to tune by, and others to measure by.
        guidance_scale: that they have, for the record.
        iterations: of Adam; its learning rate falls to zero by a cosine.
        seed: of the order of the samples.
        report: is told of the progress, a line at a time.
    """
    plans = {name: make_plan(schedule, name, steps) for name in INITIAL}
    distances = {name: held_out.distance(plan) for name, plan in plans.items()}
    initial = min(distances, key=lambda name: distances[name])
    solver = Solver(plans[initial], schedule)  # in float64, on the CPU: not every device has it
    optimizer = torch.optim.Adam(solver.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99))
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    size, losses = min(BATCH, len(training.noise)), list[float]()
    for iteration in range(iterations):
        numbers = torch.randperm(len(training.noise), generator=seeded(seed, iteration, 0))[:size]
        optimizer.zero_grad()
        x = start(plans[initial], training.noise[numbers])
        found = solver(x, training.denoising(numbers.tolist()))
        loss = _loss(found - training.results[numbers])
        loss.backward()  # type: ignore[no-untyped-call]
        if torch.isfinite(nn.utils.clip_grad_norm_(solver.parameters(), 1.0)):
            optimizer.step()
        falling.step()
        losses.append(float(loss.detach()))
        if (iteration + 1) % max(1, iterations // 10) == 0:
            recent = losses[-max(1, iterations // 10) :]
            report(f"{steps} steps: iteration {iteration + 1} of {iterations}, loss {sum(recent) / len(recent):.4f}")
    tuned = solver.table_of(guidance_scale, 0.0, distances[initial])
    distance = held_out.distance(tuned.plan())
    if distance > distances[initial]:  # the samples were too few, or the formula is as good as it gets
        tuned = Solver(plans[initial], schedule).table_of(guidance_scale, 0.0, distances[initial])
        distance = distances[initial]
    return replace(tuned, distance=_rounded(distance)), initial


def _loss(differences: Tensor) -> Tensor:
    """Return the mean distance of the images: images that go another way count by it, not by its square.

    Source: the pseudo-Huber loss, as in Song & Dhariwal 2023, arXiv 2310.14189.
    """
    return ((differences.square().mean(dim=(1, 2, 3)) + ROUNDING**2).sqrt() - ROUNDING).mean()


def per_image(differences: Tensor) -> Tensor:
    """Return the root mean square (B,) of differences (B, C, h, w)."""
    return differences.square().mean(dim=(1, 2, 3)).sqrt()


def targets_of(
    components: Components, prompts: Sequence[str], guidance_scale: float, seed: int, progress: bool = False
) -> Targets:
    """Draw many steps from the noise of seeds in a row, one picture for each prompt.

    Args:
        prompts: those with as many text windows as most are drawn, the others left out.
        guidance_scale: of both the many steps and the few.
        progress: show a bar on stderr.
    """
    pipe = Pipeline(components)
    options: dict[str, Any] = {"guidance_scale": guidance_scale, "prompt_weights": False}
    options |= {"sampler": TEACHER, "num_inference_steps": min(TEACHER_STEPS, components.schedule.num_train_timesteps)}
    drawing = prepare_drawing(pipe.make_job(list(prompts), seed=seed, **options), BATCH)
    conditioning, shape = drawing.stages[0].conditioning, drawing.stages[0].shape
    windows = [conditioning.window_count(number) for number in range(len(prompts))]
    most = Counter(windows).most_common(1)[0][0]
    used = [number for number, count in enumerate(windows) if count == most]
    noise = draw_noise([image_generator(seed + number) for number in used], shape).to(components.device)
    chosen = [prompts[number] for number in used]
    made = pipe(chosen, latents=noise, output_type="latent", batch_size=BATCH, progress=progress, **options)
    network = partial(_guided, components, guidance_scale)

    def denoising(numbers: Sequence[int]) -> Denoise:
        of_images = conditioning.of([used[number] for number in numbers])
        return components.denoiser(partial(network, of_images))

    return Targets(noise, made.images.to(noise), denoising)


def _guided(
    components: Components, guidance_scale: float, cond: BatchConditioning, inputs: Tensor, call: Call
) -> Tensor:
    """Return the guided output of the U-Net, which gradients go through."""
    unet, half = components.unet, len(cond.context) // 2
    alone = guidance_scale <= 1
    rows = slice(half, None) if alone else slice(None)
    inputs = (inputs if alone else torch.cat([inputs, inputs])).to(components.dtype)
    timesteps = call.timesteps.to(torch.float32).repeat(1 if alone else 2)
    added = {name: value[rows] for name, value in cond.added.items()}

    def predict(given: Tensor, times: Tensor) -> Tensor:
        return unet(given, times, cond.context[rows], added=added).float()

    large = sum(parameter.numel() for parameter in unet.parameters()) > LARGE
    if large and torch.is_grad_enabled():
        output = checkpoint(predict, inputs, timesteps, use_reentrant=False)
    else:
        output = predict(inputs, timesteps)
    if alone:
        return output
    unconditional, conditional = output.chunk(2)
    return classifier_free(conditional, unconditional, guidance_scale)


def _interpolated(levels: Tensor, table: Tensor) -> Tensor:
    """Return where levels (N,) lie in a rising table (T,), from 0 to T - 1, so that gradients go through."""
    after = torch.searchsorted(table, levels.detach()).clamp(1, len(table) - 1)
    low, high = table[after - 1], table[after]
    return (after - 1 + (levels - low) / (high - low)).clamp(0, len(table) - 1.0)


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
