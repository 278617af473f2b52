"""The loss of an autoencoder and that of its discriminator, term by term, as a config weighs them."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from latentdiff.models.autoencoder import AutoencoderKL, DiagonalGaussian
from latentdiff.models.lpips import Lpips

from ..config import AutoencoderTraining
from .image import (
    PatchDiscriminator,
    adaptive_weight,
    discriminator_loss,
    multiscale_gradient,
    r1_penalty,
    ssim,
)


def loss_terms(
    reconstruction: Tensor,
    images: Tensor,
    posterior: DiagonalGaussian,
    config: AutoencoderTraining,
    perceptual: Lpips | None = None,
) -> dict[str, Tensor]:
    """Return the weighted terms of the loss that are switched on, by name; their sum is what is minimised."""
    weights, terms = config.loss, {}
    if weights.l1:
        terms["l1"] = weights.l1 * F.l1_loss(reconstruction, images)
    if weights.l2:
        terms["l2"] = weights.l2 * F.mse_loss(reconstruction, images)
    if weights.gradient:
        terms["gradient"] = weights.gradient * multiscale_gradient(reconstruction, images)
    if weights.ssim:
        terms["ssim"] = weights.ssim * (1 - ssim(reconstruction, images))
    if weights.kl:
        terms["kl"] = weights.kl * posterior.kl().mean() / posterior.mean[0].numel()
    if perceptual is not None:
        terms["lpips"] = weights.lpips * perceptual(reconstruction, images).mean()
    return terms


def adversarial_term(
    loss: Tensor,
    reconstruction: Tensor,
    model: AutoencoderKL,
    discriminator: PatchDiscriminator,
    accelerator: Accelerator,
) -> tuple[Tensor, Tensor]:
    """Return how little the discriminator believes a reconstruction (B, 3, H, W), and the weight that balances it.

    Args:
        loss: the other terms.
        discriminator: is left without gradients.
    """
    frozen = {name: parameter.detach() for name, parameter in discriminator.named_parameters()}
    term = -functional_call(discriminator, frozen, (reconstruction,)).mean()

    def average(gradient: Tensor) -> Tensor:
        return accelerator.reduce(gradient, "mean")

    return term, adaptive_weight(loss, term, model.decoder.conv_out.weight, average)


def discriminator_terms(
    adversary: nn.Module, discriminator: PatchDiscriminator, images: Tensor, fakes: Tensor, config: AutoencoderTraining
) -> dict[str, Tensor]:
    """Return the weighted terms of the discriminator's loss that are switched on, by name.

    Args:
        adversary: the discriminator as the accelerator prepared it, through whose gradients the processes meet.
        images, fakes: (B, 3, H, W), the latter without gradients.
    """
    terms = {"discriminator": discriminator_loss(*adversary(torch.cat([images, fakes])).chunk(2))}
    if config.loss.r1:
        terms["r1"] = config.loss.r1 * r1_penalty(discriminator, images)
    return terms
