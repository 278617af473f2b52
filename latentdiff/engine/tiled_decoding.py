"""Decode large pictures in tiles: the same pixels to rounding, in a fraction of the memory.

Convolutions see a tile with a halo as wide as they reach, but a group norm needs the statistics of the whole map. So
the decoder is cut into stages, maps are kept whole only between these, and within a stage all tiles run up to the first
norm, whose statistics are then known, again up to the second, and so on. What is computed again makes it three to four
times the arithmetic of `AutoencoderKL.decode`. A stage is one residual block, with the upsampling before it; but all of
the finest resolution is one stage, because a map between would be as large as what is to be avoided.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import suppress
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latentdiff.models.autoencoder import AutoencoderConfig, AutoencoderKL
from latentdiff.models.layers import ResnetBlock2D, Upsample2D
from latentdiff.models.pixels import PixelSpace

__all__ = ["ENLARGED_MAP", "LARGE_MAP", "TILE", "decode", "decode_tiled", "needs_tiles"]

TILE = 32  # side of a tile in latents
LARGE_MAP = 2**30  # bytes; a decoder holds about three such maps at once
ENLARGED_MAP = 2**29  # of pictures that are enlarged, which are large as a rule


def decode(
    autoencoder: AutoencoderKL | PixelSpace,
    latents: Tensor,
    tile: int | None = None,
    large: int = LARGE_MAP,
    whole: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Decode latents in tiles where these are wanted, or at once.

    Args:
        autoencoder: of the model.
        latents: (B, C, h, w), unscaled.
        tile: side of the tiles in latents; None for tiles only where the largest map in the decoder is large.
        large: bytes above which it is.
        whole: what decodes latents at once; None for the autoencoder itself.

    Returns:
        Images (B, 3, H, W), about [-1, 1] but not clipped.
    """
    if isinstance(autoencoder, AutoencoderKL):
        factor = autoencoder.config.downsample_factor
        height, width = (factor * side for side in latents.shape[2:])
        if tile is not None or needs_tiles(autoencoder.config, height, width, latents.dtype, large):
            return decode_tiled(autoencoder, latents, tile or TILE)
    return autoencoder.decode(latents) if whole is None else whole(latents)


def needs_tiles(config: AutoencoderConfig, height: int, width: int, dtype: torch.dtype, large: int = LARGE_MAP) -> bool:
    """Say whether the largest map in a decoder has more than some bytes, a gigabyte unless told.

    Args:
        config: of the autoencoder.
        height, width: of the picture in pixels.
        dtype: of the weights.
        large: how many bytes.
    """
    channels = config.block_out_channels[:2][-1]  # of what the last upsampling makes
    return channels * height * width * dtype.itemsize > large


@torch.no_grad()
def decode_tiled(autoencoder: AutoencoderKL, latents: Tensor, tile: int = TILE) -> Tensor:
    """Decode latents as `autoencoder.decode` does, one image after the other, in tiles; those of one tile at once.

    The layers before the first upsampling see the whole latents, which are small; among them is the only attention.

    Args:
        autoencoder: is not changed; any number of threads may use it meanwhile.
        latents: (B, C, h, w), unscaled.
        tile: side of the tiles in latents.

    Returns:
        Images (B, 3, H, W), about [-1, 1] but not clipped.
    """
    if max(latents.shape[2:]) <= tile:
        return autoencoder.decode(latents)
    return torch.cat([_decode(autoencoder, one, tile) for one in latents.split(1)])


def _decode(autoencoder: AutoencoderKL, latents: Tensor, tile: int) -> Tensor:
    decoder, rows = autoencoder.decoder, latents.shape[2]
    x = latents if autoencoder.post_quant_conv is None else autoencoder.post_quant_conv(latents)
    x = decoder.mid_block(decoder.conv_in(x))
    for layers in _stages(autoencoder):
        x = _Stage(layers).run(x, tile * x.shape[2] // rows)
    return x


def _stages(autoencoder: AutoencoderKL) -> list[list[nn.Module]]:
    """Return the layers of a decoder after its middle, in the groups between which maps are kept."""
    decoder = autoencoder.decoder
    stages: list[list[nn.Module]] = []
    upsamplers: list[nn.Module] = []  # of the resolution before
    for block in decoder.up_blocks:
        first, *others = block.resnets  # type: ignore[misc]
        stages += [[*upsamplers, first], *([layer] for layer in others)]
        upsamplers = list(block.upsamplers)  # type: ignore[arg-type]
    finest = len(decoder.up_blocks[-1].resnets)  # type: ignore[arg-type]
    last = [layer for stage in stages[-finest:] for layer in stage]
    return [*stages[:-finest], [*last, decoder.conv_norm_out, nn.SiLU(inplace=True), decoder.conv_out]]


class _Span(NamedTuple):
    """One side of a tile: from start to stop, and with its halo, which ends at the border, from low to high."""

    start: int
    stop: int
    low: int
    high: int

    def inside(self, scale: int) -> slice:
        """Return where the tile is in a map of it with its halo, which has `scale` pixels for each of them."""
        return slice((self.start - self.low) * scale, (self.stop - self.low) * scale)


def _spans(length: int, tile: int, halo: int) -> list[_Span]:
    return [
        _Span(start, min(start + tile, length), max(start - halo, 0), min(start + tile + halo, length))
        for start in range(0, length, tile)
    ]


class _Stage:
    """Some layers, as a copy that shares their weights but has group norms of its own."""

    def __init__(self, layers: list[nn.Module]) -> None:
        whole = nn.Sequential(*layers)
        self.layers = copy.deepcopy(whole, {id(parameter): parameter for parameter in whole.parameters()})
        self.norms = _replace_norms(self.layers)
        self.scale, reach = 1, 0  # pixels of the result for each of the input; how many of them see beyond a border
        for layer in layers:
            if isinstance(layer, Upsample2D):
                self.scale, reach = 2 * self.scale, 2 * reach + 1
            elif isinstance(layer, ResnetBlock2D):
                reach += 2
            elif isinstance(layer, nn.Conv2d):
                reach += 1
        self.halo = -(-reach // self.scale)

    def run(self, x: Tensor, tile: int) -> Tensor:
        """Return what the layers make of a map (1, C, H, W), in tiles of so many pixels of it."""
        height, width = x.shape[2:]
        tiles = list(product(_spans(height, tile, self.halo), _spans(width, tile, self.halo)))
        for norm in self.norms:
            for rows, columns in tiles:
                with suppress(_EnoughSeenError):
                    self._run(x, rows, columns)
            norm.settle()
        result: Tensor | None = None
        for rows, columns in tiles:
            piece = self._run(x, rows, columns)[:, :, rows.inside(self.scale), columns.inside(self.scale)]
            if result is None:
                result = x.new_empty(1, piece.shape[1], height * self.scale, width * self.scale)
            top, left = rows.start * self.scale, columns.start * self.scale
            result[:, :, top : top + piece.shape[2], left : left + piece.shape[3]] = piece
        assert result is not None
        return result

    def _run(self, x: Tensor, rows: _Span, columns: _Span) -> Tensor:
        for norm in self.norms:
            norm.tile = (rows, columns)
        return self.layers(x[:, :, rows.low : rows.high, columns.low : columns.high])


def _replace_norms(module: nn.Module) -> list[_WholeMapNorm]:
    """Replace every group norm within a module; return the new ones in the order in which they run."""
    norms = []
    for name, child in module.named_children():
        if isinstance(child, nn.GroupNorm):
            norm = _WholeMapNorm(child)
            setattr(module, name, norm)
            norms.append(norm)
        else:
            norms += _replace_norms(child)
    return norms


class _EnoughSeenError(Exception):
    """A norm has seen a tile of the map whose statistics it collects; what comes after it cannot run yet."""


class _WholeMapNorm(nn.Module):
    """Group norm of tiles by the statistics of the whole map, which it collects first."""

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.norm = norm
        self.tile: tuple[_Span, _Span]
        self.seen: list[tuple[int, Tensor, Tensor]] = []  # area, means and variances (groups,) of each tile
        self.statistics: tuple[Tensor, Tensor] | None = None  # means and variances, (C,) float32

    def forward(self, x: Tensor) -> Tensor:
        """Return x (1, C, H, W), a tile with its halo, normalised; or raise, having seen it."""
        if self.statistics is not None:
            weight, bias = self.norm.weight.float(), self.norm.bias.float()
            # In float32 throughout: not every device takes half precision together with float32 statistics.
            return F.batch_norm(x.float(), *self.statistics, weight, bias, eps=self.norm.eps).to(x.dtype)
        rows, columns = self.tile
        scale = x.shape[2] // (rows.high - rows.low)
        core = x[:, :, rows.inside(scale), columns.inside(scale)].float()
        variances, means = torch.var_mean(core.unflatten(1, (self.norm.num_groups, -1)), (0, 2, 3, 4), correction=0)
        self.seen.append((core.shape[2] * core.shape[3], means, variances))
        raise _EnoughSeenError

    def settle(self) -> None:
        """Make the statistics of the whole from those of its tiles, in float64."""
        areas = torch.tensor([area for area, _, _ in self.seen], dtype=torch.float64)
        shares = (areas / areas.sum())[:, None]
        means = torch.stack([means for _, means, _ in self.seen]).cpu().double()  # (tiles, groups)
        variances = torch.stack([variances for _, _, variances in self.seen]).cpu().double()
        mean = (shares * means).sum(dim=0)
        variance = (shares * (variances + (means - mean).square())).sum(dim=0)
        repeated = (x.float().repeat_interleave(self.norm.num_channels // len(x)) for x in (mean, variance))
        means, variances = (x.to(self.norm.weight.device) for x in repeated)
        self.statistics, self.seen = (means, variances), []
