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

from latentdiff.checkpoints import Parts
from latentdiff.images import to_tensor
from latentdiff.models.clip import CLIPTextModel
from training.augment import Variant, paint, paint_all, plan_variants
from training.cache import KEY_BYTES, Stored, stored
from training.config import DataConfig
from training.dataset import CaptionedImages, Sample
from training.loading import prefetched
from training.order import BatchOrder
from training.tasks import Beside, Task

TOLD_TOGETHER = 256  # captions, since all of them get as many windows as the longest


class Texts(Protocol):
    """What the network is told of each of M captions, the empty one first."""

    def take(self, rows: Sequence[int]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return `Batch.context`, and "text_embeds" of `Batch.added` where the U-Net expects it, of some captions."""


@dataclass(frozen=True)
class States:
    """Text states (L, D) of a frozen encoder, or (L + 1, D), the last row the pooled vector and zeros."""

    packed: Stored | Tensor
    pooled_width: int = 0

    def take(self, rows: Sequence[int]) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Texts`."""
        packed = self.packed[rows].float() if isinstance(self.packed, Tensor) else self.packed.take(rows)
        if not self.pooled_width:
            return packed, {}
        return packed[:, :-1], {"text_embeds": packed[:, -1, : self.pooled_width]}


@dataclass(frozen=True)
class Tokens:
    """Numbers and mask of tokens (M, 2, L), for an encoder that is trained."""

    tokens: Tensor

    def take(self, rows: Sequence[int]) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Texts`."""
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

    latents: Stored
    texts: Texts
    captions: list[str]
    choices: list[list[list[int]]]
    order: BatchOrder
    samples: list[Sample]
    conditions: np.ndarray
    drawer: Callable[[int, np.random.Generator], Beside] | None = None
    prior: LatentSet | None = None


def cached_latents(
    data: CaptionedImages,
    config: DataConfig,
    seed: int,
    parts: Parts,
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
    captions = ["", *dict.fromkeys(caption for variant in variants for caption in variant.captions)]
    row = {caption: number for number, caption in enumerate(captions)}
    rows = [[row[caption] for caption in variant.captions] for variant in variants]
    views = len(config.views)
    choices = [rows[first : first + views] for first in range(0, len(rows), views)]
    conditions = np.array([variant.condition(data) for variant in variants], dtype=np.int32)
    latents = stored(
        folder / f"latents-{_digest(parts.autoencoder)}",
        [_variant_key(data, variant) for variant in variants],
        lambda numbers: _encode_pictures(data, [variants[number] for number in numbers], parts),
        shapes=[data.samples[variant.index].frame for variant in variants],
        batch_size=64,
    )
    texts = Tokens(token_rows(captions, parts)) if as_tokens else _cached_states(captions, parts, folder)
    drawer = None if task is None else partial(_beside, data, variants, task)
    return LatentSet(latents, texts, captions, choices, data.order, data.samples, conditions, drawer)


def _beside(
    data: CaptionedImages, variants: Sequence[Variant], task: Task, number: int, rng: np.random.Generator
) -> Beside:
    return task.draw(paint(data, variants[number]), rng)


def encode_captions(captions: Sequence[str], parts: Parts) -> States:
    """Return what the text encoders make of captions, of those that are longer than the text window its first part."""
    return States(_packed_states(captions, parts), _pooled_width(parts))


def token_rows(captions: Sequence[str], parts: Parts) -> Tensor:
    """Return numbers and mask (M, 2, L) of the tokens of captions, of those that are longer than L the first part."""
    assert parts.tokenizer is not None
    tokens, length = parts.tokenizer(captions), parts.tokenizer.model_max_length
    return torch.stack([tokens.input_ids[:, :length], tokens.attention_mask[:, :length]], dim=1)


def tell_of_cut(captions: Sequence[str], parts: Parts) -> None:
    """Say on stderr how many captions are longer than the text window, whether they are encoded now or were before."""
    if parts.tokenizer is None:
        return
    shares = [captions[first : first + TOLD_TOGETHER] for first in range(0, len(captions), TOLD_TOGETHER)]
    windows = [count for share in shares for count in parts.tokenizer(share).windows]
    cut = [caption for caption, count in zip(captions, windows) if count > 1]
    if cut:
        print(
            f"{len(cut)} of {len(captions)} captions are longer than the text window of "
            f"{parts.tokenizer.model_max_length} tokens, and only what fits is seen; first {cut[0][:80]!r}",
            file=sys.stderr,
        )


def _cached_states(captions: Sequence[str], parts: Parts, folder: Path) -> States:
    digests = [_digest(parts.text_encoder, parts)]
    if parts.text_encoder_2 is not None:
        digests.append(_digest(parts.text_encoder_2))
    packed = stored(
        folder / f"texts-{'-'.join(digests)}{'-zeros' if parts.force_zeros else ''}",
        [hashlib.sha256(caption.encode()).digest()[:KEY_BYTES] for caption in captions],
        lambda numbers: _packed_states([captions[number] for number in numbers], parts),
        shapes=[()] * len(captions),
        batch_size=256,
    )
    return States(packed, _pooled_width(parts))


def _pooled_width(parts: Parts) -> int:
    """Return how long the pooled vectors are, 0 for U-Nets that do not expect any."""
    encoder = parts.text_encoder if parts.text_encoder_2 is None else parts.text_encoder_2
    expected = parts.unet is not None and parts.unet.config.addition_embed_type is not None
    return encoder.config.projection_dim if expected and isinstance(encoder, CLIPTextModel) else 0


@torch.no_grad()
def _packed_states(captions: Sequence[str], parts: Parts) -> Tensor:
    """Return what `States` are made of, (B, L, D) or (B, L + 1, D)."""
    encoded = parts.prompt_encoder(captions)
    packed = []
    for caption, own in zip(captions, encoded):
        states = own.states[0]  # (L, D)
        if _pooled_width(parts) and own.pooled is not None:
            states = torch.cat([states, F.pad(own.pooled, (0, states.shape[1] - len(own.pooled)))[None]])
        packed.append(states * 0 if parts.force_zeros and not caption else states)
    return torch.stack(packed)


@torch.no_grad()
def _encode_pictures(data: CaptionedImages, variants: list[Variant], parts: Parts) -> Tensor:
    """Return the latents (B, C, h, w) of variants of one size."""
    autoencoder = parts.autoencoder
    groups = [list(group) for _, group in groupby(variants, lambda variant: variant.index)]
    pictures = prefetched(lambda number: paint_all(data, groups[number]), range(len(groups)))
    images = to_tensor(np.stack([picture for group in pictures for picture in group]))  # (B, 3, H, W)
    latents = autoencoder.encode(images.to(next(autoencoder.parameters()).device)).mode()
    return latents * autoencoder.config.scaling_factor


def _variant_key(data: CaptionedImages, variant: Variant) -> bytes:
    """Name everything that the pixels of a variant depend on."""
    seen = [data.samples[n].digest for n in (variant.index, variant.beside) if n is not None]
    frame = data.samples[variant.index].frame
    parts = (seen, frame, variant.ground, variant.mirrored, variant.turn)
    window = () if variant.corner is None else (variant.corner, data.samples[variant.index].covering)
    text = repr((*parts, *window))
    return hashlib.sha256(text.encode()).digest()[:KEY_BYTES]


def _digest(model: torch.nn.Module, parts: Parts | None = None) -> str:
    """Return a hash of a network's config and weights, and of the tokenizer before it where there is one."""
    digest = hashlib.sha256(repr(model.config).encode())
    for name, weight in model.state_dict().items():
        digest.update(name.encode() + weight.detach().float().cpu().numpy().tobytes())
    if parts is not None and parts.tokenizer is not None:
        digest.update(parts.tokenizer.digest.encode())
    return digest.hexdigest()[:16]
