"""Tensors computed once and kept on disk, each under a name made of everything it depends on.

The cache folder has one folder for each encoder. In it are shards, safetensors files of up to `SHARD_ENTRIES` entries:
"values" (n, ...) float16 and "keys" (n, 16) uint8, and a checksum of both. A shard appears whole or not at all, so what
a killed run finished counts, and one that is damaged is computed again. All processes that ask for the same tensors, on
one machine or several, share out what is lacking: each takes a shard that no other has in hand, until none is left.
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from latentdiff.errors import InputError, StorageError
from latentdiff.files import write_file

SHARD_ENTRIES = 1024
KEY_BYTES = 16
ATTEMPTS = 3  # at shards that are found damaged after they were written
PAUSE = 0.2  # seconds between looks at the shards that other processes have in hand
STALE = 3600.0  # seconds after which a file that is not whole is of a process that was killed
CHECKSUM = "sha256"  # in the metadata of a shard


class CachedTensors:
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


def stored(
    folder: Path,
    keys: Sequence[bytes],
    encode: Callable[[Sequence[int]], Tensor],
    shapes: Sequence[tuple[int, ...]],
    batch_size: int,
) -> CachedTensors:
    """Return the tensors of `keys` in a folder of shards, after computing those that it lacks.

    Args:
        keys: of `KEY_BYTES` bytes; equal ones have equal tensors.
        encode: returns the tensors (B, ...) of the keys with some numbers.
        shapes: what tells keys whose tensors have different shapes apart.
        batch_size: how many are given to `encode` at a time.

    Raises:
        StorageError: a shard cannot be written.
        InputError: what was computed is not finite.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_remains(folder)
        shards, places = _read_shards(folder)
        lacking = list({key: n for n, key in reversed(list(enumerate(keys))) if key not in places}.values())
        for _ in range(ATTEMPTS):
            if not lacking:
                break
            progress = tqdm(total=len(lacking), desc=folder.name)
            _fill(folder, keys, list(_parts(lacking, shapes)), encode, batch_size, progress)
            progress.close()
            shards, places = _read_shards(folder)
            lacking = [n for n in lacking if keys[n] not in places]
    except OSError as error:
        raise StorageError(f"could not write the cache {folder}: {error}; free space or set another `cache`") from error
    if lacking:
        raise StorageError(f"the cache {folder} is damaged again and again; set another `cache`, and check the disk")
    return CachedTensors(shards, np.array([places[key] for key in keys], dtype=np.int64).reshape(-1, 2))


def _parts(lacking: Sequence[int], shapes: Sequence[tuple[int, ...]]) -> Iterator[list[int]]:
    """Yield the numbers of each shard to come.

    All but the last of a shape are full, so a process that looks later, when some are there, divides the rest the same.
    """
    for _, group in groupby(sorted(lacking, key=lambda n: (shapes[n], n)), lambda n: shapes[n]):
        numbers = list(group)
        yield from (numbers[first : first + SHARD_ENTRIES] for first in range(0, len(numbers), SHARD_ENTRIES))


def _fill(
    folder: Path,
    keys: Sequence[bytes],
    parts: list[list[int]],
    encode: Callable[[Sequence[int]], Tensor],
    batch_size: int,
    progress: tqdm,
) -> None:
    """Compute shards, those that other processes have in hand left out, and wait until all are there."""
    waiting = {folder / f"{_name([keys[n] for n in part])}.safetensors": part for part in parts}
    while waiting:
        before = len(waiting)
        for file, part in list(waiting.items()):
            lock = file.with_suffix(".lock")
            with suppress(Timeout), FileLock(lock).acquire(blocking=False):
                if not file.exists():
                    values = []
                    for start in range(0, len(part), batch_size):
                        batch = part[start : start + batch_size]
                        values.append(_finite(encode(batch).half().cpu(), folder))
                        progress.update(len(batch))
                    _write_shard(file, [keys[n] for n in part], torch.cat(values))
                with suppress(OSError):  # who waits for it yet finds the shard
                    lock.unlink()
                del waiting[file]
        if len(waiting) == before:
            time.sleep(PAUSE)


def _remove_remains(folder: Path) -> None:
    """Remove what processes left that were killed while they wrote."""
    for left in folder.glob(".tmp-*"):
        with suppress(FileNotFoundError):
            if time.time() - left.stat().st_mtime > STALE:
                left.unlink()


def _read_shards(folder: Path) -> tuple[list[Tensor], dict[bytes, tuple[int, int]]]:
    """Map all shards of a folder after a look at their checksums; broken ones are removed, to be computed again."""
    shards: list[Tensor] = []
    places: dict[bytes, tuple[int, int]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, "pt") as content:
                keys, values = content.get_tensor("keys"), content.get_tensor("values")
                if (content.metadata() or {}).get(CHECKSUM) != _checksum(keys, values):
                    raise SafetensorError("its checksum is another")
        except FileNotFoundError:  # another process found it broken
            continue
        except SafetensorError as error:
            print(f"{file} is broken ({error}) and computed again", file=sys.stderr)
            file.unlink(missing_ok=True)
            continue
        for row, key in enumerate(keys.numpy()):
            places[key.tobytes()] = (len(shards), row)
        shards.append(values)
    return shards, places


def _name(keys: Sequence[bytes]) -> str:
    return hashlib.sha256(b"".join(keys)).hexdigest()[:16]


def _write_shard(file: Path, keys: Sequence[bytes], values: Tensor) -> None:
    names = torch.from_numpy(np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(-1, KEY_BYTES).copy())
    content = {"keys": names, "values": values.contiguous()}
    metadata = {CHECKSUM: _checksum(**content)}
    write_file(file, save(content, metadata=metadata))


def _checksum(keys: Tensor, values: Tensor) -> str:
    """Return the SHA-256 of the keys and tensors of a shard, with their types and shapes."""
    digest = hashlib.sha256()
    for tensor in (keys, values):
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.numpy().data)
    return digest.hexdigest()


def _finite(values: Tensor, folder: Path) -> Tensor:
    """Return tensors that can be trained on.

    Raises:
        InputError: one is not finite, in half precision.
    """
    if not torch.isfinite(values).all():
        raise InputError(f"{folder.name}: the encoder gives values that are no float16; train or pass another one")
    return values
