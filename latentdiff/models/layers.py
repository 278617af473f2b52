"""Layers that the autoencoder and the U-Net share: residual block, down- and upsampling, time embedding.

Attribute names are those of diffusers' modules. All layers take and keep either memory format of a map (B, C, H, W),
contiguous or channels_last.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ResnetBlock2D(nn.Module):
    """Add to the input two convolutions of it, each after group norm and SiLU; the time shifts the channels between.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output; where they differ, a 1x1 convolution joins the two.
        groups: of both group norms.
        eps: of both group norms.
        time_channels: width D of the time embedding, None for a block without one.
        dropout: share of values zeroed before the second convolution while training.

    Source: He et al. 2016, arXiv 1603.05027; Dhariwal and Nichol 2021, arXiv 2105.05233, section 3.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        groups: int,
        eps: float,
        time_channels: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        if time_channels is not None:
            self.time_emb_proj = nn.Linear(time_channels, out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None
        self.dropout = dropout

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        """Return (B, C_out, H, W) for x (B, C_in, H, W) and shift (B, C_out), which comes from `time_emb_proj`."""
        hidden = self.conv1(activate(self.norm1(x)))  # (B, C_out, H, W)
        if shift is not None:
            hidden = hidden + shift[:, :, None, None]
        hidden = activate(self.norm2(hidden))
        if self.dropout:
            hidden = F.dropout(hidden, self.dropout, self.training)
        hidden = self.conv2(hidden)
        return hidden + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Downsample2D(nn.Module):
    """Halve height and width by a strided 3x3 convolution.

    Args:
        channels: of input and output.
        symmetric: pad all four sides (the U-Net), or only right and bottom (the autoencoder).
    """

    def __init__(self, channels: int, *, symmetric: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1 if symmetric else 0)
        self.symmetric = symmetric

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, H/2, W/2) for x (B, C, H, W); odd sides are rounded up when symmetric, else down."""
        return self.conv(x if self.symmetric else F.pad(x, (0, 1, 0, 1)))


class Upsample2D(nn.Module):
    """Double height and width: repeat each pixel, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Return (B, C, 2H, 2W), or (B, C, *size) where the map that joins it has odd sides, for x (B, C, H, W)."""
        height, width = x.shape[2:]
        return self.conv(F.interpolate(x, size=size or (2 * height, 2 * width), mode="nearest"))


class TimestepEmbedding(nn.Module):
    """Two linear layers with SiLU between, from a sinusoidal (or any other) embedding to the network's.

    Args:
        in_channels: width of the input.
        channels: width of the output.
        cond_channels: width of a second input that is added to the first, as latent consistency models have it for
            the guidance scale; None for a network without it.
    """

    def __init__(self, in_channels: int, channels: int, cond_channels: int | None = None) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_channels, channels)
        self.cond_proj = nn.Linear(cond_channels, in_channels, bias=False) if cond_channels else None
        self.linear_2 = nn.Linear(channels, channels)

    def forward(self, embedding: Tensor, condition: Tensor | None = None) -> Tensor:
        """Return (..., channels) for embedding (..., in_channels) and condition (..., cond_channels)."""
        if self.cond_proj is not None and condition is not None:
            embedding = embedding + self.cond_proj(condition)
        return self.linear_2(F.silu(self.linear_1(embedding)))


def sinusoidal_embedding(values: Tensor, channels: int, *, cosine_first: bool, shift: float) -> Tensor:
    """Embed numbers as sines and cosines of falling frequency.

    Args:
        values: (...), any real dtype; timesteps or sizes.
        channels: width of the result; an odd one is filled with a zero.
        cosine_first: diffusers' `flip_sin_to_cos`.
        shift: diffusers' `freq_shift`; 1 makes the last frequency exactly 1/10000.

    Returns:
        (..., channels) float32.

    Source: Vaswani et al. 2017, arXiv 1706.03762, section 3.5.
    """
    half = channels // 2
    exponents = torch.arange(half, dtype=torch.float32, device=values.device) / (half - shift)
    angles = values.float()[..., None] * torch.exp(-math.log(10_000) * exponents)  # (..., half)
    parts = (angles.cos(), angles.sin()) if cosine_first else (angles.sin(), angles.cos())
    return F.pad(torch.cat(parts, dim=-1), (0, channels % 2))


def activate(x: Tensor) -> Tensor:
    """Return SiLU of `x`, which is overwritten while no gradients are recorded."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


def to_tokens(x: Tensor) -> Tensor:
    """Return the pixels (B, H*W, C), contiguous, of a map (B, C, H, W); no copy when the map is channels_last."""
    return x.flatten(2).transpose(1, 2).contiguous()


def to_map(tokens: Tensor, like: Tensor) -> Tensor:
    """Return the channels_last map (B, C, H, W) of tokens (B, H*W, C), height and width as in `like`; no copy."""
    return tokens.transpose(1, 2).unflatten(2, tuple(like.shape[2:]))
