"""Replace autoencoder and text encoder for pixel-space, class-conditional and unconditional models.

Both have the interface of what they replace, so that training and the pipeline need not know.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from latentdiff.errors import InputError, suggest
from latentdiff.models.autoencoder import DiagonalGaussian
from latentdiff.models.config import ModelConfig, require, require_positive
from latentdiff.models.encoding import Encoded


@dataclass(frozen=True)
class PixelSpaceConfig(ModelConfig):
    """Shape of a pixel space.

    Attributes:
        latent_channels: 3 for colour, 1 for shades of grey.
    """

    class_name: ClassVar[str] = "PixelSpace"
    downsample_factor: ClassVar[int] = 1
    scaling_factor: ClassVar[float] = 1.0

    latent_channels: int = 3

    def check(self) -> None:
        """Raise ModelConfigError for another number of channels."""
        require(self.latent_channels in (1, 3), f"latent_channels must be 1 or 3, got {self.latent_channels}")


class PixelSpace(nn.Module):
    """The autoencoder of a model without one: latents are pixels, the mean of red, green and blue where grey."""

    def __init__(self, config: PixelSpaceConfig) -> None:
        super().__init__()
        self.config = config
        channels = config.latent_channels
        mixing = torch.eye(3) if channels == 3 else torch.full((1, 3), 1 / 3)
        self.encoder, self.decoder = nn.Conv2d(3, channels, 1, bias=False), nn.Conv2d(channels, 3, 1, bias=False)
        with torch.no_grad():
            self.encoder.weight.copy_(mixing[:, :, None, None])
            self.decoder.weight.copy_((mixing.T > 0)[:, :, None, None])

    def encode(self, images: Tensor) -> DiagonalGaussian:
        """Return images (B, 3, H, W) as a distribution (B, C, H, W) without spread."""
        pixels = self.encoder(images)
        return DiagonalGaussian(pixels, torch.full_like(pixels, -30.0))

    def decode(self, latents: Tensor) -> Tensor:
        """Return images (B, 3, H, W) of pixels (B, C, H, W)."""
        return self.decoder(latents)


@dataclass(frozen=True)
class LabelConfig(ModelConfig):
    """What classes there are.

    Attributes:
        labels: names of the classes, each a prompt; none for a model that is not conditioned at all.
        hidden_size: width of the context, at least as many as there are labels.
    """

    class_name: ClassVar[str] = "LabelEncoder"

    labels: tuple[str, ...] = ()
    hidden_size: int = 1

    def check(self) -> None:
        """Raise ModelConfigError when the values do not fit together."""
        require_positive(self, "hidden_size")
        require(
            len(set(self.labels)) == len(self.labels) <= max(self.hidden_size, 1) and "" not in self.labels,
            f"labels must be different names, at most hidden_size ({self.hidden_size}), got {len(self.labels)}",
        )


class LabelEncoder(nn.Module):
    """The text encoder of a model that knows classes: a context of one token, a unit vector for each class.

    The keys and values that cross-attention makes of it are learned embeddings of the class, one a layer. The empty
    prompt is the zero vector.
    """

    def __init__(self, config: LabelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(len(config.labels) + 1, config.hidden_size)
        with torch.no_grad():
            self.embedding.weight.copy_(torch.eye(config.hidden_size + 1)[: len(config.labels) + 1, 1:])

    @torch.no_grad()
    def forward(self, texts: Sequence[str], *, clip_skip: int = 0, weighted: bool = False) -> list[Encoded]:
        """Return labels as prompts of one token, or none for the empty text; see `encoding.PromptEncoder`.

        Raises:
            InputError: a text is none of the labels; the nearest one is offered. Layers are to be left out.
        """
        if clip_skip:
            raise InputError("clip_skip is for CLIP text encoders, got classes; leave it out")
        numbers = []
        for text in texts:
            known = text in self.config.labels
            if text and self.config.labels and not known:
                raise InputError(
                    f"this model knows classes, one of which must be the prompt, got {text[:80]!r}"
                    f"{suggest(text, self.config.labels)}"
                )
            numbers.append(self.config.labels.index(text) + 1 if known else 0)
        rows = torch.tensor(numbers, device=self.embedding.weight.device)
        states, mask = self.embedding(rows)[:, None, None], (rows > 0)[:, None, None]  # (B, 1, 1, D), (B, 1, 1)
        return [Encoded(states[i], mask[i], None, int(number > 0)) for i, number in enumerate(numbers)]
