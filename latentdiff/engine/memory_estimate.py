"""Estimate the memory of upscaling from the shapes held at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from latentdiff.engine.tiled_decoding import ENLARGED_MAP, needs_tiles
from latentdiff.engine.tiled_denoising import Windows
from latentdiff.models.autoencoder import AutoencoderConfig, AutoencoderKL
from latentdiff.models.pixels import PixelSpace
from latentdiff.models.unet import DOWN_BLOCKS, UNet2DConditionModel

__all__ = ["enlarging_bytes", "sampling_bytes"]

RUNTIME = 560 * 2**20  # what Python, torch (its CUDA build) and this package take, the weights left out
HELD = 12  # maps of the size of the latents that a sampler, its noise and its inputs are
PIXELS = 6  # float32 pictures that are held on the way from the decoder to a file
RESNET_MAPS = 7  # maps that a residual block of the way up holds at once, its joined input counted twice
TRANSFORMER_MAPS = 14  # maps of a transformer's width that its feed-forward layer holds at once


def enlarging_bytes(
    networks: Sequence[nn.Module],
    unet: UNet2DConditionModel,
    autoencoder: AutoencoderKL | PixelSpace,
    windows: Windows,
    batch: int,
) -> int:
    """Return about how many bytes it takes to enlarge pictures: the runtime, all weights and the larger of two peaks.

    Args:
        networks: all that are held, the U-Net and the autoencoder among them.
        unet: is called for one window at a time.
        autoencoder: decodes one image at a time, in tiles where that is large.
        windows: of the latents.
        batch: rows of a call of the U-Net, twice the images where they are guided.
    """
    dtype, config = unet.conv_in.weight.dtype, autoencoder.config
    weights = sum(tensor.nbytes for network in networks for tensor in network.parameters())
    area = windows.height * windows.width
    latents = _held_bytes(unet, config.latent_channels, area, batch)
    sampling = sampling_bytes(unet, config.latent_channels, area, windows.tall * windows.wide, batch)
    pixels = area * config.downsample_factor**2
    decoding = latents + PIXELS * 3 * pixels * 4
    if isinstance(config, AutoencoderConfig):
        height, width = (side * config.downsample_factor for side in (windows.height, windows.width))
        decoding += _decoder_numbers(config, height, width, dtype) * dtype.itemsize
    return RUNTIME + weights + max(sampling, decoding)


def sampling_bytes(unet: UNet2DConditionModel, channels: int, area: int, window: int, batch: int) -> int:
    """Return about how many bytes it takes to sample, the weights left out.

    Args:
        unet: is called for one window at a time.
        channels: of the latents.
        area: of their map.
        window: area of the part of it that the U-Net is called for.
        batch: rows of a call of the U-Net.
    """
    numbers = batch * _unet_numbers(unet, window)
    return _held_bytes(unet, channels, area, batch) + numbers * unet.conv_in.weight.dtype.itemsize


def _held_bytes(unet: UNet2DConditionModel, channels: int, area: int, batch: int) -> int:
    return HELD * batch * max(channels, unet.config.in_channels) * area * 4


def _unet_numbers(unet: UNet2DConditionModel, area: int) -> int:
    """Return how many numbers a U-Net holds for one map: what the way down leaves, and the largest block's own."""
    config = unet.config
    attended = [DOWN_BLOCKS[name] for name in config.down_block_types]
    left, largest = 0.0, 0.0
    for level, shape in enumerate(config.shapes(attended)):
        numbers = shape.channels * area / 4**level
        left += (shape.layers + 1) * numbers
        largest = max(largest, numbers * (TRANSFORMER_MAPS if attended[level] else RESNET_MAPS))
    return int(left + largest)


def _decoder_numbers(config: AutoencoderConfig, height: int, width: int, dtype: torch.dtype) -> int:
    """Return how many numbers a decoder holds: three of its largest map, or the two that are kept between tiles."""
    channels = config.block_out_channels[:2][-1]
    if needs_tiles(config, height, width, dtype, ENLARGED_MAP):
        return 2 * channels * height * width // 4
    return 3 * channels * height * width
