"""Latents and text states computed once and kept on disk, keyed by everything they depend on."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from latentdiff.checkpoints import Parts
from latentdiff.errors import StorageError
from latentdiff.images import to_tensor
from training.augment import render_variant
from training.config import DataConfig
from training.dataset import CaptionedImages


@dataclass(frozen=True)
class LatentSet:
    """What the diffusion stage trains on.

    Attributes:
        latents: (N, V, C, h, w) float16, scaled; V kinds of variant of each of N pictures.
        contexts: (M, L, D) float16, memory-mapped; row 0 belongs to the empty caption.
        captions: M captions, the empty one first.
        choices: choices[n][v], the rows of `contexts` that describe latents[n, v].
    """

    latents: Tensor
    contexts: Tensor
    captions: list[str]
    choices: list[list[list[int]]]


def cached_latents(
    data: CaptionedImages,
    config: DataConfig,
    seed: int,
    parts: Parts,
    folder: Path,
) -> LatentSet:
    """Return the latents and text states of every variant of every picture, from `folder` when they are there.

    Raises:
        StorageError: the cache cannot be written.
    """
    kinds = list(dict.fromkeys(config.variants))
    rendered = [
        render_variant(data, index, kind, seed, config.background)
        for index in tqdm(range(len(data)), desc="variants", unit="picture")
        for kind in kinds
    ]
    captions = ["", *dict.fromkeys(caption for _, found in rendered for caption in found)]
    row = {caption: number for number, caption in enumerate(captions)}
    rows = [[row[caption] for caption in found] for _, found in rendered]
    choices = [rows[first : first + len(kinds)] for first in range(0, len(rows), len(kinds))]
    digest = hashlib.sha256("\n".join(captions).encode())
    for picture, _ in rendered:
        digest.update(picture.tobytes())
    digest.update(str(parts.autoencoder.config.scaling_factor).encode())
    for model in (parts.autoencoder, parts.text_encoder):
        for weight in model.state_dict().values():
            digest.update(weight.detach().float().cpu().numpy().tobytes())
    place = folder / digest.hexdigest()[:16]
    try:
        if not (place / "captions.json").exists():
            _write(place, [picture for picture, _ in rendered], captions, parts)
    except OSError as error:
        raise StorageError(f"could not write the cache {place}: {error}; free space or set another `cache`") from error
    shape = json.loads((place / "captions.json").read_text())
    latents = _map(place / "latents.f16", shape["latents"]).unflatten(0, (len(data), len(kinds)))
    return LatentSet(latents, _map(place / "contexts.f16", shape["contexts"]), captions, choices)


@torch.no_grad()
def _write(place: Path, pictures: list[np.ndarray], captions: list[str], parts: Parts) -> None:
    """Encode everything into a temporary folder that takes its name only when it is whole."""
    temporary = place.with_name(place.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    autoencoder = parts.autoencoder
    device = next(autoencoder.parameters()).device
    shapes: dict[str, list[int]] = {}
    with (temporary / "latents.f16").open("wb") as stream:
        for start in tqdm(range(0, len(pictures), 64), desc="latents", unit="batch"):
            images = to_tensor(np.stack(pictures[start : start + 64])).to(device)
            latents = autoencoder.encode(images).mode() * autoencoder.config.scaling_factor
            stream.write(latents.half().cpu().numpy().tobytes())
            shapes["latents"] = [len(pictures), *latents.shape[1:]]
    too_long = 0
    with (temporary / "contexts.f16").open("wb") as stream:
        for start in tqdm(range(0, len(captions), 256), desc="captions", unit="batch"):
            encoded = parts.prompt_encoder(captions[start : start + 256])
            states = torch.stack([caption.states[0] for caption in encoded])  # (B, L, D)
            too_long += sum(len(caption.states) > 1 for caption in encoded)
            stream.write(states.half().cpu().numpy().tobytes())
            shapes["contexts"] = [len(captions), *states.shape[1:]]
    if too_long:
        print(f"{too_long} of {len(captions)} captions are longer than the text window and were cut", file=sys.stderr)
    (temporary / "captions.json").write_text(json.dumps(shapes | {"captions": captions}, ensure_ascii=False))
    os.replace(temporary, place)


def _map(file: Path, shape: list[int]) -> Tensor:
    count = int(np.prod(shape))
    return torch.from_file(str(file), shared=False, size=count, dtype=torch.float16).view(shape)
