"""Captioned pictures as the diffusion stage sees them: latents and text states, computed once and kept in a cache."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from latentdiff.checkpoints import Encoders
from latentdiff.checkpoints.hashes import network_digest
from latentdiff.images import to_tensor
from latentdiff.models.clip import CLIPTextModel

from ..config import DataConfig
from .augment import Variant, paint, paint_all, plan_variants
from .batch_order import BatchOrder
from .cache import KEY_BYTES, CachedTensors, stored
from .conditions import ConcatConditioning, Task
from .dataset import CaptionedImages
from .prefetch import prefetched
from .sample import Sample

PIXELS_AT_ONCE = 64 * 64**2  # through the autoencoder: pictures of 512 x 512 one by one, each of which takes gigabytes
COUNTED_AT_ONCE = 256  # captions, since all of them get as many windows as the longest


class TextCache(Protocol):
    """What the network is told of each of M captions, the empty one first."""

    def take(self, rows: Sequence[int]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return `Batch.context`, and "text_embeds" of `Batch.added` where the U-Net expects it, of some captions."""


@dataclass(frozen=True)
class EncodedTexts:
    """Text states (L, D) of a frozen encoder, or (L + 1, D), the last row the pooled vector and zeros."""

    packed: CachedTensors | Tensor
    pooled_width: int = 0

    def take(self, rows: Sequence[int]) -> tuple[Tensor, dict[str, Tensor]]:
        """See `TextCache`."""
        packed = self.packed[rows].float() if isinstance(self.packed, Tensor) else self.packed.take(rows)
        if not self.pooled_width:
            return packed, {}
        return packed[:, :-1], {"text_embeds": packed[:, -1, : self.pooled_width]}


@dataclass(frozen=True)
class Tokens:
    """Numbers and mask of tokens (M, 2, L), for an encoder that is trained."""

    tokens: Tensor

    def take(self, rows: Sequence[int]) -> tuple[Tensor, dict[str, Tensor]]:
        """See `TextCache`."""
        return self.tokens[rows], {}


@dataclass(frozen=True)
class LatentSet:
    """What the diffusion stage trains on.

    Attributes:
        latents: (C, h, w) each, scaled; latents[n * V + v] is view v (`DataConfig.views`) of picture n.
        texts: of the captions.
        captions: M captions, the empty one first.
        choices: choices[n][v], the numbers of the captions that describe view v of picture n.
        order: what batches are drawn from.
        samples: N, sizes of the pictures.
        conditions: (N * V, 6) int32, what a network is told of the size and crop of each latent.
        drawer: draws what the network sees beside a latent, of a task that has it.
        prior: pictures of the base model that every second position of a batch is from; None without any.
    """

    latents: CachedTensors
    texts: TextCache
    captions: list[str]
    choices: list[list[list[int]]]
    order: BatchOrder
    samples: list[Sample]
    conditions: np.ndarray
    drawer: Callable[[int, np.random.Generator], ConcatConditioning] | None = None
    prior: LatentSet | None = None


def cached_latents(
    data: CaptionedImages,
    config: DataConfig,
    seed: int,
    components: Encoders,
    folder: Path,
    as_tokens: bool = False,
    task: Task | None = None,
) -> LatentSet:
    """Return the latents and texts of every variant of every picture; what `folder` lacks is computed first.

    Args:
        as_tokens: for a text encoder that is trained, whose states are not known before.
        task: draws what the network sees beside latents; None for text-to-image.

    Raises:
        StorageError: the cache cannot be written.
    """
    variants = [variant for n in range(len(data)) for variant in plan_variants(data, n, config, seed)]
    captions = list(dict.fromkeys(["", *(caption for variant in variants for caption in variant.captions)]))
    row = {caption: number for number, caption in enumerate(captions)}
    rows = [[row[caption] for caption in variant.captions] for variant in variants]
    views = len(config.views)
    choices = [rows[first : first + views] for first in range(0, len(rows), views)]
    conditions = np.array([variant.condition(data) for variant in variants], dtype=np.int32)
    latents = stored(
        folder / f"latents-{network_digest(components.autoencoder)}",
        [_variant_key(data, variant) for variant in variants],
        lambda numbers: _encode_pictures(data, [variants[number] for number in numbers], components),
        shapes=[data.samples[variant.index].frame for variant in variants],
        batch_size=64,
    )
    texts = Tokens(token_rows(captions, components)) if as_tokens else _cached_states(captions, components, folder)
    drawer = None if task is None else partial(_concat_conditioning, data, variants, task)
    return LatentSet(latents, texts, captions, choices, data.order, data.samples, conditions, drawer)


def _concat_conditioning(
    data: CaptionedImages, variants: Sequence[Variant], task: Task, number: int, rng: np.random.Generator
) -> ConcatConditioning:
    return task.draw(paint(data, variants[number]), rng)


def encode_captions(captions: Sequence[str], components: Encoders) -> EncodedTexts:
    """Return what the text encoders make of captions, of those that are longer than the text window its first part."""
    return EncodedTexts(_packed_states(captions, components), _pooled_width(components))


def token_rows(captions: Sequence[str], components: Encoders) -> Tensor:
    """Return numbers and mask (M, 2, L) of the tokens of captions, of those that are longer than L the first part."""
    assert components.tokenizer is not None
    tokens, length = components.tokenizer(captions), components.tokenizer.model_max_length
    return torch.stack([tokens.input_ids[:, :length], tokens.attention_mask[:, :length]], dim=1)


def warn_of_cut(captions: Sequence[str], components: Encoders) -> None:
    """Say on stderr how many captions are longer than the text window, whether they are encoded now or were before."""
    if components.tokenizer is None:
        return
    shares = [captions[first : first + COUNTED_AT_ONCE] for first in range(0, len(captions), COUNTED_AT_ONCE)]
    windows = [count for share in shares for count in components.tokenizer(share).windows]
    cut = [caption for caption, count in zip(captions, windows) if count > 1]
    if cut:
        print(
            f"{len(cut)} of {len(captions)} captions are longer than the text window of "
            f"{components.tokenizer.model_max_length} tokens, and only what fits is seen; first {cut[0][:80]!r}",
            file=sys.stderr,
        )


def _cached_states(captions: Sequence[str], components: Encoders, folder: Path) -> EncodedTexts:
    digests = [network_digest(components.text_encoder, components.tokenizer)]
    if components.text_encoder_2 is not None:
        digests.append(network_digest(components.text_encoder_2))
    packed = stored(
        folder / f"texts-{'-'.join(digests)}{'-zeros' if components.force_zeros else ''}",
        [hashlib.sha256(caption.encode()).digest()[:KEY_BYTES] for caption in captions],
        lambda numbers: _packed_states([captions[number] for number in numbers], components),
        shapes=[()] * len(captions),
        batch_size=256,
    )
    return EncodedTexts(packed, _pooled_width(components))


def _pooled_width(components: Encoders) -> int:
    """Return how long the pooled vectors are, 0 for U-Nets that do not expect any."""
    encoder = components.text_encoder if components.text_encoder_2 is None else components.text_encoder_2
    if components.expects_pooled_text and isinstance(encoder, CLIPTextModel):
        return encoder.config.projection_dim
    return 0


@torch.no_grad()
def _packed_states(captions: Sequence[str], components: Encoders) -> Tensor:
    """Return what `EncodedTexts` are made of, (B, L, D) or (B, L + 1, D)."""
    encoded = components.prompt_encoder(captions)
    packed = []
    for caption, own in zip(captions, encoded):
        states = own.states[0]  # (L, D)
        if _pooled_width(components) and own.pooled is not None:
            states = torch.cat([states, F.pad(own.pooled, (0, states.shape[1] - len(own.pooled)))[None]])
        packed.append(states * 0 if components.force_zeros and not caption else states)
    return torch.stack(packed)


@torch.no_grad()
def _encode_pictures(data: CaptionedImages, variants: list[Variant], components: Encoders) -> Tensor:
    """Return the latents (B, C, h, w) of variants of one size."""
    autoencoder = components.autoencoder
    groups = [list(group) for _, group in groupby(variants, lambda variant: variant.index)]
    pictures = prefetched(lambda number: paint_all(data, groups[number]), range(len(groups)))
    images = [picture for group in pictures for picture in group]  # (H, W, 3) uint8
    few, device = max(1, PIXELS_AT_ONCE // images[0][..., 0].size), next(autoencoder.parameters()).device
    latents = []
    for first in range(0, len(images), few):
        part = to_tensor(np.stack(images[first : first + few])).to(device)  # (b, 3, H, W)
        latents.append(autoencoder.encode(part).mode() * autoencoder.config.scaling_factor)
    return torch.cat(latents)


def _variant_key(data: CaptionedImages, variant: Variant) -> bytes:
    """Name everything that the pixels of a variant depend on."""
    seen = [data.samples[n].digest for n in (variant.index, variant.beside) if n is not None]
    frame = data.samples[variant.index].frame
    parts = (seen, frame, variant.ground, variant.mirrored, variant.turn)
    window = () if variant.corner is None else (variant.corner, data.samples[variant.index].covering)
    text = repr((*parts, *window))
    return hashlib.sha256(text.encode()).digest()[:KEY_BYTES]
