"""The loss term that makes latents of a smaller or turned picture smaller or turned latents, easier to learn."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from latentdiff.models.autoencoder import AutoencoderKL

# Sides of the smaller latents, as shares of those of the whole ones.
SMALLEST, LARGEST = 0.25, 0.75


def equivariance(model: AutoencoderKL, latents: Tensor, images: Tensor, generator: torch.Generator) -> Tensor:
    """Return the mean absolute error of what is decoded of latents that are made smaller and turned.

    Args:
        latents: of the images, (B, C, h, w), drawn from their distribution.
        images: (B, 3, H, W), which are made smaller and turned alike.
        generator: draws how much smaller, between a quarter and three quarters, and by how many right angles.

    Source: Kouzelis et al. 2025, arXiv 2502.09509 (EQ-VAE), Eq. 5, as a term of its own.
    """
    factor = model.config.downsample_factor
    share = SMALLEST + (LARGEST - SMALLEST) * float(torch.rand((), generator=generator))
    height, width = (max(1, round(share * side)) for side in latents.shape[-2:])
    turns = int(torch.randint(4, (), generator=generator))
    smaller = F.interpolate(latents.float(), (height, width), mode="bilinear", antialias=True)  # not in bfloat16 there
    wanted = F.interpolate(images, (height * factor, width * factor), mode="bilinear", antialias=True)
    return F.l1_loss(model.decode(smaller.rot90(turns, (-2, -1))).float(), wanted.rot90(turns, (-2, -1)))
