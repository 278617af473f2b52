"""Measure held-out errors per timestep range against the Gaussian bound, and the distance of the EMA.

A held-out error is the squared error of what the network predicts, not weighted, on fixed pictures at fixed timesteps
under fixed noise, so that it can be compared from step to step and from run to run. Next to it is what the best linear
prediction, that of Gaussian data without any structure, would reach; whoever learns anything comes below it.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from latentdiff.checkpoints import Components, Encoders
from latentdiff.diffusion import draw_noise
from latentdiff.diffusion.schedule import NoiseSchedule
from latentdiff.images import to_tensor

from ..config import DiffusionTraining, ObjectiveConfig
from ..data.augment import rgb
from ..data.batches import Batch
from ..data.conditions import ConcatConditioning, Task
from ..data.dataset import composite, open_held_out
from ..data.latents import TextCache, Tokens, encode_captions, token_rows
from ..loop.ema import Ema
from ..loop.run import seeded
from ..losses.diffusion import Predict, diffusion_losses, loss_weight

BUCKETS = 4  # equal ranges of timesteps
PICTURES = 64  # held out, at most: each is looked at once in every bucket


@torch.no_grad()
def load_held_out(config: DiffusionTraining, components: Encoders) -> Batch | None:
    """Encode up to `PICTURES` pictures that are not trained on, each with its first caption; None without any.

    Of a model that is distilled nothing is measured by them: its estimates are no longer means.

    Raises:
        InputError: see `open_held_out`.
    """
    if config.consistency is not None:
        return None
    data = open_held_out(config.data, Path(config.cache or Path(config.run.out) / "cache"), PICTURES)
    if data is None:
        return None
    images = to_tensor(composite(data.images, rgb(config.data.background)))  # (N, 3, H, W)
    autoencoder, device = components.autoencoder, next(components.autoencoder.parameters()).device
    latents = [autoencoder.encode(image.to(device)).mode().float().cpu() for image in images.split(1)]
    captions = [row["captions"][0] for row in data.rows]
    tokens = config.encodes_each_step
    texts: TextCache = Tokens(token_rows(captions, components)) if tokens else encode_captions(captions, components)
    context, added = texts.take(range(len(captions)))
    if added:
        added["time_ids"] = torch.tensor([sample.condition for sample in data.samples], dtype=torch.float32)
    dropped, concat = torch.zeros(len(captions), dtype=torch.bool), None
    if config.task.kind != "text_to_image":
        task, pictures = Task.of(config, components), composite(data.images, rgb(config.data.background))
        concat = ConcatConditioning.stack(
            [task.draw(one, np.random.default_rng([0, n])) for n, one in enumerate(pictures)]
        )
    scaled = torch.cat(latents) * autoencoder.config.scaling_factor
    return Batch(scaled, context, dropped, added, concat).map(Tensor.cpu)


def bucket_timesteps(count: int, num_train_timesteps: int) -> Tensor:
    """Return the timesteps (BUCKETS, count) int64 at which `count` samples are looked at, spread evenly in a bucket."""
    places = (torch.arange(BUCKETS)[:, None] + (torch.arange(count) + 0.5) / count) / BUCKETS
    return (places * num_train_timesteps).long().clamp_max(num_train_timesteps - 1)


def bucket_names(num_train_timesteps: int) -> list[str]:
    """Return the first and the last timestep of each bucket, as in "0-249"."""
    edges = [bucket * num_train_timesteps // BUCKETS for bucket in range(BUCKETS + 1)]
    return [f"{first}-{max(first, last - 1)}" for first, last in pairwise(edges)]


@torch.no_grad()
def held_out_errors(
    network: Predict,
    components: Components,
    config: DiffusionTraining,
    samples: Batch,
    accelerator: Accelerator,
) -> Tensor:
    """Return the squared error of the prediction, (BUCKETS, N), of each sample in each bucket of timesteps.

    Args:
        network: in evaluation mode.
    """
    plain = ObjectiveConfig(min_snr_gamma=0.0, self_conditioning=config.objective.self_conditioning)
    size = config.run.batch_size // config.run.accumulation // accelerator.num_processes  # which fits into memory
    count, device = len(samples.latents), accelerator.device
    timesteps, errors = bucket_timesteps(count, components.schedule.num_train_timesteps), []
    for bucket in range(BUCKETS):
        generators = [seeded(0, bucket, 5, sample) for sample in range(count)]
        noise = draw_noise(generators, samples.latents.shape[1:])
        for first in range(0, count, size):
            few = slice(first, first + size)
            batch = samples.map(lambda tensor, few=few: tensor[few].to(device))  # type: ignore[misc]
            with accelerator.autocast():
                found = diffusion_losses(
                    network, components, plain, batch, timesteps[bucket, few].to(device), noise[few].to(device)
                )
            errors.append(found.float().cpu())
    return torch.cat(errors).reshape(BUCKETS, count)


def gaussian_errors(schedule: NoiseSchedule, timesteps: Tensor, variances: Tensor) -> Tensor:
    """Return the least squared error, (N,) float64, with which Gaussian data without structure can be predicted.

    The network sees z = a x0 + b n and is asked for y = p x0 + q n. With x0 of variance s^2 and n of variance 1 the
    best prediction is the linear one, Cov(y, z) / Var(z) z, whose error is Var(y) - Cov(y, z)^2 / Var(z)
    = (p^2 s^2 + q^2) - (p a s^2 + q b)^2 / (a^2 s^2 + b^2) = s^2 (p b - q a)^2 / (a^2 s^2 + b^2).

    Args:
        timesteps: (N,) int64.
        variances: (C,), of the data's channels, over which the error is averaged.
    """
    one = torch.ones(len(timesteps), 1, 1, 1, dtype=torch.float64)
    nothing, of_channels = torch.zeros_like(one), variances.double()[None, :, None, None]
    a, b = schedule.add_noise(one, nothing, timesteps), schedule.add_noise(nothing, one, timesteps)
    p, q = schedule.target(one, nothing, timesteps), schedule.target(nothing, one, timesteps)
    errors = of_channels * (p * b - q * a) ** 2 / (a**2 * of_channels + b**2)  # (N, C, 1, 1)
    return errors.mean(dim=(1, 2, 3))


def gaussian_bounds(schedule: NoiseSchedule, samples: Batch) -> Tensor:
    """Return `gaussian_errors` for the variances of the samples' channels, (BUCKETS, N), where they are looked at."""
    timesteps = bucket_timesteps(len(samples.latents), schedule.num_train_timesteps)
    variances = samples.latents.double().var(dim=(0, 2, 3), correction=0)
    return gaussian_errors(schedule, timesteps.flatten(), variances).reshape(timesteps.shape)


def held_out_scalars(
    network: Predict,
    components: Components,
    config: DiffusionTraining,
    samples: Batch | None,
    accelerator: Accelerator,
) -> dict[str, float]:
    """Return what the log says of held-out samples: the error of each bucket, its Gaussian bound, the weighted loss.

    Args:
        network: with the averaged weights, in evaluation mode.
        samples: none give no scalars.
    """
    if samples is None:
        return {}
    schedule = components.schedule
    errors, bounds = (
        held_out_errors(network, components, config, samples, accelerator),
        gaussian_bounds(schedule, samples),
    )
    timesteps = bucket_timesteps(len(samples.latents), schedule.num_train_timesteps).flatten()
    weights = loss_weight(schedule, timesteps, config.objective.weighting, config.objective.min_snr_gamma)
    scalars = {"held_out/loss": float((errors.flatten() * weights).mean())}
    for name, error, bound in zip(bucket_names(schedule.num_train_timesteps), errors, bounds):
        scalars |= {f"held_out/error_{name}": float(error.mean()), f"held_out/gaussian_{name}": float(bound.mean())}
    return scalars


@torch.no_grad()
def ema_distance(ema: Ema, model: nn.Module) -> float:
    """Return how far the average is from the live weights, relative to these: their difference's norm over theirs."""
    live = {name: parameter.detach().float() for name, parameter in model.named_parameters()}
    apart = [weight - live[name] for name, weight in ema.weights.items()]
    norms = [torch.stack(torch._foreach_norm(tensors)).norm() for tensors in (apart, list(live.values()))]
    return float(norms[0] / norms[1])
