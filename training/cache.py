"""Latents and text states computed once and kept on disk, each under a name made of everything it depends on.

The cache folder has one folder for each encoder. In it are shards, safetensors files of up to `SHARD_ENTRIES` entries:
"values" (n, ...) float16 and "keys" (n, 16) uint8. A shard appears whole or not at all, so what a killed run finished
counts; one process fills a folder at a time while the others wait.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from latentdiff.checkpoints import Parts
from latentdiff.errors import StorageError
from latentdiff.images import to_tensor, write_file
from training.augment import Variant, paint, plan_variant
from training.config import DataConfig
from training.dataset import CaptionedImages, Sample
from training.loading import prefetched
from training.order import BatchOrder

SHARD_ENTRIES = 1024
KEY_BYTES = 16


class Stored:
    """Tensors of half precision in shards on disk, memory-mapped: nothing is read before it is asked for.

    Args:
        shards: "values" of each shard, (n, ...) float16.
        places: (N, 2) int64, shard and row of each tensor.
    """

    def __init__(self, shards: list[Tensor], places: np.ndarray) -> None:
        self.shards, self.places = shards, places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Tensor:
        shard, row = self.places[index]
        return self.shards[shard][row]

    def take(self, indices: Sequence[int]) -> Tensor:
        """Return several tensors of one shape, (B, ...) float32."""
        return torch.stack([self[index] for index in indices]).float()


@dataclass(frozen=True)
class LatentSet:
    """What the diffusion stage trains on.

    Attributes:
        latents: (C, h, w) each, scaled; latents[n * V + v] is kind of variant v of picture n.
        contexts: (L, D) each; the first belongs to the empty caption.
        captions: M captions, the empty one first.
        choices: choices[n][v], the rows of `contexts` that describe variant v of picture n.
        order: what batches are drawn from.
        samples: N, sizes of the pictures.
    """

    latents: Stored
    contexts: Stored
    captions: list[str]
    choices: list[list[list[int]]]
    order: BatchOrder
    samples: list[Sample]


def cached_latents(
    data: CaptionedImages,
    config: DataConfig,
    seed: int,
    parts: Parts,
    folder: Path,
) -> LatentSet:
    """Return the latents and text states of every variant of every picture; what `folder` lacks is computed first.

    Raises:
        StorageError: the cache cannot be written.
    """
    kinds = list(dict.fromkeys(config.variants))
    variants = [plan_variant(data, n, kind, seed, config.background) for n in range(len(data)) for kind in kinds]
    captions = ["", *dict.fromkeys(caption for variant in variants for caption in variant.captions)]
    row = {caption: number for number, caption in enumerate(captions)}
    rows = [[row[caption] for caption in variant.captions] for variant in variants]
    choices = [rows[first : first + len(kinds)] for first in range(0, len(rows), len(kinds))]
    encoder, text = _digest(parts.autoencoder), _digest(parts.text_encoder, parts)
    latents = stored(
        folder / f"latents-{encoder}",
        [_variant_key(data, variant) for variant in variants],
        lambda numbers: _encode_pictures(data, [variants[number] for number in numbers], parts),
        shapes=[data.samples[variant.index].frame for variant in variants],
        batch_size=64,
    )
    contexts = stored(
        folder / f"texts-{text}",
        [hashlib.sha256(caption.encode()).digest()[:KEY_BYTES] for caption in captions],
        lambda numbers: _encode_captions([captions[number] for number in numbers], parts),
        shapes=[()] * len(captions),
        batch_size=256,
    )
    return LatentSet(latents, contexts, captions, choices, data.order, data.samples)


def stored(
    folder: Path,
    keys: Sequence[bytes],
    encode: Callable[[Sequence[int]], Tensor],
    shapes: Sequence[tuple[int, ...]],
    batch_size: int,
) -> Stored:
    """Return the tensors of `keys` in a folder of shards, after computing those that it lacks.

    Args:
        keys: of `KEY_BYTES` bytes; equal ones have equal tensors.
        encode: returns the tensors (B, ...) of the keys with some numbers.
        shapes: what tells keys whose tensors have different shapes apart.
        batch_size: how many are given to `encode` at a time.

    Raises:
        StorageError: a shard cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "lock"):
            for left in folder.glob(".tmp-*"):  # by a run that was killed while it wrote
                left.unlink()
            shards, places = _read_shards(folder)
            lacking = list({key: n for n, key in reversed(list(enumerate(keys))) if key not in places}.values())
            lacking.sort(key=lambda n: (shapes[n], n))
            progress = tqdm(total=len(lacking), desc=folder.name, disable=not lacking)
            for _, group in groupby(lacking, lambda n: shapes[n]):
                numbers = list(group)
                for first in range(0, len(numbers), SHARD_ENTRIES):
                    part = numbers[first : first + SHARD_ENTRIES]
                    batches = [part[start : start + batch_size] for start in range(0, len(part), batch_size)]
                    values = []
                    for batch in batches:
                        values.append(encode(batch).half().cpu())
                        progress.update(len(batch))
                    _write_shard(folder, [keys[n] for n in part], torch.cat(values))
            progress.close()
            if lacking:
                shards, places = _read_shards(folder)
    except OSError as error:
        raise StorageError(f"could not write the cache {folder}: {error}; free space or set another `cache`") from error
    return Stored(shards, np.array([places[key] for key in keys], dtype=np.int64).reshape(-1, 2))


def _read_shards(folder: Path) -> tuple[list[Tensor], dict[bytes, tuple[int, int]]]:
    """Map all shards of a folder; one that is broken is removed, to be computed again."""
    shards: list[Tensor] = []
    places: dict[bytes, tuple[int, int]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, "pt") as content:
                keys, values = content.get_tensor("keys"), content.get_tensor("values")
        except SafetensorError as error:
            print(f"{file} is broken ({error}) and computed again", file=sys.stderr)
            file.unlink()
            continue
        for row, key in enumerate(keys.numpy()):
            places[key.tobytes()] = (len(shards), row)
        shards.append(values)
    return shards, places


def _write_shard(folder: Path, keys: Sequence[bytes], values: Tensor) -> None:
    names = torch.from_numpy(np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(-1, KEY_BYTES).copy())
    name = hashlib.sha256(b"".join(keys)).hexdigest()[:16]
    write_file(folder / f"{name}.safetensors", save({"keys": names, "values": values.contiguous()}))


@torch.no_grad()
def _encode_pictures(data: CaptionedImages, variants: list[Variant], parts: Parts) -> Tensor:
    """Return the latents (B, C, h, w) of variants of one size."""
    autoencoder = parts.autoencoder
    pictures = list(prefetched(lambda number: paint(data, variants[number]), range(len(variants))))
    images = to_tensor(np.stack(pictures)).to(next(autoencoder.parameters()).device)
    return autoencoder.encode(images).mode() * autoencoder.config.scaling_factor


@torch.no_grad()
def _encode_captions(captions: list[str], parts: Parts) -> Tensor:
    """Return the states (B, L, D) of captions, of those that are longer than the text window its first part."""
    encoded = parts.prompt_encoder(captions)
    too_long = [caption for caption, states in zip(captions, encoded) if len(states.states) > 1]
    if too_long:
        print(
            f"{len(too_long)} captions are longer than the text window and cut, first {too_long[0]!r}", file=sys.stderr
        )
    return torch.stack([caption.states[0] for caption in encoded])


def _variant_key(data: CaptionedImages, variant: Variant) -> bytes:
    """Name everything that the pixels of a variant depend on."""
    seen = [data.samples[n].digest for n in (variant.index, variant.beside) if n is not None]
    frame = data.samples[variant.index].frame
    text = repr((seen, frame, variant.ground, variant.mirrored, variant.turn))
    return hashlib.sha256(text.encode()).digest()[:KEY_BYTES]


def _digest(model: torch.nn.Module, parts: Parts | None = None) -> str:
    """Return a hash of a network's config and weights, and of the tokenizer before it where there is one."""
    digest = hashlib.sha256(repr(model.config).encode())
    for name, weight in model.state_dict().items():
        digest.update(name.encode() + weight.detach().float().cpu().numpy().tobytes())
    if parts is not None and parts.tokenizer is not None:
        digest.update(parts.tokenizer.digest.encode())
    return digest.hexdigest()[:16]
