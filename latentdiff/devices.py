"""Choose where and in what precision networks run; the one place that asks which devices there are."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentdiff.errors import InputError, shown, suggest
from latentdiff.memory import machine_memory, peak_of_process

__all__ = [
    "DTYPES",
    "OutOfDeviceMemoryError",
    "Pace",
    "Recorder",
    "copies_unwaited",
    "count_gpus",
    "device_name",
    "fast_dtypes",
    "gpu_of_process",
    "machine_memory",
    "memory_of",
    "number_of_gpu",
    "peak_memory",
    "peak_of_process",
    "record_kernels",
    "release_freed_memory",
    "resolve_device",
    "resolve_dtype",
    "restored_random_state",
    "supports_bfloat16",
    "timed",
    "widest_float",
]

OutOfDeviceMemoryError = torch.cuda.OutOfMemoryError
# (call, its device) -> what starts the kernels of the call again, and what it returned, which they write anew
Recorder = Callable[[Callable[[], Tensor], torch.device], tuple[Callable[[], None], Tensor]]
WARM = 3  # calls before one is recorded, in which libraries choose and make their kernels
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


def memory_of(device: torch.device) -> int:
    """Return the bytes of memory that what runs on a device can use: its own, or those of the machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return machine_memory()


def device_name(device: torch.device) -> str:
    """Return what a GPU, or else the processor of the machine, is called."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def number_of_gpu(device: torch.device) -> int | None:
    """Return which of the visible GPUs a device is, None for what is no such."""
    if device.type != "cuda":
        return None
    return torch.cuda.current_device() if device.index is None else device.index


def count_gpus() -> int:
    """Return how many GPUs of CUDA are visible."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def gpu_of_process(number: int) -> str | None:
    """Return the GPU of one of several processes, which take those of the machine in turn; None without any."""
    return f"cuda:{number % torch.cuda.device_count()}" if torch.cuda.is_available() else None


@contextmanager
def peak_memory(device: torch.device) -> Iterator[list[int]]:
    """Yield a list that holds, once this is left, the most bytes held meanwhile: on a GPU, or else by this process."""
    found: list[int] = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield found
        found.append(torch.cuda.max_memory_allocated(device))
        return
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak counts from here on
    yield found
    found.append(peak_of_process())


class Pace:
    """Lets the CPU be one step ahead of a GPU at most, so that what is cancelled stops soon, and times are true."""

    def __init__(self) -> None:
        self._last: torch.cuda.Event | None = None  # of the step before

    def keep(self, device: torch.device) -> None:
        """Wait for the step before, once this one has been handed in."""
        if device.type == "cuda":
            before, self._last = self._last, torch.cuda.current_stream(device).record_event()
            if before is not None:
                before.synchronize()


def release_freed_memory() -> None:
    """Give back what torch keeps of a GPU's memory for later."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def record_kernels(call: Callable[[], Tensor], device: torch.device) -> tuple[Callable[[], None], Tensor]:
    """Record a call on a GPU as a CUDA graph; see `Recorder`. What it reads must stay where it is.

    Raises:
        RuntimeError: it waits for the GPU, or memory is short.
    """
    with torch.cuda.device(device):
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(WARM):
                call()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=_graph_memory(), capture_error_mode="thread_local"):
            output = call()
    return graph.replay, output


@cache
def _graph_memory() -> Any:
    """Return the memory that all graphs share, of which only one runs at a time."""
    return torch.cuda.graph_pool_handle()


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Return the seconds from a device that is idle to one that is again."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda device: None
    wait(device)
    started = time.perf_counter()
    call()
    wait(device)
    return time.perf_counter() - started


def supports_bfloat16(device: torch.device) -> bool:
    """Say whether a device multiplies matrices in bfloat16 by itself, faster than in float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return device.type == "cpu" and getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()


def fast_dtypes(device: torch.device) -> tuple[str, ...]:
    """Return the names of what a device computes in by itself, float32 first."""
    half = ("float16",) if device.type == "cuda" else ()
    return ("float32", *(("bfloat16",) if supports_bfloat16(device) else ()), *half)


@contextmanager
def restored_random_state() -> Iterator[None]:
    """Put torch's global generators, that of the CPU and those of CUDA, back as they were after a `with` block."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices):
        yield
