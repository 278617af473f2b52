"""Sampling by a scheduler of diffusers, for those that are no table here; diffusers itself is not imported."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from latentdiff.diffusion.loop import Step, require_finite
from latentdiff.diffusion.plan import skipped_steps
from latentdiff.diffusion.prediction import Call, Network, halves
from latentdiff.diffusion.schedule import NoiseSchedule
from latentdiff.errors import InputError

__all__ = ["SchedulerPlan"]


class SchedulerPlan:
    """What a pipeline needs to know of a run by a diffusers scheduler, and the run itself.

    Args:
        scheduler: any object with diffusers' `set_timesteps`, `step` and `scale_model_input`; it is copied.
        schedule: of the model, with whose noise process and prediction the scheduler has to agree.
        num_inference_steps: 1 to schedule.num_train_timesteps.
        strength: above 0, up to 1; image-to-image skips the first steps.

    Raises:
        InputError: no scheduler, or one made for another model.
    """

    def __init__(
        self, scheduler: Any, schedule: NoiseSchedule, num_inference_steps: int, strength: float = 1.0
    ) -> None:
        name = type(scheduler).__name__
        if not hasattr(scheduler, "set_timesteps") or not hasattr(scheduler, "step"):
            raise InputError(f"sampler must be a name or a diffusers scheduler, got {name}; try 'dpmpp_2m'")
        remedy = f"make it with {name}.from_config(pipe.components.schedule.to_dict())"
        theirs = scheduler.config.get("prediction_type", "epsilon")
        if theirs != schedule.prediction_type:
            raise InputError(
                f"{name} takes the network's output for {theirs}, the model predicts {schedule.prediction_type}; "
                f"{remedy}"
            )
        found = getattr(scheduler, "alphas_cumprod", None)
        if found is not None and (
            len(found) != schedule.num_train_timesteps
            or not torch.allclose(found.cpu().double(), schedule.alphas_cumprod, atol=1e-4)
        ):
            raise InputError(f"{name} has another noise schedule than the model; {remedy}")
        self.scheduler = copy.deepcopy(scheduler)
        self.scheduler.set_timesteps(num_inference_steps)
        self.first = skipped_steps(num_inference_steps, strength) * getattr(self.scheduler, "order", 1)
        self.timesteps = self.scheduler.timesteps[self.first :].cpu().double()
        # Its own noise levels may differ where it interpolates; guidance intervals need no more than this.
        places = self.timesteps.clamp(0, schedule.num_train_timesteps - 1).round().long()
        self.sigmas = schedule.sigmas[places]

    def __len__(self) -> int:
        return len(self.timesteps)

    def run(
        self,
        network: Network,
        noise: Tensor,
        generators: Sequence[torch.Generator],
        image_latents: Tensor | None = None,
    ) -> Iterator[Step]:
        """Yield after each step; the last one's `x` are the sampled latents.

        Args:
            network: see `prediction.Network`.
            noise: (B, C, H, W) standard normal.
            generators: one per image.
            image_latents: (B, C, H, W) scaled latents to start from.
        """
        scheduler = copy.deepcopy(self.scheduler)
        timesteps = scheduler.timesteps[self.first :]
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(self.first)
        if image_latents is None:
            x = noise * scheduler.init_noise_sigma
        else:
            x = scheduler.add_noise(image_latents, noise, timesteps[:1].repeat(len(noise)))
        options = {"generator": list(generators)} if "generator" in inspect.signature(scheduler.step).parameters else {}
        # A config keeps keys that its class does not know.
        knows_variance = "variance_type" in inspect.signature(type(scheduler)).parameters
        learned = knows_variance and "learned" in str(scheduler.config["variance_type"])
        images = torch.arange(len(x), device=x.device)
        for index, timestep in enumerate(timesteps):
            levels = (timestep, self.sigmas[index])
            told, sigmas = (torch.full((len(x),), float(level), device=x.device) for level in levels)
            inputs = scheduler.scale_model_input(x, timestep)
            output = network(inputs, Call(index, images, torch.full_like(images, index), sigmas, told))
            if output.shape[1] > x.shape[1] and not learned:
                output = halves(output)[0]
            result = scheduler.step(output.to(x.dtype), timestep, x, **options)
            x = result.prev_sample
            denoised = getattr(result, "pred_original_sample", None)
            yield Step(index, len(timesteps), _given(x), _given(x if denoised is None else denoised))
        require_finite(x, "pass the name of one of our samplers, or use dtype float32 or a lower guidance_scale")


def _given(value: Tensor) -> Any:
    return lambda: value
