"""Evaluations of a few random pictures and a small model, and small feature networks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from latentdiff.checkpoints import Components
from latentdiff.evaluate import Evaluation, Reference, Request
from latentdiff.evaluate.features import FeatureNetwork
from latentdiff.models.autoencoder import DiagonalGaussian
from latentdiff.pipeline import Pipeline


def images(count: int, seed: int = 0, side: int = 32) -> Tensor:
    """Return coloured blobs (count, 3, side, side) of 8-bit values in [-1, 1]."""
    coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    fine = F.interpolate(coarse, (side, side), mode="bilinear")
    return fine.mul(205).add(25).round().div(127.5).sub(1)


def reference(pictures: Tensor, split: str) -> Reference:
    """Return pictures as those of a split."""

    def load(numbers: Sequence[int]) -> Tensor:
        return pictures[list(numbers)]

    captions = [f"{split} {number}" for number in range(len(pictures))]
    rows = [{"captions": [caption]} for caption in captions]
    return Reference("small", split, captions, rows, captions, load)


def evaluation(
    out: Path,
    components: Components | None,
    test: Tensor,
    training: Tensor | None = None,
    generated: Tensor | None = None,
    lpips_weights: Path | None = None,
) -> Evaluation:
    """Return an evaluation on some pictures, whose features are mean colours of quarters."""
    pipe = None if components is None else cast(Pipeline, SimpleNamespace(components=components, device="cpu"))
    references = {"test": reference(test, "test")}
    if training is not None:
        references["train"] = reference(training, "train")
    found = Evaluation(Request(out, lpips_weights=lpips_weights), pipe, references)
    found.network = FeatureNetwork("quarters", "0", "none", lambda x: F.adaptive_avg_pool2d(x, 2).flatten(1))
    if generated is not None:
        found.generated = generated
    return found


def make_overflow(folder: Path) -> None:
    """Give a saved network weights with which it computes what is not finite; files with NaN are refused as such."""
    (file,) = folder.glob("*.safetensors")
    save_file({name: torch.full_like(value, 1e38) for name, value in load_file(file).items()}, file)


class Shift(nn.Module):
    """An autoencoder that gives pictures back, lighter by some levels of 8 bits."""

    config = SimpleNamespace(downsample_factor=2)

    def __init__(self, levels: float = 0.0) -> None:
        super().__init__()
        self.levels = nn.Parameter(torch.tensor(levels))

    def encode(self, images: Tensor) -> DiagonalGaussian:
        return DiagonalGaussian(images, torch.zeros_like(images))

    def decode(self, latents: Tensor) -> Tensor:
        return latents + self.levels / 127.5
