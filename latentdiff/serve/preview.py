"""Cheap previews: by a model's tiny decoder, or a linear map from latents to colours, fitted to the decoder."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from latentdiff.checkpoints import Components
from latentdiff.checkpoints.components import Autoencoder
from latentdiff.images import from_tensor

__all__ = ["CheapPreview", "LinearPreview", "Preview"]

# (components, x0 estimate (1, C, h, w) of scaled latents) -> small picture
Preview = Callable[[Components, Tensor], Image.Image]

SAMPLES, COARSEST = 4, 4  # maps of random latents that are decoded, and how many times they are blurred by halves


class CheapPreview:
    """A preview by the tiny decoder of a model, as large as the picture, or else a linear one; see `LinearPreview`."""

    def __init__(self) -> None:
        self._linear = LinearPreview()

    @torch.no_grad()
    def __call__(self, components: Components, estimate: Tensor) -> Image.Image:
        """Return the preview of an x0 estimate (1, C, h, w)."""
        decoder = components.tiny_decoder
        if decoder is None:
            return self._linear(components, estimate)
        scaled = (estimate / decoder.config.scaling_factor).to(next(decoder.parameters()))
        return from_tensor(decoder.decode(scaled).float().nan_to_num().clamp(-1, 1))[0]

    def fit(self, components: Components) -> None:
        """Do what is done once for each model."""
        if components.tiny_decoder is None:
            self._linear.fit(components)


class LinearPreview:
    """A preview of one pixel for each latent, by the linear map from latents to colours that fits the decoder best.

    It is fitted once for each autoencoder, by least squares, to a few decoded maps of random latents. `fit` may be
    called before the first preview, where the time it takes hurts nobody.
    """

    def __init__(self) -> None:
        self._maps = weakref.WeakKeyDictionary[Autoencoder, Tensor]()

    def __call__(self, components: Components, estimate: Tensor) -> Image.Image:
        """Return the preview (w, h) of an x0 estimate (1, C, h, w)."""
        colours = self.fit(components).to(estimate)  # (C + 1, 3)
        image = torch.einsum("bchw,cr->brhw", estimate, colours[:-1]) + colours[-1].reshape(1, 3, 1, 1)
        return from_tensor(image.nan_to_num().clamp(-1, 1))[0]

    def fit(self, components: Components) -> Tensor:
        """Return the map (C + 1, 3) of a model, its last row for the constant."""
        autoencoder = components.autoencoder
        if autoencoder not in self._maps:
            self._maps[autoencoder] = _fitted(components)
        return self._maps[autoencoder]


@torch.no_grad()
def _fitted(components: Components) -> Tensor:
    config, factor = components.autoencoder.config, components.autoencoder.config.downsample_factor
    height, width = (side // factor for side in components.native_size)
    latents = _smooth_noise(config.latent_channels, height, width).to(components.device)
    scaled = (latents / config.scaling_factor).to(components.dtype)
    pixels = torch.cat([components.autoencoder.decode(one[None]).float() for one in scaled])  # one by one, as a decoder
    colours = F.avg_pool2d(pixels.nan_to_num().clamp(-1, 1), factor)  # needs much memory; (N, 3, h, w)
    inputs = torch.cat([latents, torch.ones_like(latents[:, :1])], dim=1)  # (N, C + 1, h, w)
    flat, targets = (x.permute(0, 2, 3, 1).flatten(0, 2).cpu() for x in (inputs, colours))
    return torch.linalg.lstsq(flat, targets).solution  # (C + 1, 3)


def _smooth_noise(channels: int, height: int, width: int) -> Tensor:
    """Return noise (N, C, h, w) of unit variance that is as smooth, in part, as latents of pictures are."""
    generator, total = torch.Generator().manual_seed(0), torch.zeros(SAMPLES, channels, height, width)
    for halvings in range(COARSEST):
        sides = [max(1, side // 2**halvings) for side in (height, width)]
        noise = torch.randn(SAMPLES, channels, *sides, generator=generator)
        total += F.interpolate(noise, (height, width), mode="bilinear")
    return total / total.std(dim=(0, 2, 3), keepdim=True)
