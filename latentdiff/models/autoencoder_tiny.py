"""A tiny decoder: latents to pictures at a small part of the autoencoder's cost, for previews."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latentdiff.models.config import ModelConfig, require, require_positive

__all__ = ["AutoencoderTiny", "AutoencoderTinyConfig"]

MOST_BLOCKS = 64


@dataclass(frozen=True)
class AutoencoderTinyConfig(ModelConfig):
    """Shape of a tiny decoder; the keys are those of diffusers' AutoencoderTiny, of whose encoder none is used.

    Attributes:
        decoder_block_out_channels: channels at each resolution, coarsest first, all alike.
        num_decoder_blocks: residual blocks at each.
        scaling_factor: what the latents that it decodes were multiplied by; see `AutoencoderConfig`.
    """

    class_name: ClassVar[str] = "AutoencoderTiny"
    fixed: ClassVar[dict[str, tuple[Any, ...]]] = {
        "act_fn": ("relu",),
        "upsample_fn": ("nearest",),
        "upsampling_scaling_factor": (2,),
        "shift_factor": (0.0,),
    }
    ignored: ClassVar[frozenset[str]] = frozenset(
        {"in_channels", "encoder_block_out_channels", "num_encoder_blocks", "block_out_channels"}
        | {"latent_magnitude", "latent_shift", "force_upcast"}
    )

    out_channels: int = 3
    latent_channels: int = 4
    decoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    num_decoder_blocks: tuple[int, ...] = (3, 3, 3, 1)
    scaling_factor: float = 1.0

    def check(self) -> None:
        """Raise ModelConfigError when the values do not fit together."""
        require_positive(self, "out_channels", "latent_channels", "decoder_block_out_channels", "num_decoder_blocks")
        widths, blocks = self.decoder_block_out_channels, self.num_decoder_blocks
        require(len(set(widths)) == 1, f"decoder_block_out_channels must be all alike, got {list(widths)}")
        require(len(widths) == len(blocks), f"num_decoder_blocks must have {len(widths)} numbers, got {list(blocks)}")
        require(
            sum(blocks) <= MOST_BLOCKS, f"num_decoder_blocks must be {MOST_BLOCKS} in all at most, got {list(blocks)}"
        )
        require(0 < self.scaling_factor < inf, f"scaling_factor must be above 0, got {self.scaling_factor}")


class AutoencoderTiny(nn.Module):
    """Decode latents by plain 3x3 convolutions and ReLU, without normalization; there is no encoder.

    Source: the decoder of TAESD, with the parameter names of diffusers' AutoencoderTiny.
    """

    def __init__(self, config: AutoencoderTinyConfig) -> None:
        super().__init__()
        self.config = config
        width, levels = config.decoder_block_out_channels[0], len(config.num_decoder_blocks)
        layers: list[nn.Module] = [nn.Conv2d(config.latent_channels, width, 3, padding=1), nn.ReLU()]
        for level, count in enumerate(config.num_decoder_blocks):
            layers += [_Block(width) for _ in range(count)]
            if level < levels - 1:
                layers += [nn.Upsample(scale_factor=2), nn.Conv2d(width, width, 3, padding=1, bias=False)]
        layers.append(nn.Conv2d(width, config.out_channels, 3, padding=1))
        self.decoder = nn.ModuleDict({"layers": nn.Sequential(*layers)})

    def decode(self, latents: Tensor) -> Tensor:
        """Return images (B, 3, H, W), about [-1, 1] but not clipped, of unscaled latents (B, C, H/f, W/f)."""
        x: Tensor = self.decoder["layers"](3 * torch.tanh(latents / 3))
        return 2 * x - 1


class _Block(nn.Module):
    """Add three convolutions of the input to it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        convolutions = [nn.Conv2d(width, width, 3, padding=1) for _ in range(3)]
        self.conv = nn.Sequential(convolutions[0], nn.ReLU(), convolutions[1], nn.ReLU(), convolutions[2])

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x) + x)
