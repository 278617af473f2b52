"""Pictures that an autoencoder is trained on, and those it is measured by."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from torch import Tensor

from latentdiff.images import to_tensor

from ..config import AutoencoderTraining
from .augment import random_view, random_window, rgb
from .dataset import CaptionedImages, LazyImages, composite, open_held_out
from .prefetch import prefetched_by_workers, workers

WHOLE = slice(None)
HELD_OUT = 64  # pictures to measure by, of a split, or as many more as have `HELD_OUT_PIXELS`
HELD_OUT_PIXELS = 1024 * 64**2
MEASURED_PIXELS = 4096 * 64**2  # of the pictures whose latents the exported statistics are of


def image_batches(
    data: CaptionedImages, config: AutoencoderTraining, first: int, shares: Sequence[slice] = (WHOLE,)
) -> Iterator[Tensor]:
    """Yield the images (b, 3, H, W) of every step from `first` on, drawn ahead where they have to be decoded.

    Args:
        shares: which positions in the batch, one after the other.
    """
    numbers = range(first * len(shares), config.run.steps * len(shares))
    processes = workers() if isinstance(data.images, LazyImages) else 0
    return map(to_tensor, prefetched_by_workers(partial(draw_views, data, config, shares), numbers, processes))


def draw_views(data: CaptionedImages, config: AutoencoderTraining, shares: Sequence[slice], number: int) -> np.ndarray:
    """Return the pictures (b, H, W, 3) uint8 of one share of one step, shares of a step being numbered in a row.

    How each is changed is a pure function of (seed, step, sample).
    """
    step, share = divmod(number, len(shares))
    indices, _ = data.order.batch(step, config.run.batch_size, config.run.seed)
    rngs = [np.random.default_rng([config.run.seed, step, data.place(index)]) for index in indices]
    pairs = list(zip(indices, rngs))[shares[share]]
    if config.data.crop == "random":
        return np.stack([random_view(random_window(data, index, rng), rng) for index, rng in pairs])
    return np.stack([random_view(data.images[index], rng) for index, rng in pairs])


def load_measured(config: AutoencoderTraining, data: CaptionedImages) -> Tensor | None:
    """Return pictures (N, 3, H, W) from all over the set, for scenes follow drawings in it, to measure latents by.

    None where the latents stay as they are.
    """
    if config.decoder_only:
        return None
    most = max(HELD_OUT, MEASURED_PIXELS // config.data.size**2)
    images = data.images[:: 1 + (len(data) - 1) // most]
    return to_tensor(composite(images, rgb(config.data.background)))


def load_held_out(config: AutoencoderTraining, data: CaptionedImages) -> Tensor:
    """Return pictures (N, 3, H, W) that are not trained on, a test split's too, or 16 that are where there are none."""
    cache = Path(config.run.out) / "cache"
    most = max(HELD_OUT, HELD_OUT_PIXELS // config.data.size**2)
    splits = [open_held_out(config.data, cache, most, split) for split in ("validation", "test")]
    images = [split.images for split in splits if split is not None] or [data.images[-16:]]
    return to_tensor(composite(np.concatenate(images), rgb(config.data.background)))
