"""Describe how the networks of one model are run: device, precision, engine, offload, tiles. Settled here alone."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import nn

from latentdiff.devices import resolve_device, resolve_dtype
from latentdiff.engine.compiled import Compiled
from latentdiff.engine.engines import Eager, Engine
from latentdiff.engine.offload import Offload
from latentdiff.engine.openvino_engine import OpenVINO, computes_in, installed
from latentdiff.engine.recorded import Recorded
from latentdiff.errors import InputError, shown, suggest

__all__ = ["AUTO", "ENGINES", "Execution", "find_engine", "settle"]

AUTO = "auto"
ENGINES: dict[str, type[Engine]] = {
    "eager": Eager,
    "compile": Compiled,
    "graphs": Recorded,
    "openvino": OpenVINO,
}


@dataclass(frozen=True)
class Execution:
    """How the networks of a model are run.

    Attributes:
        device: where they run.
        dtype: precision they compute in; the arithmetic between their calls is float32.
        offload: moves networks from CPU memory to the device while they run; None where they are on it.
        tile_size: side of the tiles, in latents, of tiled decoding; None for tiles only where a decoder would need
            several gigabytes.
        engine: what runs U-Net and decoder.
    """

    device: torch.device
    dtype: torch.dtype
    offload: Offload | None = None
    tile_size: int | None = None
    engine: Engine = field(default_factory=Eager)

    def onload(self, *networks: nn.Module | None) -> AbstractContextManager[None]:
        """Return a context in which networks are on the device."""
        return nullcontext() if self.offload is None else self.offload.onload(*networks)


def settle(
    device: str | torch.device | None,
    dtype: str | torch.dtype | None,
    engine: str = "eager",
    *,
    offload: bool = False,
) -> Execution:
    """Return how networks are run, from what was asked for; see `Pipeline.from_pretrained`.

    Raises:
        InputError: there is no such device, dtype or engine, or these do not go together.
        MissingDependencyError: the engine is not installed.
    """
    place, kind = resolve_device(device), resolve_dtype(dtype)
    offloading = Offload(place) if offload else None
    return Execution(place, kind, offloading, engine=find_engine(engine, place, kind, offload=offload))


def find_engine(name: str, device: torch.device, dtype: torch.dtype, *, offload: bool = False) -> Engine:
    """Return the engine called `name`, one of `ENGINES`, or the one that "auto" stands for.

    That is OpenVINO on a CPU where it is installed and computes in the precision: there it is the fastest of all by
    `latentdiff bench`, once a network is converted. Everywhere else it is PyTorch as it is, which takes no time to
    begin.

    Raises:
        InputError, MissingDependencyError: see `settle`.
    """
    if not isinstance(name, str) or name not in (*ENGINES, AUTO):
        raise InputError(f"engine {shown(name)} is unknown{suggest(str(name), (*ENGINES, AUTO))}")
    if name == AUTO:
        name = "openvino" if device.type == "cpu" and not offload and installed() and computes_in(dtype) else "eager"
    if name == "eager":
        return Eager()
    if offload:
        raise InputError(f"engine {name!r} keeps networks where they run, got offload; leave out one of them")
    if name == "compile":
        return Compiled(device)
    if name == "graphs":
        if device.type != "cuda":
            raise InputError(f"engine 'graphs' is for NVIDIA GPUs, got {device.type}; leave it out")
        return Recorded()
    if device.type != "cpu":
        raise InputError(f"engine 'openvino' runs on a CPU, got {device.type}; use --device cpu or another engine")
    return OpenVINO(dtype)
