"""Build concat conditioning for inpainting (mask, masked image) and upscaling (small picture)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from latentdiff.checkpoints import Components, Encoders
from latentdiff.corruptions.degradation import degrade
from latentdiff.corruptions.masks import draw_mask
from latentdiff.diffusion.schedule import NoiseSchedule
from latentdiff.images import from_tensor, to_tensor

from ..config import DiffusionTraining, InpaintTask, UpscaleTask
from .augment import rgb
from .dataset import composite, load_images, open_held_out

EXAMPLES = 8  # pictures that samples are drawn of


@dataclass(frozen=True)
class ConcatConditioning:
    """What a network sees beside noisy latents (B, C, h, w).

    Attributes:
        channels: mask (B, 1, h, w), or small pictures with noise (B, 3, h, w).
        kept: pictures (B, 3, H, W), zero where they are drawn anew, whose latents come after the mask; None else.
        levels: (B,) int64, how much noise is on the small pictures; None else.
    """

    channels: Tensor
    kept: Tensor | None = None
    levels: Tensor | None = None

    @staticmethod
    def stack(samples: Sequence[ConcatConditioning]) -> ConcatConditioning:
        """Return samples without a batch axis as a batch."""
        columns = zip(*((one.channels, one.kept, one.levels) for one in samples))
        return ConcatConditioning(*(None if column[0] is None else torch.stack(column) for column in columns))  # type: ignore[arg-type]

    def map(self, change: Callable[[Tensor], Tensor]) -> ConcatConditioning:
        """Return the same of what a function makes of each tensor."""
        kept, levels = (None if tensor is None else change(tensor) for tensor in (self.kept, self.levels))
        return ConcatConditioning(change(self.channels), kept, levels)

    @torch.no_grad()
    def inputs(self, components: Encoders) -> Tensor:
        """Return the input channels (B, C', h, w)."""
        if self.kept is None:
            return self.channels
        latents = components.autoencoder.encode(self.kept).mode() * components.autoencoder.config.scaling_factor
        return torch.cat([self.channels, latents], dim=1)


@dataclass(frozen=True)
class Task:
    """How what a network sees beside latents is drawn of a picture.

    Attributes:
        factor: pixels to a latent along each side.
        low_res_schedule: of the noise on small pictures; None for inpainting.
        full_mask, degradation, max_noise_level: see `DiffusionTraining`.
    """

    factor: int
    low_res_schedule: NoiseSchedule | None
    full_mask: float
    degradation: float
    max_noise_level: int

    @staticmethod
    def of(config: DiffusionTraining, components: Encoders) -> Task:
        """Return the task of a config."""
        factor, low = components.autoencoder.config.downsample_factor, components.low_res_schedule
        full_mask = config.task.full_mask if isinstance(config.task, InpaintTask) else 0.0
        if not isinstance(config.task, UpscaleTask):
            return Task(factor, low, full_mask, 0.0, 0)
        return Task(factor, low, full_mask, config.task.degradation, config.task.max_noise_level)

    def draw(self, picture: np.ndarray, rng: np.random.Generator) -> ConcatConditioning:
        """Return what is seen beside the latents of a picture, RGB (H, W, 3) uint8; without a batch axis.

        Source: Rombach et al. 2022, arXiv 2112.10752, sections 4.4, 4.5; Ho et al. 2021, arXiv 2106.15282, section 3.
        """
        if self.low_res_schedule is None:
            height, width, _ = picture.shape
            mask = draw_mask(rng, height, width, self.full_mask)  # (H, W)
            kept = to_tensor(picture[None])[0] * torch.from_numpy(~mask)
            return ConcatConditioning(torch.from_numpy(mask[None, :: self.factor, :: self.factor]).float(), kept)
        small = to_tensor(degrade(picture, self.factor, rng, rng.uniform(0, self.degradation))[None])  # (1, 3, h, w)
        level = torch.tensor([int(rng.integers(self.max_noise_level + 1))])
        noise = torch.from_numpy(rng.standard_normal(small.shape, dtype=np.float32))
        return ConcatConditioning(self.low_res_schedule.add_noise(small, noise, level)[0].float(), levels=level[0])


def examples(config: DiffusionTraining, components: Components) -> list[tuple[str, dict[str, Any], Tensor]]:
    """Return the captions of a few pictures, held out where some are, and what of each a pipeline is given.

    Besides the same to look at, (3, H, W) in [-1, 1].
    """
    cache = Path(config.cache or Path(config.run.out) / "cache")
    data = open_held_out(config.data, cache, EXAMPLES) or load_images(config.data, cache=cache, most=EXAMPLES)
    task, found = replace(Task.of(config, components), max_noise_level=0, full_mask=0.0), []
    for number, picture in enumerate(composite(data.images, rgb(config.data.background))):
        concat = task.draw(picture, np.random.default_rng([1, number]))
        if concat.kept is None:
            (small,) = from_tensor(concat.channels[None])
            given: dict[str, Any] = {"image": small, "noise_level": 0}
            shown = to_tensor([small.resize(picture.shape[1::-1], Image.Resampling.NEAREST)])[0]
        else:
            mask = concat.channels.repeat_interleave(task.factor, 1).repeat_interleave(task.factor, 2)
            white, shown = Image.fromarray((mask[0].numpy() * 255).astype(np.uint8)), concat.kept * (1 - mask)
            given = {"image": Image.fromarray(picture), "mask": white}
            given |= dict(zip(("height", "width"), picture.shape))
        found.append((data.rows[number]["captions"][0], given, shown))
    return found


def extra_channels(config: DiffusionTraining, latent_channels: int) -> int:
    """Return how many input channels the network has beside those of noisy latents."""
    return {"text_to_image": 0, "inpaint": 1 + latent_channels, "upscale": 3}[config.task.kind]
