"""What a model's autoencoder makes of pictures: their latents, and the pictures that come back."""

from __future__ import annotations

import torch
from torch import Tensor

from latentdiff.checkpoints import Components
from latentdiff.checkpoints.components import Autoencoder
from latentdiff.checkpoints.hashes import network_digest
from latentdiff.errors import InputError
from latentdiff.evaluate.features import LATENTS, FeatureNetwork
from latentdiff.images import to_unit_range
from latentdiff.models.pixels import PixelSpace

__all__ = ["eight_bit", "encode", "has_latents", "latent_features", "reconstruct", "returned_by"]

IMAGES_AT_ONCE = 16
NOT_FINITE = "the autoencoder makes values that are not finite; try --dtype float32"


def has_latents(components: Components) -> bool:
    """Say whether a model has an autoencoder, and draws no pixels."""
    return not isinstance(components.autoencoder, PixelSpace)


@torch.no_grad()
def encode(components: Components, images: Tensor) -> Tensor:
    """Return the most likely latents (N, C, h, w) float32, unscaled, of images (N, 3, H, W) in [-1, 1].

    Raises:
        InputError: they are not finite.
    """
    weight = next(components.autoencoder.parameters())
    parts = [components.autoencoder.encode(part.to(weight)).mode() for part in images.split(IMAGES_AT_ONCE)]
    found = torch.cat(parts).float().cpu()
    if not found.isfinite().all():
        raise InputError(NOT_FINITE)
    return found


def latent_features(components: Components) -> FeatureNetwork:
    """Return the latents of a model's autoencoder as features, (B, C*h*w).

    Raises:
        InputError: the model has none.
    """
    if not has_latents(components):
        raise InputError("this model draws pixels and has no latents; choose other --features")
    digest = network_digest(components.autoencoder)
    return FeatureNetwork(LATENTS, digest, "none", lambda images: encode(components, images).flatten(1))


@torch.no_grad()
def reconstruct(components: Components, images: Tensor) -> Tensor:
    """Return images (N, 3, H, W) in [-1, 1] as they come back from their most likely latents, in 8 bits as if saved.

    Raises:
        InputError: the model has no autoencoder, its sides do not fit, or what comes back is not finite.
    """
    if not has_latents(components):
        raise InputError(
            "this model draws pixels and has no autoencoder to measure; leave out rfid, psnr, ssim and lpips"
        )
    return returned_by(components.autoencoder, images)


@torch.no_grad()
def returned_by(autoencoder: Autoencoder, images: Tensor) -> Tensor:
    """Return images (N, 3, H, W) in [-1, 1] as an autoencoder gives them back, in 8 bits; see `reconstruct`."""
    factor, side = autoencoder.config.downsample_factor, min(images.shape[-2:])
    if any(length % factor for length in images.shape[-2:]):
        raise InputError(f"pictures must be multiples of {factor} pixels wide and high, got {side}; use another --data")
    weight = next(autoencoder.parameters())
    parts = []
    for part in images.split(IMAGES_AT_ONCE):
        found = autoencoder.decode(autoencoder.encode(part.to(weight)).mode()).float()
        if not found.isfinite().all():
            raise InputError(NOT_FINITE)
        parts.append(eight_bit(found.cpu()))
    return torch.cat(parts)


def eight_bit(images: Tensor) -> Tensor:
    """Return images (N, 3, H, W) in [-1, 1] as 8 bits hold them."""
    return to_unit_range(images).mul(255).round().div(127.5).sub(1)
