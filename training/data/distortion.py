"""Distortions that leave what pictures show as it is: moved, turned, stretched, blurred, in other light, covered."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

SMALLEST, LARGEST = 0.55, 1.2  # sides of a placed view, of the frame's
# At full strength: turn in radians, stretch and shear as shares, factors of contrast, saturation and light.
TURN, STRETCH, SHEAR = math.radians(30), 0.25, 0.25
CONTRAST, SATURATION, LIGHT = 0.4, 0.6, 0.25
CHANNELS = 0.15  # what each colour channel is brighter or darker by
BLURRED = 0.6  # twice the share that is blurred
COVERED = 0.45  # largest side of the box that covers a part, of the frame's


def draw_place(rng: np.random.Generator) -> np.ndarray:
    """Draw where a view is in its frame, (3,); see `placed`."""
    return rng.uniform([SMALLEST, -1, -1], [LARGEST, 1, 1])


def draw_distortion(rng: np.random.Generator) -> np.ndarray:
    """Draw how a view is distorted, (17,) from -1 to 1; see `distorted`."""
    return rng.uniform(-1, 1, 17)


def placed(images: Tensor, places: Tensor, bend: Tensor | None = None) -> Tensor:
    """Return images (B, 3, H, W) scaled and moved within their frames, whose rim goes on to the edge.

    Args:
        places: (B, 3), the new side as a share of the frame's, and where, -1 to 1, of what that leaves free each way.
        bend: (B, 2, 2), what coordinates are multiplied by besides.
    """
    scale, free = places[:, 0], (1 - places[:, 0]).abs()
    theta = torch.zeros(len(images), 2, 3)
    theta[:, :, :2] = (torch.eye(2) if bend is None else bend) / scale[:, None, None]
    theta[:, :, 2] = -(theta[:, :, :2] @ (places[:, 1:] * free[:, None])[:, :, None])[:, :, 0]
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def distorted(images: Tensor, places: Tensor, chances: Tensor, strength: float) -> Tensor:
    """Return images placed, turned, stretched, some at half their resolution, in other light, and with a part covered.

    Args:
        images: (B, 3, H, W) in [-1, 1].
        places: see `placed`.
        chances: (B, 17) from -1 to 1, see `draw_distortion`.
        strength: 0 (placed only) to 1.

    Source: in kind, Cubuk et al. 2020, arXiv 1909.13719, and DeVries and Taylor 2017, arXiv 1708.04552.
    """
    if not strength:
        return placed(images, places)
    images = placed(images, places, bent(strength * chances[:, :3]))
    blurred = F.interpolate(F.avg_pool2d(images, 2), images.shape[-2:], mode="bilinear")
    images = torch.where(chances[:, 16, None, None, None] < BLURRED * strength - 1, blurred, images)
    return covered(recoloured(images, strength * chances[:, 3:9]), chances[:, 9:16], strength)


def bent(chances: Tensor) -> Tensor:
    """Return matrices (B, 2, 2) that turn, stretch and shear by (B, 3) shares of what is at most done."""
    turn, stretch, shear = TURN * chances[:, 0], torch.exp(STRETCH * chances[:, 1]), SHEAR * chances[:, 2]
    rotation = torch.stack([turn.cos(), -turn.sin(), turn.sin(), turn.cos()], dim=1).view(-1, 2, 2)
    form = torch.stack([stretch, shear, torch.zeros_like(shear), 1 / stretch], dim=1).view(-1, 2, 2)
    return rotation @ form


def recoloured(images: Tensor, chances: Tensor) -> Tensor:
    """Return images (B, 3, H, W) of another contrast, saturation, light and balance of colours.

    No hue is turned: a red apple stays one.

    Args:
        chances: (B, 6), shares of what is at most done.
    """
    factors = 1 + torch.tensor([CONTRAST, SATURATION, LIGHT]) * chances[:, :3]
    contrast, saturation, light = factors[:, :, None, None, None].unbind(dim=1)
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    images = mean + (images - mean) * contrast
    grey = images.mean(dim=1, keepdim=True)
    images = grey + (images - grey) * saturation
    channels = light * (1 + CHANNELS * chances[:, 3:, None, None])
    return ((images + 1) * channels - 1).clamp(-1, 1)


def covered(images: Tensor, chances: Tensor, strength: float) -> Tensor:
    """Return images (B, 3, H, W) of which some have a part covered by a box of one colour.

    Args:
        chances: (B, 7) from -1 to 1: whether (half of them at strength 1), where (y, x), how large, and its colour.
    """
    height, width = images.shape[-2:]
    y, x = torch.linspace(-1, 1, height)[:, None], torch.linspace(-1, 1, width)[None, :]
    whether, top, left, size = (chances[:, number, None, None] for number in range(4))
    half = COVERED * (size + 1) / 2
    box = ((y - top).abs() < half) & ((x - left).abs() < half) & (whether < strength - 1)
    return torch.where(box[:, None], chances[:, 4:, None, None], images)
