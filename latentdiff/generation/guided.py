"""The guided network: what it takes, at one row of a plan, to predict with and without the prompt, and to guide.

Calls of the U-Net are not made here but yielded, so that whoever draws may join those of several pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import NamedTuple

import torch
from torch import Tensor

from latentdiff.checkpoints import Components
from latentdiff.diffusion import (
    Call,
    Plan,
    SchedulerPlan,
    adaptive_projected,
    classifier_free,
    guidance_scales,
    preconditioning,
    rescaled,
)
from latentdiff.engine.engines import Reusing
from latentdiff.engine.execution import Execution
from latentdiff.engine.tiled_denoising import Windows, tiled
from latentdiff.generation.request import Settings
from latentdiff.generation.text import BatchConditioning
from latentdiff.models.unet import Predict, PreparedUNet, UNet2DConditionModel

__all__ = ["Guided", "UNetCall", "guided_network"]


class UNetCall(NamedTuple):
    """A call of a U-Net that is due.

    Attributes:
        network: with text and timesteps in it.
        inputs: (b, C, h, w), in its dtype.
        rows: (b,) int64, for each the number of its timestep.
    """

    network: PreparedUNet
    inputs: Tensor
    rows: Tensor

    def run(self) -> Tensor:
        """Return the output (b, C', h, w)."""
        return self.network(self.inputs, self.rows)


# (model_input (b, C, h, w), call) -> yields calls of the U-Net, is sent their outputs, and returns the guided output
Guided = Callable[[Tensor, Call], Generator[UNetCall, Tensor, Tensor]]


def guided_network(
    components: Components,
    execution: Execution,
    settings: Settings,
    cond: BatchConditioning,
    plan: Plan | SchedulerPlan,
    concat: Tensor | None = None,
    windows: Windows | None = None,
) -> Guided:
    """Return the guided network for a batch of b images, text and time computed once.

    Args:
        components: of the model.
        execution: how they are run.
        settings: of the job.
        cond: conditioning of these images.
        plan: whose timesteps it is called at.
        concat: (b or 1, C', h, w) input channels besides x, or None.
        windows: in which it looks at the map; None for all of it at once.
    """
    unet, context = components.unet, cond.context
    count, dtype = len(context) // 2, unet.conv_in.weight.dtype
    scales = _scales(settings, unet, cond, plan)
    timesteps = plan.timesteps.to(context.device, torch.float32)
    prepared = unet.prepare(
        timesteps,
        context,
        added=cond.added,
        class_labels=cond.class_labels,
        texts=execution.engine.texts(unet),
        shifts=execution.engine.shifts(unet),
    )
    conditional_alone, looks = prepared.rows(slice(count, 2 * count)), tiled(windows)
    prepared, conditional_alone = (
        one.run_by(_predict(unet, execution, settings)) for one in (prepared, conditional_alone)
    )

    def predict(network: PreparedUNet, inputs: Tensor, rows: Tensor) -> Generator[UNetCall, Tensor, Tensor]:
        looking = looks(inputs)
        try:
            window = next(looking)
            while True:
                window = looking.send((yield UNetCall(network, window, rows)))
        except StopIteration as joined:
            return joined.value.float()

    def network(model_input: Tensor, call: Call) -> Generator[UNetCall, Tensor, Tensor]:
        scale, inputs = scales[call.index], model_input
        if concat is not None:
            inputs = torch.cat([inputs, concat.expand(len(inputs), -1, -1, -1)], dim=1)
        inputs = inputs.to(dtype)
        if scale == 1:
            return (yield from predict(conditional_alone, inputs, call.rows))
        both = yield from predict(prepared, torch.cat([inputs, inputs]), call.rows.repeat(2))  # (2b, C, h, w)
        unconditional, conditional = both.chunk(2)
        return _guide(components, settings, conditional, unconditional, scale, model_input, call)

    return network


def _predict(unet: UNet2DConditionModel, execution: Execution, settings: Settings) -> Predict:
    """Return what runs a U-Net for one batch of images."""
    if settings.deep_every > 1:
        return Reusing(unet, settings.deep_every)
    return execution.engine.predict(unet)


def _scales(
    settings: Settings, unet: UNet2DConditionModel, cond: BatchConditioning, plan: Plan | SchedulerPlan
) -> list[float]:
    """Return how far each call is steered: not at all by a network that knows the scale, or where nothing differs."""
    if unet.config.time_cond_proj_dim is not None or _same_halves(cond):
        return [1.0] * len(plan.sigmas)
    scale, when, schedule = settings.guidance_scale, settings.guidance_interval, settings.guidance_schedule
    return guidance_scales(plan.sigmas, scale, when, schedule).tolist()


def _same_halves(cond: BatchConditioning) -> bool:
    """Say whether conditional and unconditional halves are equal, as with two empty prompts; nothing is guided then."""
    return all(torch.equal(*tensor.chunk(2)) for tensor in (cond.context, *cond.added.values()))


def _guide(
    components: Components,
    settings: Settings,
    conditional: Tensor,
    unconditional: Tensor,
    scale: float,
    inputs: Tensor,
    call: Call,
) -> Tensor:
    """Return the guided output (b, C, h, w); where the network learns its variance, that of the conditional one."""
    channels = components.autoencoder.config.latent_channels
    shares = conditional[:, channels:]  # none, or (b, C, h, w)
    conditional, unconditional = conditional[:, :channels], unconditional[:, :channels]
    if settings.guidance_parallel == 1 and settings.guidance_limit is None:
        guided = classifier_free(conditional, unconditional, scale, settings.guidance_rescale)
        return torch.cat([guided, shares], dim=1)
    sigmas = call.sigmas.reshape(-1, 1, 1, 1)
    c_skip, c_out, c_in = preconditioning(components.schedule.prediction_type, sigmas)
    skipped = c_skip / c_in * inputs[:, :channels]
    guided = adaptive_projected(  # of x0 estimates
        skipped + c_out * conditional,
        skipped + c_out * unconditional,
        scale,
        parallel=settings.guidance_parallel,
        limit=settings.guidance_limit,
    )
    guided = (guided - skipped) / c_out
    return torch.cat([rescaled(guided, conditional, settings.guidance_rescale), shares], dim=1)
