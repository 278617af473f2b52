"""Convolutional building blocks of the autoencoder and the U-Net."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TimestepEmbedding(nn.Module):
    """Two-layer perceptron over a sinusoidal embedding, with the guidance input of consistency models when asked for."""

    def __init__(self, in_channels: int, channels: int, cond_channels: int | None = None) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_channels, channels)
        if cond_channels is not None:
            self.cond_proj = nn.Linear(cond_channels, in_channels, bias=False)
        self.linear_2 = nn.Linear(channels, channels)

    def forward(self, embedding: Tensor, condition: Tensor | None = None) -> Tensor:
        if condition is not None:
            embedding = embedding + self.cond_proj(condition)
        return self.linear_2(F.silu(self.linear_1(embedding)))  # (B, channels)


def sinusoidal_embedding(
    positions: Tensor, channels: int, flip_sin_to_cos: bool = True, freq_shift: float = 0
) -> Tensor:
    """Embed positions (timesteps, sizes) as sines and cosines.

    Args:
        positions: (B,) any number type.
        channels: width of the result, even.
        flip_sin_to_cos: cosines first.
        freq_shift: subtracted from the number of frequencies in the exponent.

    Returns:
        (B, channels) float32.

    Source: Vaswani et al. 2017, arXiv 1706.03762, section 3.5.
    """
    half = channels // 2
    exponent = -math.log(10000) * torch.arange(half, dtype=torch.float32, device=positions.device)
    angles = positions.float()[:, None] * torch.exp(exponent / (half - freq_shift))[None]  # (B, half)
    sine, cosine = angles.sin(), angles.cos()
    return torch.cat([cosine, sine] if flip_sin_to_cos else [sine, cosine], dim=-1)


class ResnetBlock2D(nn.Module):
    """Residual block of two 3x3 convolutions; the time embedding, projected, is added between them.

    Source: Ho et al. 2020, arXiv 2006.11239, appendix B.
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, groups: int, eps: float, time_channels: int | None = None
    ) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        if time_channels is not None:
            self.time_emb_proj = nn.Linear(time_channels, out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1)
        self.has_shortcut = in_channels != out_channels

    def forward(self, x: Tensor, time_shift: Tensor | None = None) -> Tensor:
        """Return (B, out, H, W) for x (B, in, H, W) and the projected time embedding (B, out)."""
        hidden = self.conv1(F.silu(self.norm1(x)))  # (B, out, H, W)
        if time_shift is not None:
            hidden = hidden + time_shift[:, :, None, None]
        hidden = self.conv2(F.silu(self.norm2(hidden)))
        return hidden + (self.conv_shortcut(x) if self.has_shortcut else x)


class Downsample2D(nn.Module):
    """Halve height and width by a strided convolution; `padding` 0 pads right and bottom only, as the autoencoder does."""

    def __init__(self, channels: int, padding: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)
        self.pad = padding == 0

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.pad else x)  # (B, C, H/2, W/2)


class Upsample2D(nn.Module):
    """Double height and width by repetition, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Return (B, C, 2H, 2W), or the given (height, width) where a skip connection of odd size asks for it."""
        if size is None:
            size = (x.shape[-2] * 2, x.shape[-1] * 2)
        return self.conv(F.interpolate(x, size=size, mode="nearest"))
