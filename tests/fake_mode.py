"""What a device refuses and what it waits for, by the function of torch that is called; see `tests/fake_device.py`."""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch.overrides import TorchFunctionMode

__all__ = ["DeviceMode", "device_of", "tensors_of"]

ROOT = Path(__file__).resolve().parent.parent
HERE = (__file__, str(Path(__file__).with_name("fake_device.py")))
WIDE = (torch.float64, torch.complex128)  # which "mps" has not

# What waits for the device, because its result, or the size of that, is needed on the CPU.
SYNCS = {"item", "tolist", "__bool__", "__float__", "__int__", "__index__", "__complex__", "__contains__"}
SYNCS |= {"__repr__", "__format__", "is_nonzero", "equal", "allclose", "nonzero", "argwhere", "masked_select"}
SYNCS |= {"unique", "unique_consecutive", "bincount"}
# What takes tensors of several devices, or arguments that it does not compute with.
MIXED = {"__deepcopy__", "_foreach_copy_", "_has_compatible_shallow_copy_type", "backward", "broadcast_tensors", "grad"}
MIXED |= {"__set__", "is_same_size", "result_type", "set_"}
JOINED = {"cat", "concat", "concatenate", "stack", "hstack", "vstack"}  # take no number from the CPU, as others do
MAKERS = {"tensor", "as_tensor", "asarray"}
# What is known of a tensor wherever it is, asked often: answered at once.
KNOWN = {"shape", "dtype", "layout", "ndim", "nbytes", "itemsize", "is_meta", "is_leaf", "requires_grad", "grad_fn"}
KNOWN_CALLS = {"untyped_storage", "_set_grad_enabled", "is_floating_point", "numel", "is_contiguous", "data_ptr"}
KNOWN_CALLS |= {"size", "dim", "stride", "element_size", "is_complex", "requires_grad_"}


class DeviceMode(TorchFunctionMode):
    """Every call of a torch function, by the rules of a device.

    Attributes:
        device: of its tensors.
        syncs, copies: see `tests.fake_device.FakeDevice`.
        in_backward: how many backward passes are running; gradients, which C++ makes, are on no device there.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.syncs: Counter[str] = Counter()
        self.copies: Counter[str] = Counter()
        self.in_backward = 0
        self.methods: dict[str, Callable[..., Any]] = dict.fromkeys(MAKERS, self._make)
        self.methods |= {"to": self._to, "cpu": self._cpu, "cuda": self._cuda, "type_as": self._type_as}
        self.methods |= {"__get__": self._read, "numpy": self._numpy, "__array__": self._numpy, "copy_": self._copy}
        self.methods |= {"pin_memory": self._pin, "is_pinned": self._is_pinned, "get_device": self._number}
        self.methods |= {"__getitem__": self._get_item, "__setitem__": self._set_item}

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.__name__
        if name in KNOWN_CALLS or (name == "__get__" and func.__self__.__name__ in KNOWN):
            return func(*args, **(kwargs or {}))
        return self.methods.get(name, self._call)(func, *args, **(kwargs or {}))

    def _call(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        name, tensors = func.__name__, tensors_of((args, kwargs))
        others = [tensor for tensor in tensors if _mark(tensor) is None]
        held = len(others) < len(tensors)
        asked = self._asked(kwargs.get("device"))
        target = asked or (self.device if held and kwargs.get("device") is None else None)
        if target is not None and getattr(kwargs.get("generator"), "device", target).type == "cpu":
            raise RuntimeError(f"Expected a '{target.type}' device type for generator but found 'cpu' in {name}")
        if held and asked is None and name not in MIXED and not self.in_backward:
            for tensor in others:
                if tensor.device.type == "cpu" and (tensor.ndim or name in JOINED):
                    raise RuntimeError(f"Expected all tensors on one device, got {target} and cpu in {name}")
        if held and self.device.type == "mps" and name == "batch_norm" and len({x.dtype for x in tensors}) > 1:
            raise RuntimeError("MPS does not normalise half precision by statistics in float32")
        if held and (name in SYNCS or _counts(name, args, kwargs)):
            self.wait(name)
        if asked is not None:
            kwargs["device"] = "cpu"
        if name == "new_tensor" and target is not None:
            self.send(name)
        pinned = kwargs.pop("pin_memory", False)
        made = self._on(target, func(*args, **kwargs), tensors)
        return _pinned(made) if pinned else made

    def _on(self, target: torch.device | None, result: Any, given: Sequence[Tensor] = ()) -> Any:
        """Return what a function made, on a device; what it was given keeps its own."""
        if target is None:
            return result
        kept = {storage._cdata for tensor in given if (storage := _storage(tensor)) is not None}
        for tensor in tensors_of(result):
            storage = _storage(tensor)
            if storage is None or storage._cdata in kept:
                continue
            if target.type == "mps" and tensor.dtype in WIDE:
                raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't have it")
            storage.logical_device = target  # type: ignore[attr-defined]
        return result

    def wait(self, what: str) -> None:
        """Count that the CPU waits for the device."""
        self.syncs[f"{what} {_caller()}"] += 1

    def send(self, what: str) -> None:
        """Count that something is sent to the device."""
        self.copies[f"{what} {_caller()}"] += 1

    def _asked(self, device: Any) -> torch.device | None:
        """Return this device if that is what was asked for."""
        if device is None:
            return None
        found = torch.device(self.device.type, device) if isinstance(device, int) else torch.device(device)
        if found.type == self.device.type and found.index:
            raise RuntimeError(f"invalid device ordinal: {found}")
        return self.device if found.type == self.device.type else None

    def _read(self, func: Any, tensor: Tensor, *rest: Any) -> Any:
        name, mark = func.__self__.__name__, _mark(tensor)
        if mark is None:
            return func(tensor, *rest)
        if name == "device":
            return mark
        if name in ("is_cuda", "is_mps", "is_cpu"):
            return mark.type == name[3:]
        return self._on(mark, func(tensor, *rest), [tensor])

    def _to(self, func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        if isinstance(kwargs.get("other"), Tensor):
            args = (kwargs.pop("other"), *args)
        if args and isinstance(args[0], Tensor):
            args = (device_of(args[0]), args[0].dtype, *args[1:])
        names = ("dtype", "non_blocking", "copy") if args and isinstance(args[0], torch.dtype) else ()
        options = {**kwargs, **dict(zip(names or ("device", "dtype", "non_blocking", "copy"), args))}
        mark, device = _mark(tensor), options.get("device")
        target = mark if device is None else self._asked(device)
        if mark is None and target is None:
            return func(tensor, **options)
        self._check_wait(tensor, mark, target, options.get("non_blocking", False))
        if mark != target:
            options["copy"] = True
            self.wait("to") if target is None else self.send("to")
        if device is None or target is not None:
            options["device"] = "cpu"
        return self._on(target, func(tensor, **options), [tensor])

    def _check_wait(self, tensor: Tensor, mark: Any, target: Any, non_blocking: bool) -> None:
        if not non_blocking or mark == target:
            return
        if target is None:
            raise RuntimeError("a non_blocking copy to the CPU may be read before it is there")
        if target.type == "mps" and not getattr(_storage(tensor), "logical_pinned", False):
            raise RuntimeError("a non_blocking copy from memory that is not pinned may read freed memory")

    def _cpu(self, func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self._to(Tensor.to, tensor, "cpu", **kwargs)

    def _cuda(self, func: Any, tensor: Tensor, device: Any = "cuda", non_blocking: bool = False) -> Tensor:
        return self._to(Tensor.to, tensor, device, non_blocking=non_blocking)

    def _type_as(self, func: Any, tensor: Tensor, other: Tensor) -> Tensor:
        return self._to(Tensor.to, tensor, other)

    def _copy(self, func: Any, tensor: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        mark, target = _mark(source), _mark(tensor)
        self._check_wait(source, mark, target, non_blocking)
        if mark != target and not self.in_backward:
            self.wait("copy_") if target is None else self.send("copy_")
        return func(tensor, source, non_blocking)

    def _numpy(self, func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        if (mark := _mark(tensor)) is not None:
            raise TypeError(f"can't convert {mark} device type tensor to numpy. Use Tensor.cpu() first")
        return func(tensor, *args, **kwargs)

    def _number(self, func: Any, tensor: Tensor) -> int:
        return func(tensor) if _mark(tensor) is None else 0

    def _pin(self, func: Any, tensor: Tensor, *args: Any) -> Tensor:
        return _pinned(tensor.clone())

    def _is_pinned(self, func: Any, tensor: Tensor, *args: Any) -> bool:
        return getattr(_storage(tensor), "logical_pinned", False)

    def _make(self, func: Any, data: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Make a tensor of numbers, or of others."""
        alone = isinstance(data, Tensor)
        mark = _mark(data) if alone else None
        target = self._asked(kwargs.get("device")) if kwargs.get("device") is not None else mark
        if not alone and any(_mark(tensor) is not None for tensor in tensors_of(data)):
            self.wait(func.__name__)
        if mark != target:
            self.wait(func.__name__) if target is None else self.send(func.__name__)
        if target is not None:
            kwargs["device"] = "cpu"
        made = func(data, *args, **kwargs)
        return self._on(target, made.clone() if mark != target else made, [data] if alone else [])

    def _get_item(self, func: Any, tensor: Tensor, index: Any) -> Tensor:
        mark = _mark(tensor)
        self._check_index(mark, index, masked="wait")
        return self._on(mark, func(tensor, index), [tensor])

    def _set_item(self, func: Any, tensor: Tensor, index: Any, value: Any) -> None:
        mark = _mark(tensor)
        self._check_index(mark, index, masked="wait" if isinstance(value, Tensor) and value.numel() > 1 else "fill")
        if isinstance(value, Tensor) and value.ndim and _mark(value) != mark:
            self.wait("__setitem__") if mark is None else self.send("__setitem__")
        func(tensor, index, value)

    def _check_index(self, mark: torch.device | None, index: Any, masked: str) -> None:
        places = tensors_of(index)
        held = [place for place in places if _mark(place) is not None]
        if mark is None and any(place.ndim for place in held):
            raise RuntimeError(f"indices should be on the CPU, as what they are for, got {self.device}")
        numbers = [place for place in held if not place.ndim]
        masks = [place for place in places if place.dtype in (torch.bool, torch.uint8) and masked == "wait"]
        if numbers or (mark is not None and masks):
            self.wait("index")
        parts = index if isinstance(index, tuple) else (index,)
        listed = any(isinstance(part, list) for part in parts)
        if mark is not None and (listed or any(place.ndim and _mark(place) is None for place in places)):
            self.send("index")


def _counts(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Say whether a function must know on the CPU how many of something there are."""
    if name == "where":
        return len(args) + len(kwargs) == 1
    repeats = args[1] if len(args) > 1 else kwargs.get("repeats")
    return name == "repeat_interleave" and isinstance(repeats, Tensor) and kwargs.get("output_size") is None


def _storage(tensor: Tensor) -> UntypedStorage | None:
    """Return where the numbers of a tensor are; None for those without, such as wrappers of torch.func."""
    try:
        with torch._C.DisableTorchFunction():
            return tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):
        return None


def _pinned(tensor: Tensor) -> Tensor:
    tensor.untyped_storage().logical_pinned = True  # type: ignore[attr-defined]
    return tensor


def _mark(tensor: Tensor) -> torch.device | None:
    """Return the pretended device of a tensor, None for a real one."""
    return getattr(_storage(tensor), "logical_device", None)


def device_of(tensor: Tensor) -> torch.device:
    """Return where a tensor is, by the pretence."""
    return _mark(tensor) or tensor.device


def tensors_of(tree: Any) -> list[Tensor]:
    """Return the tensors in lists, tuples, slices and dictionaries, in order."""
    found, rest = [], [tree]
    while rest:
        one = rest.pop()
        if isinstance(one, Tensor):
            found.append(one)
        elif isinstance(one, (list, tuple)):
            rest.extend(reversed(one))
        elif isinstance(one, dict):
            rest.extend(reversed(one.values()))
        elif isinstance(one, slice):
            rest += [one.step, one.stop, one.start]
    return found


def _caller() -> str:
    """Return the nearest line of this project that is being run, outside this file."""
    for frame, line in traceback.walk_stack(None):
        file = frame.f_code.co_filename
        if file.startswith(str(ROOT)) and file not in HERE and "site-packages" not in file:
            return f"{Path(file).relative_to(ROOT).as_posix()}:{line}"
    return "elsewhere"
