"""Sampling with a scheduler object of diffusers, for solvers without a table here; diffusers itself is not imported."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from latentdiff.diffusion.loop import Question, Questions, Step, answered, require_finite
from latentdiff.diffusion.plan import skipped_steps
from latentdiff.diffusion.prediction import Call, Network, halves
from latentdiff.diffusion.schedule import NoiseSchedule
from latentdiff.diffusion.scheduler_classes import ONLY_SUPPORTED
from latentdiff.errors import InputError

__all__ = ["Scheduler", "SchedulerPlan"]

ATTRIBUTES = ("alphas_cumprod", "init_noise_sigma", "scale_model_input", "timesteps")
PROCESS_KEYS = ("timestep_type", "use_flow_sigmas")  # of a config, for another noise process with the same attributes


class SchedulerOutput(Protocol):
    """What a step of a scheduler returns; some have their estimate of the clean sample besides."""

    prev_sample: Tensor


class Scheduler(Protocol):
    """What is used of a scheduler object of diffusers; a step may take more, and some have more."""

    config: Mapping[str, Any]
    alphas_cumprod: Tensor
    timesteps: Tensor
    init_noise_sigma: float | Tensor

    def set_timesteps(self, num_inference_steps: int) -> None:
        """Choose the timesteps."""

    def scale_model_input(self, sample: Tensor, timestep: Tensor) -> Tensor:
        """Return what the network is given of a noisy sample."""

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return a clean sample with noise."""

    @property
    def step(self) -> Callable[..., SchedulerOutput]:
        """(model_output, timestep, sample, ...) -> the sample of the next timestep."""


class SchedulerPlan:
    """Sampling run by a diffusers scheduler: its timesteps and noise levels, and the loop.

    Args:
        scheduler: one of the discrete variance-preserving kind, as DDIMScheduler; it is copied.
        schedule: the model's, with the noise process and prediction type that the scheduler must have too.
        num_inference_steps: 1 to schedule.num_train_timesteps; or else
        timesteps, sigmas: those that its `set_timesteps` is given, where it takes them.
        strength: above 0, up to 1; image-to-image skips the first steps.

    Raises:
        InputError: the object is no scheduler, has another noise process, or was made for another model.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        schedule: NoiseSchedule,
        num_inference_steps: int | None = None,
        strength: float = 1.0,
        *,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> None:
        _require_same_process(scheduler, schedule)
        order = getattr(scheduler, "order", 1)
        if num_inference_steps is not None:
            self.scheduler = _prepared(scheduler, num_inference_steps)
        else:
            self.scheduler = _at_levels(scheduler, "timesteps" if sigmas is None else "sigmas", timesteps or sigmas)
            num_inference_steps = -(-len(self.scheduler.timesteps) // order)
        self.first = skipped_steps(num_inference_steps, strength) * order
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
            noise, generators, image_latents: see `sampling`.
        """
        return answered(self.sampling(noise, generators, image_latents), network)

    def sampling(
        self, noise: Tensor, generators: Sequence[torch.Generator], image_latents: Tensor | None = None
    ) -> Questions:
        """Leave the calls of the network to the caller, as `loop.sampling` does.

        Args:
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
        options = {"generator": list(generators)} if "generator" in _step_parameters(scheduler) else {}
        # A config keeps keys that its class does not know.
        knows_variance = "variance_type" in inspect.signature(type(scheduler)).parameters
        learned = knows_variance and "learned" in str(scheduler.config["variance_type"])
        images = torch.arange(len(x), device=x.device)
        for index, timestep in enumerate(timesteps):
            levels = (timestep, self.sigmas[index])
            times, sigmas = (torch.full((len(x),), float(level), device=x.device) for level in levels)
            inputs = scheduler.scale_model_input(x, timestep)
            output = yield Question(inputs, Call(index, images, torch.full_like(images, index), sigmas, times))
            if output.shape[1] > x.shape[1] and not learned:
                output = halves(output)[0]
            result = scheduler.step(output.to(x.dtype), timestep, x, **options)
            x = result.prev_sample
            denoised = getattr(result, "pred_original_sample", None)
            yield Step(index, len(timesteps), _given(x), _given(x if denoised is None else denoised))
        require_finite(x, "pass the name of one of our samplers, or use dtype float32 or a lower guidance_scale")


def _require_same_process(scheduler: Scheduler, schedule: NoiseSchedule) -> None:
    """Raise InputError unless a scheduler denoises what the model was trained on."""
    name = type(scheduler).__name__
    if not hasattr(scheduler, "set_timesteps") or not hasattr(scheduler, "step"):
        raise InputError(f"sampler must be a name or a diffusers scheduler, got {name}; try 'dpmpp_2m'")
    config = getattr(scheduler, "config", {})
    other = [key for key in PROCESS_KEYS if config.get(key) not in ONLY_SUPPORTED[key]]
    lacking = [attribute for attribute in ATTRIBUTES if not hasattr(scheduler, attribute)]
    if other or lacking:
        cause = f"it has no {lacking[0]}" if lacking else f"{other[0]} is {config[other[0]]!r}"
        ours = "euler" if schedule.beta_schedule == "flow" else "dpmpp_2m"
        raise InputError(f"{name} is made for another noise process than the model ({cause}); try sampler {ours!r}")
    needed = [key for key, value in _step_parameters(scheduler).items() if value.default is inspect.Parameter.empty]
    more = [key for key in needed[3:] if key != "kwargs"]  # after model_output, timestep, sample
    if more:
        raise InputError(f"{name} needs {', '.join(more)} at each step, which the pipeline has not; try 'dpmpp_2m'")
    remedy = f"make it with {name}.from_config(pipe.components.schedule.to_dict())"
    theirs = config.get("prediction_type", "epsilon")
    if theirs != schedule.prediction_type:
        raise InputError(
            f"{name} takes the network's output for {theirs}, the model predicts {schedule.prediction_type}; {remedy}"
        )
    found = scheduler.alphas_cumprod
    if len(found) != schedule.num_train_timesteps or not torch.allclose(
        found.double().cpu(), schedule.alphas_cumprod, atol=1e-4
    ):
        raise InputError(f"{name} has another noise schedule than the model; {remedy}")


def _prepared(scheduler: Scheduler, num_inference_steps: int) -> Scheduler:
    """Return a copy of a scheduler that is set to some steps, if those lead from noise to data."""
    name, copied = type(scheduler).__name__, copy.deepcopy(scheduler)
    for steps in (max(num_inference_steps, 2), num_inference_steps):  # one step has no direction
        try:
            copied.set_timesteps(steps)
        except ValueError as error:
            raise InputError(f"{name} cannot take {steps} steps: {str(error)[:200]}") from error
        if (copied.timesteps.diff() > 0).any():
            raise InputError(f"{name} leads from data to noise, its timesteps rise; use Pipeline.invert")
    return copied


def _at_levels(scheduler: Scheduler, name: str, levels: Sequence[float] | None) -> Scheduler:
    """Return a copy of a scheduler that is set to timesteps or noise levels by hand."""
    kind, copied = type(scheduler).__name__, copy.deepcopy(scheduler)
    set_timesteps: Callable[..., None] = copied.set_timesteps  # which of its arguments there are differs
    if name not in inspect.signature(set_timesteps).parameters:
        raise InputError(f"{kind} takes no {name} by hand; leave them out, or pass the name of one of our samplers")
    listed = [int(level) if name == "timesteps" and level == int(level) else level for level in levels or ()]
    if name == "sigmas" and listed[-1] > 0:
        listed.append(0.0)  # as `make_plan` does; theirs would leave the last level's noise
    try:
        set_timesteps(**{name: listed})
    except ValueError as error:
        raise InputError(f"{kind} cannot take these {name}: {str(error)[:200]}") from error
    return copied


def _step_parameters(scheduler: Scheduler) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(scheduler.step).parameters


def _given(value: Tensor) -> Callable[[], Tensor]:
    return lambda: value
