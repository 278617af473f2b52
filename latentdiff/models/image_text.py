"""A small image-text model: a convolutional image tower beside a frozen text encoder, in one space of unit vectors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latentdiff.errors import ModelConfigError
from latentdiff.models.config import ModelConfig
from latentdiff.models.layers import Downsample2D, ResnetBlock2D, activate
from latentdiff.models.tokenizer import Tokenizer

__all__ = ["ImageTextConfig", "ImageTextModel", "mean_states"]

MAX_SCALE = 100.0  # of similarities, as in CLIP


@dataclass(frozen=True)
class ImageTextConfig(ModelConfig):
    """Configuration of `ImageTextModel`.

    Attributes:
        image_size: side in pixels at which images are looked at; others are resized to it.
        block_out_channels: channels of each level, each at half the side of the one before; the first at half of
            `image_size`.
        layers_per_block: residual blocks of each level.
        norm_num_groups: of all group norms.
        text_dim: width of the text encoder's states.
        projection_dim: D, length of the vectors.
        text_encoder: hash of the text encoder and tokenizer that it is trained beside; see `network_digest`.
    """

    class_name: ClassVar[str] = "ImageTextModel"

    image_size: int = 64
    block_out_channels: tuple[int, ...] = (32, 64, 128, 256)
    layers_per_block: int = 1
    norm_num_groups: int = 8
    text_dim: int = 384
    projection_dim: int = 256
    text_encoder: str = ""

    def check(self) -> None:
        """Refuse what does not fit together."""
        numbers = (self.image_size, *self.block_out_channels, self.layers_per_block, self.text_dim, self.projection_dim)
        if not self.block_out_channels or min(*numbers, self.norm_num_groups) < 1:
            raise ModelConfigError("an ImageTextModel needs positive sizes and one level at least; correct the config")
        odd = [channels for channels in self.block_out_channels if channels % self.norm_num_groups]
        if odd:
            raise ModelConfigError(
                f"block_out_channels must be multiples of norm_num_groups {self.norm_num_groups}, got {odd[0]}"
            )
        if self.image_size % 2 ** len(self.block_out_channels):
            raise ModelConfigError(
                f"image_size must be a multiple of {2 ** len(self.block_out_channels)}, got {self.image_size}"
            )


class ImageTextModel(nn.Module):
    """Images and texts to unit vectors whose dot product says how well they fit.

    Source: Radford et al. 2021, arXiv 2103.00020, section 2; with a frozen text encoder, Zhai et al. 2022,
    arXiv 2111.07991.
    """

    def __init__(self, config: ImageTextConfig) -> None:
        super().__init__()
        self.config = config
        channels, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = nn.Conv2d(3, channels[0], 3, stride=2, padding=1)
        self.levels = nn.ModuleList()
        for level, (before, after) in enumerate(zip((channels[0], *channels), channels)):
            blocks: list[nn.Module] = [] if level == 0 else [Downsample2D(before, symmetric=True)]
            for block in range(config.layers_per_block):
                blocks.append(ResnetBlock2D(after if block else before, after, groups=groups, eps=1e-6))
            self.levels.append(nn.Sequential(*blocks))
        self.norm_out = nn.GroupNorm(groups, channels[-1], 1e-6)
        self.visual_projection = nn.Linear(channels[-1], config.projection_dim)
        self.text_hidden = nn.Linear(config.text_dim, 2 * config.projection_dim)
        self.text_projection = nn.Linear(2 * config.projection_dim, config.projection_dim)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return unit vectors (B, D) of images and of texts, and the scale of their similarities.

        Args:
            images: (B, 3, H, W) in [-1, 1].
            texts: (B, text_dim), see `mean_states`.
        """
        return self.embed_images(images), self.embed_texts(texts), self.scale

    @property
    def scale(self) -> Tensor:
        """What similarities are multiplied by before the softmax."""
        return self.logit_scale.exp().clamp(max=MAX_SCALE)

    def embed_images(self, images: Tensor) -> Tensor:
        """Return unit vectors (B, D) of images (B, 3, H, W) in [-1, 1], of any size."""
        return F.normalize(self.visual_projection(self.features(images)), dim=-1)

    def features(self, images: Tensor) -> Tensor:
        """Return what the last level sees, (B, C), of images (B, 3, H, W) in [-1, 1]: features for distances."""
        side = self.config.image_size
        if images.shape[-2:] != (side, side):
            images = F.interpolate(images, (side, side), mode="bilinear", antialias=True)
        x = self.conv_in(images.to(self.conv_in.weight))  # (B, C_0, side / 2, side / 2)
        for level in self.levels:
            x = level(x)
        return activate(self.norm_out(x)).mean(dim=(2, 3))  # (B, C)

    def embed_texts(self, texts: Tensor) -> Tensor:
        """Return unit vectors (B, D) of the mean states (B, text_dim) of texts."""
        hidden = activate(self.text_hidden(texts.to(self.text_hidden.weight)))  # (B, 2 D)
        return F.normalize(self.text_projection(hidden), dim=-1)


@torch.no_grad()
def mean_states(encoder: nn.Module, tokenizer: Tokenizer, texts: Sequence[str]) -> Tensor:
    """Return the mean (B, text_dim) float32 of a text encoder's states of the tokens of each text's first window.

    Source: Reimers and Gurevych 2019, arXiv 1908.10084, section 3.
    """
    tokens, device = tokenizer(texts), next(encoder.parameters()).device
    length = int(tokens.attention_mask[:, : tokenizer.model_max_length].sum(dim=1).max())
    ids, mask = (rows[:, :length].to(device) for rows in (tokens.input_ids, tokens.attention_mask))  # (B, L)
    states = encoder(ids, mask).last_hidden_state.float()  # (B, L, text_dim)
    return (states * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)
