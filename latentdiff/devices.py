"""Choose where and in what precision networks run; the one place that asks which devices there are."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from latentdiff.errors import InputError, shown, suggest

__all__ = [
    "DTYPES",
    "OutOfDeviceMemoryError",
    "copies_unwaited",
    "machine_memory",
    "memory_of",
    "resolve_device",
    "resolve_dtype",
    "restored_random_state",
    "supports_bfloat16",
    "widest_float",
]

OutOfDeviceMemoryError = torch.cuda.OutOfMemoryError
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def resolve_device(device: str | torch.device | None) -> torch.device:
    """Return the device called `device`; None and "auto" mean the fastest there is.

    Raises:
        InputError: no such device here.
    """
    if device is None or device == "auto":
        return torch.device(
            "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        )
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, TypeError, ImportError) as error:  # of devices that torch has no module for
        raise InputError(f"device must be one that is here, got {shown(device)}; try cpu") from error
    if found.type == "meta":  # which holds no numbers
        raise InputError("device must be one that computes, got 'meta'; try cpu")
    return found


def resolve_dtype(dtype: str | torch.dtype | None) -> torch.dtype:
    """Return the dtype called `dtype`; None means float32.

    Raises:
        InputError: unknown name.
    """
    if isinstance(dtype, torch.dtype) and dtype in DTYPES.values():
        return dtype
    if dtype is not None and not (isinstance(dtype, str) and dtype in DTYPES):
        raise InputError(f"dtype {str(dtype)!r} is unknown{suggest(str(dtype), DTYPES)}")
    return DTYPES[str(dtype or "float32")]


def widest_float(device: torch.device) -> torch.dtype:
    """Return the most exact dtype that a device computes in: float64, or float32 on MPS, which has no other."""
    return torch.float32 if device.type == "mps" else torch.float64


def copies_unwaited(device: torch.device) -> bool:
    """Say whether tensors are sent to a device from pinned memory, which nobody has to wait for.

    MPS reads such memory later too, but it may have been freed by then.
    """
    return device.type == "cuda"


def machine_memory() -> int:
    """Return the bytes of physical memory, without a bound where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return 2**62


def memory_of(device: torch.device) -> int:
    """Return the bytes of memory that what runs on a device can use: its own, or those of the machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return machine_memory()


def supports_bfloat16(device: torch.device) -> bool:
    """Say whether a device multiplies matrices in bfloat16 by itself, faster than in float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return device.type == "cpu" and getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()


@contextmanager
def restored_random_state() -> Iterator[None]:
    """Put torch's global generators, that of the CPU and those of CUDA, back as they were after a `with` block."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices):
        yield
