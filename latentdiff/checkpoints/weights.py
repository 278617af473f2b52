"""Tensors of safetensors files: in the precision that is asked for, made ready to be written.

Large files are mapped. What such a file holds in that precision is not copied: its pages are the weights, shared with
all processes that map them. It may be replaced by another or deleted while a model runs, but not written into or cut:
the system then changes the weights, or ends the process (SIGBUS). Files of at most `PRIVATE_BYTES` are read, and may
change at any time.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping
from io import BufferedReader
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from latentdiff.checkpoints.header import TensorInfo
from latentdiff.devices import DTYPES, OutOfDeviceMemoryError
from latentdiff.errors import InputError, ModelLoadError, ModelValueError, shown, suggest

__all__ = ["FLOATS", "NUMBERS", "STORAGE_DTYPES", "read_weights", "storage_dtype", "stored_weights"]

# The dtypes that weights may have in a file.
FLOATS = {
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
PRIVATE_BYTES = 256 * 2**20
OWN_PAGES = 2**16  # bytes from which memory of its own goes back to the system, of which malloc would keep pieces
# Those of numbers beside weights, such as the alpha of a LoRA.
NUMBERS = {**FLOATS, "I8": torch.int8, "U8": torch.uint8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64}
# What weights can be written in, by name; the first three are also computed in.
STORAGE_DTYPES = {**DTYPES, "float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}


def read_weights(
    file: Path,
    tensors: Mapping[str, TensorInfo],
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
) -> dict[str, Tensor]:
    """Read or map tensors of a file, and cast them one after the other, each of which then lets go of its memory.

    Args:
        file: whose header was read before.
        tensors: those wanted, of the dtypes in `NUMBERS`.
        dtype, device: of the result; None keeps the dtype of each, except that float8, in which nothing is computed,
            becomes float16, which has all its values.

    Raises:
        ModelValueError: one is not finite in that dtype.
        ModelLoadError: the file cannot be read, or is no longer as long as it was.
    """
    weights: dict[str, Tensor] = {}
    try:
        with file.open("rb") as stream:
            mapped = None
            if os.fstat(stream.fileno()).st_size > PRIVATE_BYTES:
                mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
                if os.fstat(stream.fileno()).st_size != len(mapped):
                    raise ValueError("it is being written")
            for name, info in sorted(tensors.items(), key=lambda item: item[1].start):
                held = _read(stream, info) if mapped is None else _view(mapped, info)
                misaligned = mapped is not None and info.start % held.itemsize != 0  # not every operation takes that
                kind = dtype or (torch.float16 if held.itemsize == 1 and held.is_floating_point() else held.dtype)
                weights[name] = held.to(device, kind, copy=misaligned)
                _require_finite(file, name, weights[name])
                if mapped is not None and weights[name] is not held:
                    _release(mapped, info.start, held.nbytes)
    except (OSError, RuntimeError, ValueError) as error:
        if isinstance(error, OutOfDeviceMemoryError):
            raise
        raise ModelLoadError(f"{file}: cannot be read ({str(error).splitlines()[0][:120]})") from error
    return weights


def _read(stream: BufferedReader, info: TensorInfo) -> Tensor:
    dtype = NUMBERS[info.dtype]
    size = prod(info.shape) * dtype.itemsize
    data = mmap.mmap(-1, size) if size >= OWN_PAGES else bytearray(size)
    stream.seek(info.start)
    if stream.readinto(data) < len(data):
        raise ValueError("it is being written")
    return torch.frombuffer(data, dtype=dtype).reshape(info.shape) if data else torch.empty(info.shape, dtype=dtype)


def _view(mapped: mmap.mmap, info: TensorInfo) -> Tensor:
    count, dtype = prod(info.shape), NUMBERS[info.dtype]
    if count == 0:
        return torch.empty(info.shape, dtype=dtype)
    return torch.frombuffer(mapped, dtype=dtype, count=count, offset=info.start).reshape(info.shape)


def _release(mapped: mmap.mmap, start: int, count: int) -> None:
    """Let go of the pages of some bytes; whoever needs one again gets it from the file."""
    if hasattr(mapped, "madvise") and count:  # where the system has it
        begin = start - start % mmap.PAGESIZE
        mapped.madvise(mmap.MADV_DONTNEED, begin, start + count - begin)


def _require_finite(file: Path, name: str, tensor: Tensor) -> None:
    # The extremes show whether any value is not finite and need no memory; counting is for the error alone.
    if tensor.numel() and not (tensor.max() - tensor.min()).isfinite():
        count = int((~torch.isfinite(tensor)).sum())
        if count:
            raise ModelValueError(f"{file}: {name} has {count} values that are NaN or infinite in {tensor.dtype}")


def stored_weights(tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Return weights as they go into a file.

    Args:
        tensors: by name, on any device.
        dtype: one of `STORAGE_DTYPES`; None keeps each as it is.

    Raises:
        InputError: weights are not written in that dtype.
        ModelValueError: a weight is not finite, or beyond the range of that dtype.
    """
    if dtype is not None and dtype not in STORAGE_DTYPES.values():
        raise InputError(f"dtype must be one of torch.{', torch.'.join(STORAGE_DTYPES)}, got {shown(dtype)}")
    weights = {}
    for name, tensor in tensors.items():
        kind = dtype or tensor.dtype
        largest, limit = torch.maximum(tensor.max(), -tensor.min()).item(), torch.finfo(kind).max
        if not largest <= limit:
            raise ModelValueError(
                f"{name} is not finite in {kind}: it has {largest:.6g}, and {limit:.6g} is the largest there; "
                "save in float32, or find what made it so"
            )
        weights[name] = tensor.detach().to("cpu", kind).contiguous()
    return weights


def storage_dtype(name: str) -> torch.dtype:
    """Return the dtype that weights are written in.

    Raises:
        InputError: unknown name.
    """
    if name not in STORAGE_DTYPES:
        raise InputError(f"dtype {name!r} is unknown{suggest(name, STORAGE_DTYPES)}")
    return STORAGE_DTYPES[name]
