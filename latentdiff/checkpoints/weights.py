"""Read the tensors of a checked safetensors file into memory of their own, in the precision that is asked for.

Files are not mapped: pages of a mapped file count as memory too, a file that is cut off later would end the process,
and one that is changed later would change the weights behind every check.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from latentdiff.checkpoints.header import DTYPE_BYTES, TensorInfo
from latentdiff.errors import ModelLoadError, ModelValueError

__all__ = ["FLOATS", "read_weights", "require_finite_weights"]

# The dtypes that weights may have in a file.
FLOATS = {
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


def read_weights(
    file: Path,
    tensors: Mapping[str, TensorInfo],
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
) -> dict[str, Tensor]:
    """Read tensors of a file one after the other, so that at no time more than one is there in both precisions.

    Args:
        file: whose header was read before.
        tensors: those to read, of the dtypes in `FLOATS`.
        dtype, device: of the result; None keeps the dtype of each.

    Raises:
        ModelValueError: one is not finite in that dtype.
        ModelLoadError: the file cannot be read, or is no longer as long as it was.
    """
    weights: dict[str, Tensor] = {}
    try:
        with file.open("rb") as stream:
            for name, info in sorted(tensors.items(), key=lambda item: item[1].start):
                raw = torch.empty(prod(info.shape) * DTYPE_BYTES[info.dtype], dtype=torch.uint8)
                stream.seek(info.start)
                if stream.readinto(raw.numpy().data) != len(raw):
                    raise ModelLoadError(f"{file}: was cut off while it was read; load it again")
                weight = raw.view(FLOATS[info.dtype]).reshape(info.shape)
                weights[name] = weight.to(device, weight.dtype if dtype is None else dtype)
                require_finite_weights(file, {name: weights[name]})
    except OSError as error:
        raise ModelLoadError(f"{file}: cannot be read ({error.strerror})") from error
    return weights


def require_finite_weights(file: Path, weights: Mapping[str, Tensor]) -> None:
    """Raise ModelValueError if a weight is not finite."""
    for name, tensor in weights.items():
        # The extremes show whether any value is not finite and need no memory; counting is for the error alone.
        if tensor.numel() and not (tensor.max() - tensor.min()).isfinite():
            count = int((~torch.isfinite(tensor)).sum())
            if count:
                raise ModelValueError(f"{file}: {name} has {count} values that are NaN or infinite in {tensor.dtype}")
