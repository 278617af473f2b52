"""A graphics card that is not there: real arithmetic on the CPU, by the rules of a device.

    with FakeDevice("cuda") as device:  # or "mps"
        pipe = Pipeline.from_pretrained()  # "auto" finds it
        device.forget()
        pipe("a red fox")
        print(device.syncs, device.copies)

The device of a tensor is written on its storage, so views, gradients and parameters have that of what they are made
from. Inside the block every torch function, in every thread, is called through a mode that refuses what a device
refuses: tensors of two devices in one call, `.numpy()`, a CPU generator for numbers drawn on the device, float64 on
"mps", a copy that does not wait for memory which is not pinned ("mps") or which is read at once (any device). What a
device would wait for (`syncs`) and what is sent to it (`copies`) is counted by the line that asked.

What is not seen: anything within a function of torch, and streams, kernels and memory of a real device.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from types import SimpleNamespace, TracebackType
from typing import Any
from unittest.mock import patch

import torch
import torch._dynamo  # which keeps functions that are replaced below; optimizers import it
from torch import Tensor
from torch.utils import checkpoint

from tests.fake_mode import DeviceMode, device_of, tensors_of

__all__ = ["FakeDevice"]

MEMORY = 80 * 2**30  # bytes


class FakeDevice:
    """A device that is there inside the block.

    Args:
        kind: "cuda" or "mps".
        memory: bytes that it says to have.

    Attributes:
        device: of its tensors, "cuda:0" or "mps:0".
        syncs: how often each line waited for it, by "what file:line".
        copies: how often each line sent something to it from the CPU.
    """

    def __init__(self, kind: str = "cuda", memory: int = MEMORY) -> None:
        self.kind, self.memory = kind, memory
        self.device = torch.device(kind, 0)
        self._mode, self._patches = DeviceMode(self.device), ExitStack()
        self.syncs, self.copies = self._mode.syncs, self._mode.copies

    def __enter__(self) -> FakeDevice:
        for owner, replaced in self._replacements():
            for name, value in replaced.items():
                if hasattr(owner, name):
                    self._patches.enter_context(patch.object(owner, name, value))
        # Checkpointed blocks compare the devices of what C++ saved, which has none yet, and of what was computed again.
        saved = {"default": lambda tensor: (tensor.shape, tensor.dtype)}
        self._patches.enter_context(patch.dict(checkpoint._allowed_determinism_checks_to_fns, saved))
        self._patches.enter_context(self._mode)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._patches.close()

    def forget(self) -> None:
        """Begin to count anew."""
        self.syncs.clear()
        self.copies.clear()

    def holds(self, tensor: Tensor) -> bool:
        """Say whether a tensor is on this device."""
        return device_of(tensor) == self.device

    def _replacements(self) -> Iterator[tuple[Any, dict[str, Any]]]:
        """Yield what is asked about devices, with the answers."""
        here = self.kind == "cuda"
        cuda: dict[str, Any] = {"is_available": lambda: here, "device_count": lambda: int(here)}
        mps = {"is_available": lambda: not here, "is_built": lambda: not here}
        nothing = dict.fromkeys(("empty_cache", "manual_seed", "manual_seed_all", "set_rng_state"), _nothing)
        nothing |= dict.fromkeys(("set_rng_state_all", "set_device", "reset_peak_memory_stats"), _nothing)
        used = dict.fromkeys(("memory_allocated", "max_memory_allocated", "memory_reserved"), lambda *given: 0)
        state = {"get_rng_state": lambda *given: torch.zeros(8, dtype=torch.uint8), "get_rng_state_all": list}
        answers: dict[str, Any] = {
            **nothing,
            **used,
            **state,
            "synchronize": lambda *given: self._mode.wait("synchronize"),
        }
        if here:
            about = SimpleNamespace(total_memory=self.memory, name="fake", major=8, minor=0, multi_processor_count=1)
            cuda |= {"get_device_properties": lambda *given: about, "get_device_name": lambda *given: "fake"}
            cuda |= {"current_device": lambda: 0, "is_current_stream_capturing": lambda: False}
            cuda |= {"get_device_capability": lambda *given: (8, 0), "is_bf16_supported": lambda *given, **more: True}
            cuda |= {"mem_get_info": lambda *given: (self.memory, self.memory)}
            yield torch.cuda, {**answers, **cuda}
        else:
            yield torch.cuda, cuda
            memory = {"current_allocated_memory": lambda: 0, "recommended_max_memory": lambda: self.memory}
            yield torch.mps, {**answers, **memory}
        stream = SimpleNamespace(is_capturing=lambda: False)
        general = {"current_accelerator": lambda *given, **more: torch.device(self.kind), "device_count": lambda: 1}
        general |= {"is_available": lambda: True, "current_stream": lambda *given: stream}
        yield getattr(torch, "accelerator", None), {**answers, **general}
        yield torch.backends.mps, mps
        yield torch.autocast, {"__init__": self._autocast(torch.autocast.__init__)}
        yield threading.Thread, {"run": self._inside(threading.Thread.run)}
        backward = self._backward(torch.autograd.graph._engine_run_backward)
        yield torch.autograd, {"_engine_run_backward": backward}
        yield torch.autograd.graph, {"_engine_run_backward": backward}
        name = "_group_tensors_by_device_and_dtype"  # by which optimizers work
        yield torch._C, {name: _by_mark(getattr(torch._C, name))}

    def _autocast(self, begin: Callable[..., None]) -> Callable[..., None]:
        """Let autocast of this device be that of the CPU."""

        def begin_on_cpu(cast: Any, device_type: str, dtype: torch.dtype | None = None, *more: Any, **how: Any) -> None:
            if device_type == self.kind:
                device_type, dtype = "cpu", dtype or torch.get_autocast_dtype(device_type)
            begin(cast, device_type, dtype, *more, **how)

        return begin_on_cpu

    def _inside(self, run: Callable[..., Any]) -> Callable[..., Any]:
        def run_inside(*args: Any, **kwargs: Any) -> Any:
            with self._mode:
                return run(*args, **kwargs)

        return run_inside

    def _backward(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """Let what Python does during a backward pass, such as computing a checkpointed block again, be seen too."""

        def run_backward(*args: Any, **kwargs: Any) -> Any:
            self._mode.in_backward += 1
            try:
                with self._mode:
                    return run(*args, **kwargs)
            finally:
                self._mode.in_backward -= 1

        return run_backward


def _by_mark(group: Callable[..., Any]) -> Callable[..., Any]:
    """Name groups of tensors by the pretended device."""

    def grouped(lists: Any, *rest: Any) -> Any:
        found = {}
        for (device, dtype), members in group(lists, *rest).items():
            first = next((tensor for tensor in tensors_of(members)), None)
            found[device if first is None else device_of(first), dtype] = members
        return found

    return grouped


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None
