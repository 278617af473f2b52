"""The loss of an autoencoder and that of its discriminator, term by term, as a config weighs them."""

from __future__ import annotations

from dataclasses import dataclass

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


@dataclass(frozen=True)
class References:
    """Networks that terms of the loss ask and that are not trained; None where the term is off.

    Attributes:
        perceptual: of lpips.
        started: of latents, the autoencoder that training started from.
    """

    perceptual: Lpips | None = None
    started: AutoencoderKL | None = None

    @property
    def networks(self) -> list[nn.Module]:
        """Those that are there."""
        return [network for network in (self.perceptual, self.started) if network is not None]


NONE = References()


def loss_terms(
    reconstruction: Tensor,
    images: Tensor,
    posterior: DiagonalGaussian,
    config: AutoencoderTraining,
    references: References = NONE,
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
    if weights.kl and not config.decoder_only:
        terms["kl"] = weights.kl * posterior.kl().mean() / posterior.mean[0].numel()
    if references.perceptual is not None:
        terms["lpips"] = weights.lpips * references.perceptual(reconstruction, images).mean()
    if references.started is not None:
        terms["latents"] = weights.latents * latent_distance(posterior, images, references.started)
    return terms


def latent_distance(posterior: DiagonalGaussian, images: Tensor, other: AutoencoderKL) -> Tensor:
    """Return the mean squared distance of latents to those that another autoencoder has of the pictures.

    Args:
        posterior: of the images, (B, C, h, w); of its channels as many as the other one has are compared.
        images: (B, 3, H, W), made smaller for the other one where it makes them less small.
    """
    size = [side * other.config.downsample_factor for side in posterior.mean.shape[-2:]]
    with torch.no_grad():
        wanted = other.encode(F.interpolate(images, size, mode="area")).mode()
    return F.mse_loss(posterior.mode()[:, : wanted.shape[1]], wanted)


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
