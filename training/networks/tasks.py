"""What a model needs for another task: more input channels, a schedule for small pictures."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.nn import functional as F

from latentdiff.checkpoints import Components, Encoders
from latentdiff.diffusion.schedule import NoiseSchedule
from latentdiff.errors import InputError
from latentdiff.models.unet import UNet2DConditionModel

from ..config import DiffusionTraining, LoraConfig, UpscaleTask
from ..data.conditions import extra_channels


def with_task(config: DiffusionTraining, components: Encoders) -> Encoders:
    """Return components that can do a config's task: a U-Net of more input channels, a schedule for small pictures.

    Raises:
        InputError: the model to start from does another task, or was told of less noise.
    """
    if not isinstance(components, Components):
        if not isinstance(config.task, UpscaleTask):
            return components
        low = NoiseSchedule.from_dict(config.task.low_res_schedule)
        return replace(components, low_res_schedule=replace(low, class_name="DDPMScheduler"))  # as of SD's x4 upscaler
    does = components.task
    if config.task.kind == "inpaint" and does == "text_to_image":
        if isinstance(config.train, LoraConfig):
            raise InputError("a lora has no new input channels; leave it out, or start_from a model that inpaints")
        more = extra_channels(config, components.unet.config.in_channels)
        return replace(components, unet=widened(components.unet, more))
    if config.task.kind != does:
        raise InputError(
            f"task {config.task.kind} must be what {config.start_from} does, {does}; start_from another model"
        )
    known = components.unet.config.num_class_embeds
    if isinstance(config.task, UpscaleTask) and known is not None and config.task.max_noise_level >= known:
        raise InputError(f"task.max_noise_level must be at most {known - 1}, which the model was told of; lower it")
    return components


@torch.no_grad()
def widened(unet: UNet2DConditionModel, more: int) -> UNet2DConditionModel:
    """Return a U-Net with more input channels, whose weights are zero: whatever they show, it draws as before."""
    config = replace(unet.config, in_channels=unet.config.in_channels + more)
    with torch.device("meta"):
        wide = UNet2DConditionModel(config)
    weights = dict(unet.state_dict())
    weights["conv_in.weight"] = F.pad(weights["conv_in.weight"], (0, 0, 0, 0, 0, more))
    wide.load_state_dict(weights, assign=True)
    return wide
