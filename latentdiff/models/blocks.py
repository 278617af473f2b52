"""The blocks of the U-Net, one per resolution: residual blocks, each followed by a transformer where there is text.

One class serves diffusers' CrossAttnDownBlock2D and DownBlock2D (a list of no attentions has no weights), and one the
same two on the way up. What a block needs besides the map comes in `BlockInputs`, made beforehand.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from latentdiff.models.attention import KeyValue, Transformer2DModel
from latentdiff.models.layers import Downsample2D, ResnetBlock2D, Upsample2D


class BlockInputs(NamedTuple):
    """What time and text say to each layer of one call, in the order in which the layers run.

    Attributes:
        shifts: one (B, C) per residual block.
        texts: keys and values, per transformer, block of it and attention to the text.
        mask: (B, 1, 1, L) bool, False for text tokens to leave out, or None.
    """

    shifts: Iterator[Tensor]
    texts: Iterator[Sequence[Sequence[KeyValue]]]
    mask: Tensor | None


@dataclass(frozen=True)
class BlockShape:
    """What one resolution of the U-Net is made of.

    Attributes:
        channels: of the map within the block.
        layers: residual blocks on the way down; the way up has one more.
        heads: attention heads, None for a block without attention.
        transformer_layers: blocks in each transformer.
        context_channels: width of the text states.
        only_cross: whether both attentions of a transformer block look at the text.
        time_channels: width of the time embedding.
        groups: of all group norms.
        eps: of the group norms of the residual blocks.
        linear: whether transformers project by linear layers.
        upcast: whether to attend in float32.
        dropout: of the residual blocks.
    """

    channels: int
    layers: int
    heads: int | None
    transformer_layers: int
    context_channels: int
    only_cross: bool
    time_channels: int
    groups: int
    eps: float
    linear: bool
    upcast: bool
    dropout: float

    def resnet(self, in_channels: int) -> ResnetBlock2D:
        """Return a residual block from `in_channels` to the channels of this shape."""
        return ResnetBlock2D(
            in_channels,
            self.channels,
            groups=self.groups,
            eps=self.eps,
            time_channels=self.time_channels,
            dropout=self.dropout,
        )

    def transformers(self, count: int) -> nn.ModuleList:
        """Return `count` transformers, or none where the block has no attention."""
        if self.heads is None:
            return nn.ModuleList()
        return nn.ModuleList(
            Transformer2DModel(
                self.channels,
                self.heads,
                self.transformer_layers,
                self.context_channels,
                groups=self.groups,
                linear=self.linear,
                only_cross=self.only_cross,
                upcast=self.upcast,
            )
            for _ in range(count)
        )


class DownBlock(nn.Module):
    """One resolution on the way down."""

    def __init__(self, in_channels: int, shape: BlockShape, *, downsample: bool) -> None:
        super().__init__()
        inputs = (in_channels, *(shape.channels,) * (shape.layers - 1))
        self.resnets = nn.ModuleList(shape.resnet(channels) for channels in inputs)
        self.attentions = shape.transformers(shape.layers)
        self.downsamplers = nn.ModuleList([Downsample2D(shape.channels, symmetric=True)] if downsample else [])

    def forward(self, x: Tensor, conditions: BlockInputs) -> list[Tensor]:
        """Return every map made on the way, the last one at half the size, for x (B, C_in, H, W)."""
        maps = self.maps(x, conditions)
        return maps + [downsampler(maps[-1]) for downsampler in self.downsamplers]  # (B, C, H/2, W/2)

    def maps(self, x: Tensor, conditions: BlockInputs) -> list[Tensor]:
        """Return the maps (B, C, H, W) of x (B, C_in, H, W) after each layer."""
        maps = []
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, next(conditions.shifts))  # (B, C, H, W)
            if self.attentions:
                x = self.attentions[i](x, next(conditions.texts), conditions.mask)
            maps.append(x)
        return maps


class MidBlock(nn.Module):
    """The coarsest resolution: two residual blocks with a transformer between them."""

    def __init__(self, shape: BlockShape) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(shape.resnet(shape.channels) for _ in range(2))
        self.attentions = shape.transformers(1)

    def forward(self, x: Tensor, conditions: BlockInputs) -> Tensor:
        """Return (B, C, H, W) for x (B, C, H, W)."""
        x = self.resnets[0](x, next(conditions.shifts))
        x = self.attentions[0](x, next(conditions.texts), conditions.mask)
        return self.resnets[1](x, next(conditions.shifts))


class UpBlock(nn.Module):
    """One resolution on the way up; each residual block also sees one map of the way down.

    Args:
        in_channels: of the map from the coarser resolution.
        skip_channels: of the maps that join it, in the order in which they do.
    """

    def __init__(self, in_channels: int, skip_channels: Sequence[int], shape: BlockShape, *, upsample: bool) -> None:
        super().__init__()
        inputs = (in_channels, *(shape.channels,) * (len(skip_channels) - 1))
        self.resnets = nn.ModuleList(shape.resnet(own + skip) for own, skip in zip(inputs, skip_channels))
        self.attentions = shape.transformers(len(skip_channels))
        self.upsamplers = nn.ModuleList([Upsample2D(shape.channels)] if upsample else [])

    def forward(self, x: Tensor, skips: list[Tensor], conditions: BlockInputs) -> Tensor:
        """Return (B, C, 2H, 2W), or (B, C, H, W) at the finest resolution.

        Args:
            x: (B, C_in, H, W).
            skips: the maps of the way down; those that this block uses are taken off the end.
            conditions: of this call.
        """
        for i, resnet in enumerate(self.resnets):
            x = resnet(torch.cat([x, skips.pop()], dim=1), next(conditions.shifts))  # (B, C, H, W)
            if self.attentions:
                x = self.attentions[i](x, next(conditions.texts), conditions.mask)
        for upsampler in self.upsamplers:
            x = upsampler(x, tuple(skips[-1].shape[2:]))  # (B, C, 2H, 2W)
        return x
