"""Pairs of a picture and one of its captions, for the image-text model: augmented views, placed anywhere."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentdiff.checkpoints.components import TextEncoder
from latentdiff.checkpoints.hashes import network_digest
from latentdiff.images import to_tensor
from latentdiff.models.image_text import mean_states
from latentdiff.models.tokenizer import Tokenizer

from ..config import ImageTextTraining
from .augment import Variant, draw_view, paint, plan_variants
from .cache import KEY_BYTES, CachedTensors, stored
from .dataset import CaptionedImages
from .distortion import distorted, draw_distortion, draw_place

CAPTIONS_OF_A_VIEW = 3  # at most; more would take longer to encode than they are worth


@dataclass(frozen=True)
class Pairs:
    """Pictures with a caption of each.

    Attributes:
        images: (B, 3, H, W).
        texts: (B, text_dim), mean states of the captions.
        right: (B, B) bool, whether the caption of each column is one that the picture of a row might have had.
        labels: (B,) int64, the label of what each shows; -1 for a picture with a thing beside its own.
    """

    images: Tensor
    texts: Tensor
    right: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> Pairs:
        """Return them on a device."""
        return Pairs(*(part.to(device) for part in (self.images, self.texts, self.right, self.labels)))


@dataclass(frozen=True)
class CaptionedViews:
    """What an image-text model trains on.

    Attributes:
        plans: plans[n][v], how view v of picture n is made; see `DataConfig.views`.
        texts: mean states (text_dim,) of the captions, in their order.
        captions: all different ones.
        labels: all labels, see `label_of`.
        label_texts: (M, text_dim), mean states of the labels, in their order.
    """

    data: CaptionedImages
    plans: list[list[Variant]]
    texts: CachedTensors
    captions: dict[str, int]
    labels: dict[str, int]
    label_texts: Tensor

    def batch(self, config: ImageTextTraining, step: int) -> Pairs:
        """Return the pairs of a step: a pure function of (seed, step)."""
        seed = config.run.seed
        indices, _ = self.data.order.batch(step, config.run.batch_size, seed)
        pictures, numbers, known, labels, places, chances = [], [], [], [], [], []
        for index in indices:
            rng = np.random.default_rng([seed, step, self.data.place(index)])
            variant = self.plans[index][draw_view(config.data, rng)]
            captions = [self.captions[caption] for caption in variant.captions[:CAPTIONS_OF_A_VIEW]]
            pictures.append(paint(self.data, variant))
            known.append(set(captions))
            numbers.append(int(rng.choice(captions)))
            label = label_of(self.data.rows[index], config.label_column)
            labels.append(self.labels[label] if variant.beside is None else -1)
            places.append(draw_place(rng))
            chances.append(draw_distortion(rng))
        right = torch.tensor([[number in own for number in numbers] for own in known])
        where, how = (torch.from_numpy(np.stack(drawn)).float() for drawn in (places, chances))
        images = distorted(to_tensor(np.stack(pictures)), where, how, config.distort)
        return Pairs(images, self.texts.take(numbers), right, torch.tensor(labels))


def label_of(row: dict[str, Any], column: str | None) -> str:
    """Return the short text of what a picture shows: that of a metadata column, or its first caption."""
    value = None if column is None else row.get(column)
    return str(value) if value else str(row["captions"][0])


def prepare_views(
    config: ImageTextTraining, data: CaptionedImages, encoder: TextEncoder, tokenizer: Tokenizer, cache: Path
) -> CaptionedViews:
    """Plan all views of all pictures and encode their captions, from the cache where it has them.

    Raises:
        StorageError: the cache cannot be written.
    """
    plans = [plan_variants(data, index, config.data, config.run.seed) for index in range(len(data))]
    used = (caption for views in plans for view in views for caption in view.captions[:CAPTIONS_OF_A_VIEW])
    captions = {caption: number for number, caption in enumerate(dict.fromkeys(used))}
    texts = encode_texts(list(captions), encoder, tokenizer, cache)
    found = dict.fromkeys(label_of(row, config.label_column) for row in data.rows)
    labels = {label: number for number, label in enumerate(found)}
    label_texts = encode_texts(list(labels), encoder, tokenizer, cache).take(range(len(labels)))
    return CaptionedViews(data, plans, texts, captions, labels, label_texts)


def encode_texts(texts: list[str], encoder: TextEncoder, tokenizer: Tokenizer, cache: Path) -> CachedTensors:
    """Return the mean states (text_dim,) of texts, from the cache where it has them."""
    lengths = [(len(text.split()),) for text in texts]  # short ones together, which are then encoded fast
    return stored(
        cache / f"meanings-{network_digest(encoder, tokenizer)}",
        [hashlib.sha256(text.encode()).digest()[:KEY_BYTES] for text in texts],
        lambda numbers: mean_states(encoder, tokenizer, [texts[number] for number in numbers]),
        shapes=lengths,
        batch_size=64,
    )
