"""The KL autoencoder: pictures to latents and back. Weight names are those of diffusers' AutoencoderKL.

Source: Rombach et al. 2022, arXiv 2112.10752, section 3.1 and appendix G; Esser et al. 2021, arXiv 2012.09841.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from latentdiff.models.attention import SpatialAttention
from latentdiff.models.config import ModelConfig, require, require_positive
from latentdiff.models.layers import Downsample2D, ResnetBlock2D, Upsample2D, activate

NORM_EPS = 1e-6  # of every group norm, as in all published autoencoders of this family


@dataclass(frozen=True)
class AutoencoderConfig(ModelConfig):
    """Shape of an autoencoder; the keys are those of diffusers' vae/config.json.

    Attributes:
        block_out_channels: channels at each resolution, finest first; each further one halves height and width.
        down_block_types: one "DownEncoderBlock2D" per resolution, filled in when empty; `up_block_types` likewise.
        layers_per_block: residual blocks per resolution in the encoder; the decoder has one more.
        sample_size: side of the training pictures in pixels; informative.
        scaling_factor: what the diffusion side multiplies latents by, so that their standard deviation is about 1.
        force_upcast: whether the weights overflow in float16; informative, for whoever picks the dtype.
    """

    class_name: ClassVar[str] = "AutoencoderKL"
    fixed: ClassVar[dict[str, tuple[Any, ...]]] = {
        "act_fn": ("silu", "swish"),
        "shift_factor": (None, 0.0),
        "latents_mean": (None,),
        "latents_std": (None,),
    }

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ()
    up_block_types: tuple[str, ...] = ()
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int | tuple[int, ...] = 32
    scaling_factor: float = 0.18215
    force_upcast: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    @property
    def downsample_factor(self) -> int:
        """Pixels per latent along each side."""
        return 2 ** (len(self.block_out_channels) - 1)

    def check(self) -> None:
        """Raise ModelConfigError when the values do not fit together; name the blocks where none are named."""
        require_positive(self, "in_channels", "out_channels", "block_out_channels", "layers_per_block")
        require_positive(self, "latent_channels", "norm_num_groups", "sample_size")
        for key, wanted in {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}.items():
            expected = (wanted,) * len(self.block_out_channels)
            if not getattr(self, key):
                object.__setattr__(self, key, expected)
            got = getattr(self, key)
            require(got == expected, f"{key} must be {wanted} once per member of block_out_channels, got {list(got)}")
        groups = self.norm_num_groups
        require(
            all(channels % groups == 0 for channels in self.block_out_channels),
            f"block_out_channels must be multiples of norm_num_groups ({groups}), got {list(self.block_out_channels)}",
        )
        require(0 < self.scaling_factor < inf, f"scaling_factor must be above 0, got {self.scaling_factor}; measure it")


@dataclass(frozen=True)
class DiagonalGaussian:
    """Independent normal distributions of the latents, one per pixel and channel.

    Attributes:
        mean: (B, C, h, w).
        logvar: logarithm of the variance, (B, C, h, w), within [-30, 20].
    """

    mean: Tensor
    logvar: Tensor

    def mode(self) -> Tensor:
        """Return the most likely latents (B, C, h, w)."""
        return self.mean

    def sample(self, noise: torch.Generator | Tensor) -> Tensor:
        """Draw latents (B, C, h, w).

        Args:
            noise: standard normal noise (B, C, h, w), or the generator that draws it on the generator's own device.
        """
        if isinstance(noise, torch.Generator):
            noise = torch.randn(self.mean.shape, generator=noise, device=noise.device)
        return self.mean + (0.5 * self.logvar).exp() * noise.to(self.mean)

    def kl(self) -> Tensor:
        """Return the divergence from the standard normal distribution in nats, (B,) float32.

        Source: Kingma and Welling 2013, arXiv 1312.6114, appendix B.
        """
        mean, logvar = self.mean.float(), self.logvar.float()
        return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum(dim=(1, 2, 3))


class AutoencoderKL(nn.Module):
    """Map pictures to a distribution over smaller latents, and latents to pictures."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        channels = config.latent_channels
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * channels, 2 * channels, 1) if config.use_quant_conv else None
        self.post_quant_conv = nn.Conv2d(channels, channels, 1) if config.use_post_quant_conv else None

    def encode(self, images: Tensor) -> DiagonalGaussian:
        """Return the distribution of the unscaled latents (B, C, H/f, W/f) of images (B, 3, H, W) in [-1, 1]."""
        moments = self.encoder(images)  # (B, 2C, h, w)
        if self.quant_conv is not None:
            moments = self.quant_conv(moments)
        mean, logvar = moments.chunk(2, dim=1)
        return DiagonalGaussian(mean, logvar.clamp(-30.0, 20.0))

    def decode(self, latents: Tensor) -> Tensor:
        """Return images (B, 3, H, W), about [-1, 1] but not clipped, of unscaled latents (B, C, H/f, W/f)."""
        if self.post_quant_conv is not None:
            latents = self.post_quant_conv(latents)
        return self.decoder(latents)

    def forward(self, images: Tensor, noise: torch.Generator | Tensor | None = None) -> tuple[Tensor, DiagonalGaussian]:
        """Return the reconstruction (B, 3, H, W) of images, and the distribution its latents come from.

        Args:
            images: (B, 3, H, W) in [-1, 1].
            noise: of the latents, or the generator that draws it, as `DiagonalGaussian.sample` takes it; None decodes
                their mode.
        """
        posterior = self.encode(images)
        latents = posterior.mode() if noise is None else posterior.sample(noise)
        return self.decode(latents), posterior


class Encoder(nn.Module):
    """The first half: pictures to the moments of the latents."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths = config.block_out_channels
        inputs = (widths[0], *widths[:-1])
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            DownEncoderBlock2D(inputs[i], widths[i], config, downsample=i < len(widths) - 1) for i in range(len(widths))
        )
        self.mid_block = MidBlock2D(widths[-1], config)
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, widths[-1], NORM_EPS)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        """Return moments (B, 2C, H/f, W/f) of images (B, 3, H, W)."""
        hidden = self.conv_in(images)  # (B, widths[0], H, W)
        for block in self.down_blocks:
            hidden = block(hidden)
        hidden = self.mid_block(hidden)  # (B, widths[-1], h, w)
        return self.conv_out(activate(self.conv_norm_out(hidden)))


class Decoder(nn.Module):
    """The second half: latents to pictures."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths = config.block_out_channels[::-1]
        inputs = (widths[0], *widths[:-1])
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock2D(widths[0], config)
        self.up_blocks = nn.ModuleList(
            UpDecoderBlock2D(inputs[i], widths[i], config, upsample=i < len(widths) - 1) for i in range(len(widths))
        )
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, widths[-1], NORM_EPS)
        self.conv_out = nn.Conv2d(widths[-1], config.out_channels, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        """Return images (B, 3, H, W) of latents (B, C, h, w)."""
        hidden = self.mid_block(self.conv_in(latents))  # (B, widths[0], h, w)
        for block in self.up_blocks:
            hidden = block(hidden)
        return self.conv_out(activate(self.conv_norm_out(hidden)))


class DownEncoderBlock2D(nn.Module):
    """The residual blocks of one resolution of the encoder, and the step down from it."""

    def __init__(self, in_channels: int, out_channels: int, config: AutoencoderConfig, *, downsample: bool) -> None:
        super().__init__()
        self.resnets = _resnets(in_channels, out_channels, config.layers_per_block, config)
        self.downsamplers = nn.ModuleList([Downsample2D(out_channels, symmetric=False)] if downsample else [])

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C_out, H/2, W/2), or (B, C_out, H, W) at the last resolution, for x (B, C_in, H, W)."""
        for layer in (*self.resnets, *self.downsamplers):
            x = layer(x)
        return x


class UpDecoderBlock2D(nn.Module):
    """The residual blocks of one resolution of the decoder, and the step up from it."""

    def __init__(self, in_channels: int, out_channels: int, config: AutoencoderConfig, *, upsample: bool) -> None:
        super().__init__()
        self.resnets = _resnets(in_channels, out_channels, config.layers_per_block + 1, config)
        self.upsamplers = nn.ModuleList([Upsample2D(out_channels)] if upsample else [])

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C_out, 2H, 2W), or (B, C_out, H, W) at the last resolution, for x (B, C_in, H, W)."""
        for layer in (*self.resnets, *self.upsamplers):
            x = layer(x)
        return x


class MidBlock2D(nn.Module):
    """Two residual blocks, with attention between them where the config asks for it."""

    def __init__(self, channels: int, config: AutoencoderConfig) -> None:
        super().__init__()
        attended = config.mid_block_add_attention
        self.resnets = _resnets(channels, channels, 2, config)
        self.attentions = nn.ModuleList(
            [SpatialAttention(channels, groups=config.norm_num_groups, eps=NORM_EPS)] if attended else []
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, h, w) for x (B, C, h, w)."""
        for layer in (self.resnets[0], *self.attentions, self.resnets[1]):
            x = layer(x)
        return x


def _resnets(in_channels: int, out_channels: int, count: int, config: AutoencoderConfig) -> nn.ModuleList:
    inputs = (in_channels, *(out_channels,) * (count - 1))
    return nn.ModuleList(
        ResnetBlock2D(channels, out_channels, groups=config.norm_num_groups, eps=NORM_EPS) for channels in inputs
    )
