"""Batches of a training step: a pure function of seed and step, prepared ahead of the loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor

from ..config import DiffusionTraining
from .augment import draw_view
from .conditions import ConcatConditioning
from .latents import LatentSet
from .prefetch import prefetched

WHOLE = slice(None)


class Conditioning(TypedDict, total=False):
    """What a network is told besides its context; see `UNet2DConditionModel.forward`."""

    added: Mapping[str, Tensor]
    class_labels: Tensor


@dataclass(frozen=True)
class Batch:
    """Samples without noise, and what the network is told of each.

    Attributes:
        latents: (B, C, h, w), scaled.
        context: text states (B, L, D); numbers and mask of tokens (B, 2, L) int64 for a `JointNetwork`.
        dropped: (B,) bool, which have the null prompt in place of their caption.
        added: "text_embeds" (B, P) and "time_ids" (B, 6) for U-Nets of XL.
        concat: channels concatenated to the noisy latents, of a task that has them; see `ConcatConditioning`.
    """

    latents: Tensor
    context: Tensor
    dropped: Tensor
    added: Mapping[str, Tensor] = field(default_factory=dict)
    concat: ConcatConditioning | None = None

    def __len__(self) -> int:
        return len(self.latents)

    def map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """Return a batch of what a function makes of each tensor: moved, or a part of it."""
        added = {name: change(tensor) for name, tensor in self.added.items()}
        concat = None if self.concat is None else self.concat.map(change)
        return Batch(change(self.latents), change(self.context), change(self.dropped), added, concat)

    def joined(self, other: Batch) -> Batch:
        """Return the samples of both, one after the other."""
        added = {name: torch.cat([tensor, other.added[name]]) for name, tensor in self.added.items()}
        latents, context = torch.cat([self.latents, other.latents]), torch.cat([self.context, other.context])
        return Batch(latents, context, torch.cat([self.dropped, other.dropped]), added)


def latent_batches(
    data: LatentSet, config: DiffusionTraining, first: int, shares: Sequence[slice] = (WHOLE,)
) -> Iterator[Batch]:
    """Yield what `draw_batch` returns for every step from `first` on, drawn ahead in a thread.

    Args:
        shares: which positions in the batch, one after the other.
    """

    def draw(number: int) -> Batch:
        step, share = divmod(number, len(shares))
        return draw_batch(data, config, step, shares[share])

    return prefetched(draw, range(first * len(shares), config.run.steps * len(shares)), threads=1)


def draw_batch(data: LatentSet, config: DiffusionTraining, step: int, share: slice = WHOLE) -> Batch:
    """Return the samples at some positions in the batch of one step.

    View, caption and caption dropout of a sample are a pure function of (seed, sample, epoch).
    """
    if data.prior is None:
        return _draw_samples(data, config, step, config.run.batch_size, range(config.run.batch_size)[share])
    size, drawn = config.run.batch_size // 2, []
    for position in range(config.run.batch_size)[share]:
        half, among = divmod(position, 2)
        drawn.append(_draw_samples(data.prior if among else data, config, step, size, [half]))
    return reduce(Batch.joined, drawn)


def sample_weights(config: DiffusionTraining) -> Tensor:
    """Return what the loss of each position in a batch is multiplied by, (B,): more or less for pictures of a prior.

    The mean over the batch is then the mean over the own pictures and `prior.weight` times that over the others.
    """
    if config.prior is None:
        return torch.ones(config.run.batch_size)
    return torch.tensor([2.0, 2.0 * config.prior.weight]).repeat(config.run.batch_size // 2)


def _draw_samples(
    data: LatentSet, config: DiffusionTraining, step: int, batch_size: int, positions: Sequence[int]
) -> Batch:
    """Return the samples at some positions in the batch of one step of a set, which has no prior of its own."""
    run, picked, rows, concat = config.run, [], [], []
    indices, epochs = (drawn[positions] for drawn in data.order.batch(step, batch_size, run.seed))
    for index, epoch in zip(indices.tolist(), epochs.tolist()):
        rng = np.random.default_rng([run.seed, data.samples[index].place, epoch])
        view = draw_view(config.data, rng)
        caption = int(rng.choice(data.choices[index][view]))
        rows.append(0 if rng.random() < config.objective.caption_dropout else caption)
        picked.append(index * len(data.choices[index]) + view)
        if data.drawer is not None:
            concat.append(data.drawer(picked[-1], rng))
    context, added = data.texts.take(rows)
    if added:
        added["time_ids"] = torch.from_numpy(data.conditions[picked]).float()
    stacked = ConcatConditioning.stack(concat) if concat else None
    return Batch(data.latents.take(picked), context, torch.tensor(rows) == 0, added, stacked)
