"""Compute the consistency loss: a model of many calls becomes one of few, its guidance folded in.

Along the path that a guided model takes from noise to a picture, the x0 estimates at two neighbouring noise levels are
made equal; then one call at any level gives the end of the path. At first the neighbour is the clean end itself, which
only folds the guidance in, and with time it comes nearer.

Source: Luo et al. 2023, arXiv 2310.04378, algorithm 1 (a guided step of the teacher, then equal estimates); Geng et al.
2024, arXiv 2406.14548 (neighbours from far to near, so that training begins as that of a diffusion model); Song and
Dhariwal 2023, arXiv 2310.14189 (the student itself, and no average of it, as the target; the pseudo-Huber distance).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from latentdiff.checkpoints import Components, Encoders
from latentdiff.diffusion.guidance import classifier_free
from latentdiff.diffusion.prediction import preconditioning, x0_estimate
from latentdiff.errors import InputError
from latentdiff.models.lora import share_weights
from latentdiff.models.unet import UNet2DConditionModel

from ..config import ConsistencyConfig, DiffusionTraining
from ..data.batches import Batch, Conditioning
from ..data.latents import LatentSet
from .diffusion import Predict, conditioning

ROUNDING = 1e-3  # of an image's distance, which counts by itself above it and by its square below


@dataclass(frozen=True)
class Teacher:
    """The frozen model that a student learns from, and what it is told of no caption.

    Attributes:
        unet: in evaluation mode.
        context: (1, L, D), text states of the empty caption.
        added: its pooled text (1, P), for U-Nets that expect it.
        asked: what is distilled, and how.
    """

    unet: UNet2DConditionModel
    context: Tensor
    added: Mapping[str, Tensor]
    asked: ConsistencyConfig

    @torch.no_grad()
    def predict(self, noisy: Tensor, timesteps: Tensor, batch: Batch) -> Tensor:
        """Return the guided prediction (B, C, h, w)."""
        own, count = conditioning(batch), len(noisy)
        if self.asked.guidance_scale <= 1:
            return self.unet(noisy, timesteps, batch.context, **own).float()
        empty = self.context.to(batch.context).expand(count, -1, -1)
        more: Conditioning = {}
        if batch.added:
            nothing = {**batch.added, **{name: value.expand(count, -1) for name, value in self.added.items()}}
            pairs = {name: torch.cat([nothing[name].to(value), value]) for name, value in batch.added.items()}
            more = {"added": pairs}
        both = self.unet(noisy.repeat(2, 1, 1, 1), timesteps.repeat(2), torch.cat([empty, batch.context]), **more)
        unconditional, conditional = both.float().chunk(2)
        return classifier_free(conditional, unconditional, self.asked.guidance_scale)


def make_teacher(config: DiffusionTraining, components: Encoders, data: LatentSet) -> Teacher | None:
    """Return the model that a run distils, as it is before the run; None for a run that distils none.

    Raises:
        InputError: it learns its variance, or its last timestep is pure noise.
    """
    if config.consistency is None or not isinstance(components, Components):
        return None
    schedule, unet = components.schedule, components.unet
    if schedule.variance_type == "learned_range":
        raise InputError("consistency: start_from learns its variance, which is of no use in few calls; use another")
    if schedule.ends_in_pure_noise:
        raise InputError("consistency needs some signal at the last timestep, got zero terminal SNR; use another model")
    # Thin layers are trained beside frozen weights, which both then share.
    kept = share_weights(unet) if config.train.kind == "lora" else copy.deepcopy(unet)
    context, added = data.texts.take([0])
    return Teacher(kept.requires_grad_(False).eval(), context, added, config.consistency)


def weights_besides(teacher: Teacher | None, config: DiffusionTraining) -> tuple[UNet2DConditionModel, ...]:
    """Return the network of a teacher where it takes memory besides that of the student."""
    return () if teacher is None or config.train.kind == "lora" else (teacher.unet,)


def few_calls(asked: ConsistencyConfig) -> dict[str, Any]:
    """Return the defaults of generation options of what is distilled, see `checkpoints.generation_config`."""
    return {"sampler": "lcm", "num_inference_steps": asked.calls, "guidance_scale": 1.0}


def neighbours(timesteps: Tensor, done: float, asked: ConsistencyConfig) -> Tensor:
    """Return for each timestep (B,) the earlier one whose estimate it is to have; 0 stands for the clean end.

    Args:
        timesteps: (B,) int64.
        done: share of the run, from 0 to below 1.

    Source: Geng et al. 2024, arXiv 2406.14548, the mapping with q = 2, in timesteps; no nearer than `skip`: Luo et al.
    2023, arXiv 2310.04378, section 4.3.
    """
    halved = int(done * (asked.halvings + 1))
    ways = (timesteps.double() / 2**halved).ceil().long().clamp(min=asked.skip)
    return (timesteps - ways).clamp(min=0)


def consistency_terms(
    unet: Predict,
    teacher: Teacher,
    components: Encoders,
    batch: Batch,
    timesteps: Tensor,
    noise: Tensor,
    done: float,
) -> dict[str, Tensor]:
    """Return the loss (B,) of each image of a batch, by the name of its only term.

    Args:
        unet: the student, called as the network is.
        components: whose schedule is looked at.
        timesteps: (B,) int64.
        noise: (B, C, h, w), standard normal.
        done: share of the run, from 0 to below 1.
    """
    schedule, latents, told = components.schedule, batch.latents, conditioning(batch)
    kind, earlier = schedule.prediction_type, neighbours(timesteps, done, teacher.asked)
    sigmas, below = schedule.sigma_at(timesteps, latents), schedule.sigma_at(earlier, latents)  # (B, 1, 1, 1)
    noisy = schedule.add_noise(latents, noise, timesteps)
    with torch.no_grad():
        guided = x0_estimate(kind, noisy, teacher.predict(noisy, timesteps, batch), sigmas)
        x = guided + below / sigmas * (latents + sigmas * noise - guided)  # a step of DDIM, in sigma coordinates
        nearer = preconditioning(kind, below).c_in * x
        found = x0_estimate(kind, nearer, unet(nearer, earlier, batch.context, **told).float(), below)
        target = torch.where((earlier == 0).reshape(-1, 1, 1, 1), guided, found)
    estimate = x0_estimate(kind, noisy, unet(noisy, timesteps, batch.context, **told).float(), sigmas)
    squared = (estimate - target).square().mean(dim=(1, 2, 3))
    return {"consistency": (squared + ROUNDING**2).sqrt() - ROUNDING}
