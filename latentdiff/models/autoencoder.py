"""KL autoencoder: images to latents and back (Rombach et al. 2022, arXiv 2112.10752, section 3.1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentdiff.errors import ModelConfigError
from latentdiff.models.config import ModelConfig
from latentdiff.models.layers import Downsample2D, ResnetBlock2D, Upsample2D

NORM_EPS = 1e-6


@dataclass(frozen=True)
class AutoencoderConfig(ModelConfig):
    """Shape of an autoencoder; the keys of diffusers' `AutoencoderKL`."""

    CLASS_NAME: ClassVar[str] = "AutoencoderKL"
    FIXED: ClassVar[dict[str, tuple[Any, ...]]] = {"act_fn": ("silu",), "shift_factor": (None, 0.0)}

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",) * 4
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",) * 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int = 512
    scaling_factor: float = 0.18215
    force_upcast: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    def __post_init__(self) -> None:
        expected = {"DownEncoderBlock2D"}, {"UpDecoderBlock2D"}
        if (set(self.down_block_types), set(self.up_block_types)) != expected:
            raise ModelConfigError(
                "AutoencoderKL config: block types must be DownEncoderBlock2D and UpDecoderBlock2D, "
                f"got {self.down_block_types} and {self.up_block_types}"
            )
        if not len(self.down_block_types) == len(self.up_block_types) == len(self.block_out_channels):
            raise ModelConfigError("AutoencoderKL config: block types and block_out_channels differ in length")

    @property
    def downsample_factor(self) -> int:
        """Pixels along one side of a latent."""
        return 2 ** (len(self.block_out_channels) - 1)


@dataclass(frozen=True)
class DiagonalGaussian:
    """Posterior q(z|x): mean and log-variance, each (B, C, h, w)."""

    mean: Tensor
    logvar: Tensor

    def mode(self) -> Tensor:
        """Return the most likely latents (B, C, h, w)."""
        return self.mean

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Draw latents (B, C, h, w); the noise comes from a CPU generator, so that it does not depend on the device."""
        noise = torch.randn(self.mean.shape, generator=generator, dtype=self.mean.dtype)
        return self.mean + torch.exp(0.5 * self.logvar) * noise.to(self.mean.device)

    def kl(self) -> Tensor:
        """Return KL(q || N(0, 1)) in nats of each sample, (B,).

        Source: Kingma and Welling 2014, arXiv 1312.6114, appendix B.
        """
        return 0.5 * (self.mean.square() + self.logvar.exp() - 1 - self.logvar).sum(dim=(1, 2, 3))


class AutoencoderKL(nn.Module):
    """Encoder, decoder and the 1x1 convolutions around the latent space."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        channels = config.latent_channels
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * channels, 2 * channels, 1) if config.use_quant_conv else None
        self.post_quant_conv = nn.Conv2d(channels, channels, 1) if config.use_post_quant_conv else None

    def encode(self, images: Tensor) -> DiagonalGaussian:
        """Return the posterior of images (B, 3, H, W) in [-1, 1]; latents are unscaled."""
        moments = self.encoder(images)  # (B, 2C, h, w)
        if self.quant_conv is not None:
            moments = self.quant_conv(moments)
        mean, logvar = moments.float().chunk(2, dim=1)
        return DiagonalGaussian(mean, logvar.clamp(-30, 20))

    def decode(self, latents: Tensor) -> Tensor:
        """Return images (B, 3, H, W), about [-1, 1], for unscaled latents (B, C, h, w)."""
        if self.post_quant_conv is not None:
            latents = self.post_quant_conv(latents)
        return self.decoder(latents)

    def forward(
        self, images: Tensor, noise_generator: torch.Generator | None = None
    ) -> tuple[Tensor, DiagonalGaussian]:
        """Reconstruct images from a sample of their posterior: what one training step needs."""
        posterior = self.encode(images)
        return self.decode(posterior.sample(noise_generator)), posterior


class Encoder(nn.Module):
    """Images (B, 3, H, W) to posterior moments (B, 2C, h, w)."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths = config.block_out_channels
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for index, width in enumerate(widths):
            before, last = widths[max(index - 1, 0)], index == len(widths) - 1
            self.down_blocks.append(Stage(before, width, config.layers_per_block, config, "" if last else "down"))
        self.mid_block = MidBlock(widths[-1], config)
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, widths[-1], eps=NORM_EPS)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.conv_in(images)  # (B, width, H, W)
        for block in self.down_blocks:
            hidden = block(hidden)
        hidden = self.mid_block(hidden)  # (B, width, h, w)
        return self.conv_out(F.silu(self.conv_norm_out(hidden)))


class Decoder(nn.Module):
    """Latents (B, C, h, w) to images (B, 3, H, W)."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths = config.block_out_channels[::-1]
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], config)
        self.up_blocks = nn.ModuleList()
        for index, width in enumerate(widths):
            before, last = widths[max(index - 1, 0)], index == len(widths) - 1
            self.up_blocks.append(Stage(before, width, config.layers_per_block + 1, config, "" if last else "up"))
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, widths[-1], eps=NORM_EPS)
        self.conv_out = nn.Conv2d(widths[-1], config.out_channels, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        hidden = self.mid_block(self.conv_in(latents))  # (B, width, h, w)
        for block in self.up_blocks:
            hidden = block(hidden)
        return self.conv_out(F.silu(self.conv_norm_out(hidden)))  # (B, 3, H, W)


class Stage(nn.Module):
    """Residual blocks at one resolution, then `scale`: "down" halves it, "up" doubles it, "" leaves it."""

    def __init__(self, in_channels: int, out_channels: int, layers: int, config: AutoencoderConfig, scale: str) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            _resnet(in_channels if layer == 0 else out_channels, out_channels, config) for layer in range(layers)
        )
        self.scale = scale
        if scale == "down":
            self.downsamplers = nn.ModuleList([Downsample2D(out_channels, padding=0)])
        elif scale == "up":
            self.upsamplers = nn.ModuleList([Upsample2D(out_channels)])

    def forward(self, x: Tensor) -> Tensor:
        for resnet in self.resnets:
            x = resnet(x)
        if self.scale == "down":
            return self.downsamplers[0](x)
        return self.upsamplers[0](x) if self.scale == "up" else x


class MidBlock(nn.Module):
    """Two residual blocks with self-attention over all positions between them."""

    def __init__(self, channels: int, config: AutoencoderConfig) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([_resnet(channels, channels, config) for _ in range(2)])
        attention = [SpatialAttention(channels, config.norm_num_groups)] if config.mid_block_add_attention else []
        self.attentions = nn.ModuleList(attention)

    def forward(self, x: Tensor) -> Tensor:
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x)


class SpatialAttention(nn.Module):
    """Single-head self-attention over the positions of a feature map, with a residual connection."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=NORM_EPS)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)  # (B, HW, C)
        query, key, value = (project(tokens)[:, None] for project in (self.to_q, self.to_k, self.to_v))
        mixed = F.scaled_dot_product_attention(query, key, value)[:, 0]  # (B, HW, C)
        return x + self.to_out[0](mixed).transpose(1, 2).reshape(x.shape)


def _resnet(in_channels: int, out_channels: int, config: AutoencoderConfig) -> ResnetBlock2D:
    return ResnetBlock2D(in_channels, out_channels, groups=config.norm_num_groups, eps=NORM_EPS)
