"""Compute the diffusion loss, and check that loss, variance and schedule fit together."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from latentdiff.checkpoints import Components, Encoders
from latentdiff.diffusion.likelihood import bound_nats
from latentdiff.diffusion.prediction import halves, x0_estimate
from latentdiff.diffusion.schedule import NoiseSchedule
from latentdiff.errors import InputError
from latentdiff.models.pixels import PixelSpace

from ..config import DiffusionTraining, ObjectiveConfig
from ..data.batches import Batch, Conditioning
from ..networks.encoders import require_one_encoder

Predict = Callable[..., Tensor]
"""A U-Net, or what is called as one: (model inputs, timesteps, context, **Conditioning) -> prediction."""


def require_trainable(config: DiffusionTraining, components: Encoders) -> None:
    """Raise InputError where loss, variance and schedule do not fit together, or the U-Net asks for more than text."""
    schedule = components.schedule
    if config.encodes_each_step:
        require_one_encoder(components, f"train.kind {config.train.kind}")
    if isinstance(components, Components):
        shape = components.unet.config
        more = {
            "how beautiful a picture is (XL's refiner)": shape.expects_sizes and components.text_encoder_2 is None,
            "a mask (task inpaint)": components.inpaints and config.task.kind != "inpaint",
            "a small picture (task upscale)": components.upscales and config.task.kind != "upscale",
            "an embedded guidance scale": shape.time_cond_proj_dim is not None,
        }
        for what in (name for name, wanted in more.items() if wanted):
            raise InputError(f"start_from: its U-Net also expects {what}, which is not trained here; use another model")
        if shape.self_conditioning != config.objective.self_conditioning:
            raise InputError(
                f"start_from: its U-Net has objective.self_conditioning {shape.self_conditioning}; set it so"
            )
    require_objective(config.objective, schedule)


def require_objective(objective: ObjectiveConfig, schedule: NoiseSchedule) -> None:
    """Raise InputError where loss, variance and schedule do not fit together."""
    learned, loss = schedule.variance_type == "learned_range", objective.loss
    if loss == "hybrid" and not learned:
        raise InputError(
            "loss: hybrid trains the variance, which needs schedule.variance_type learned_range, got "
            f"{schedule.variance_type}; choose that, or loss: simple"
        )
    if loss == "simple" and learned:
        raise InputError("schedule.variance_type learned_range is not trained by loss: simple; choose loss: hybrid")
    if loss != "simple" and (objective.offset_noise or objective.input_perturbation):
        raise InputError(f"loss: {loss} bounds the likelihood of plain noise; leave offset_noise and others at 0")
    if loss != "simple" and schedule.ends_in_pure_noise:
        raise InputError(f"loss: {loss} needs some signal at the last timestep; choose loss: simple")


def model_inputs(
    noisy: Tensor, self_conditioning: bool, estimate: Tensor | None = None, concat: Tensor | None = None
) -> Tensor:
    """Return what the network is given of noisy latents (B, C, h, w).

    Args:
        self_conditioning: whether the network takes its own estimate of the step before besides.
        estimate: (B, C, h, w), that of the step before, with self-conditioning.
        concat: (B, C', h, w), channels concatenated to them, of a task that has them.
    """
    if concat is not None:
        return torch.cat([noisy, concat], dim=1)
    if not self_conditioning:
        return noisy
    return torch.cat([noisy, torch.zeros_like(noisy) if estimate is None else estimate], dim=1)


def conditioning(batch: Batch) -> Conditioning:
    """Return the conditioning of the network besides context: pooled text, sizes and noise levels."""
    options: Conditioning = {"added": batch.added} if batch.added else {}
    if batch.concat is not None and batch.concat.levels is not None:
        options["class_labels"] = batch.concat.levels
    return options


def diffusion_losses(
    unet: Predict,
    components: Encoders,
    objective: ObjectiveConfig,
    batch: Batch,
    timesteps: Tensor,
    noise: Tensor,
    estimated: bool = False,
    shown: Tensor | None = None,
) -> Tensor:
    """Return the loss (B,) of each image of a batch, the sum of its terms; arguments are those of `loss_terms`."""
    given = (unet, components, objective, batch, timesteps, noise, estimated, shown)
    return torch.stack([*loss_terms(*given).values()]).sum(dim=0)


def loss_terms(
    unet: Predict,
    components: Encoders,
    objective: ObjectiveConfig,
    batch: Batch,
    timesteps: Tensor,
    noise: Tensor,
    estimated: bool = False,
    shown: Tensor | None = None,
) -> dict[str, Tensor]:
    """Return the terms of the loss, each (B,), of each image of a batch: "simple", "vlb", or both.

    Args:
        unet: called as the network is; may run in half precision.
        components: schedule and autoencoder are looked at.
        timesteps: (B,) int64.
        noise: (B, C, h, w), standard normal.
        estimated: with self-conditioning, give the network its estimate of a first pass; else zeros.
        shown: (B, C, h, w), the noise on what the network sees; None for `noise`.

    Source: Ho et al. 2020, arXiv 2006.11239, Eq. 14 (simple); Nichol & Dhariwal 2021, arXiv 2102.09672, Eq. 16 (hybrid)
    and section 3.3 (vlb); Chen et al. 2022, arXiv 2208.04202, algorithm 1 (self-conditioning).
    """
    schedule, latents, channels = components.schedule, batch.latents, batch.latents.shape[1]
    noisy = schedule.add_noise(latents, noise if shown is None else shown, timesteps)
    sigmas = schedule.sigma_at(timesteps, latents)  # (B, 1, 1, 1)
    estimate = None
    more, twice = conditioning(batch), objective.self_conditioning
    if twice and estimated:
        with torch.no_grad():
            output = unet(model_inputs(noisy, twice), timesteps, batch.context, **more).float()[:, :channels]
        estimate = x0_estimate(schedule.prediction_type, noisy, output, sigmas)
    concat = None
    if batch.concat is not None:
        with torch.autocast(latents.device.type, enabled=False):  # as while sampling; fp16 may overflow
            concat = batch.concat.inputs(components)
    prediction = unet(model_inputs(noisy, twice, estimate, concat), timesteps, batch.context, **more).float()
    variance: str | Tensor = "fixed_small"
    if prediction.shape[1] > channels:
        prediction, variance = halves(prediction)
    errors = (prediction - schedule.target(latents, noise, timesteps)).square().mean(dim=(1, 2, 3))  # (B,)
    simple = errors * loss_weight(schedule, timesteps, objective.weighting, objective.min_snr_gamma)
    if objective.loss == "simple":
        return {"simple": simple}
    # Hybrid: the bound trains the variance alone, so that its noisy gradient leaves the prediction in peace.
    learned_from = prediction.detach() if objective.loss == "hybrid" else prediction
    x0 = x0_estimate(schedule.prediction_type, noisy, learned_from, sigmas)
    x_t = (latents + sigmas * noise) / (1 + sigmas**2).sqrt()  # in VP coordinates, whatever the network sees
    in_pixels = isinstance(components.autoencoder, PixelSpace)
    nats = bound_nats(schedule, latents, x_t, x0, timesteps, variance, eight_bit=in_pixels)
    bound = schedule.num_train_timesteps * nats.mean(dim=(1, 2, 3)) / math.log(2)  # (B,) bits per dimension
    return {"vlb": bound} if objective.loss == "vlb" else {"simple": simple, "vlb": objective.vlb_weight * bound}


def loss_weight(schedule: NoiseSchedule, timesteps: Tensor, weighting: str = "min_snr", gamma: float = 5.0) -> Tensor:
    """Return the weight (B,) of each timestep's squared error, which weighs an x0 error alike whatever is predicted.

    Args:
        timesteps: (B,) int64.
        weighting: of the x0 error: "min_snr", min(SNR, gamma); "p2", SNR / (1 + SNR); "debiased", the root of SNR.
        gamma: of min_snr; 0 weighs the errors of what is predicted alike.

    Source: Hang et al. 2023, arXiv 2303.09556, Eq. 4 and section 3.4; Choi et al. 2022, arXiv 2204.00227, Eq. 8 with
    k = gamma = 1; Yu et al. 2023, arXiv 2310.08442, section 4.
    """
    if weighting == "min_snr" and gamma == 0:
        return timesteps.new_ones(len(timesteps), dtype=torch.float32)
    snr = schedule.snr(timesteps).to(timesteps.device, torch.float32)
    of_x0 = {"min_snr": snr.clamp_max(gamma), "p2": snr / (1 + snr), "debiased": snr.sqrt()}
    of_error = {
        "epsilon": snr,
        "v_prediction": snr + 1,
        "sample": torch.ones_like(snr),
        "flow_prediction": (snr.sqrt() + 1) ** 2,
    }
    return of_x0[weighting] / of_error[schedule.prediction_type]
