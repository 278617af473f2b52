"""Describe how the networks of one model are run: device, precision, offload, tiles."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from latentdiff.engine.offload import Offload

__all__ = ["Execution"]


@dataclass(frozen=True)
class Execution:
    """How the networks of a model are run.

    Attributes:
        device: where they run.
        dtype: precision they compute in; the arithmetic between their calls is float32.
        offload: moves networks from CPU memory to the device while they run; None where they are on it.
        tile_size: side of the tiles, in latents, of tiled decoding; None for tiles only where a decoder would need
            several gigabytes.
    """

    device: torch.device
    dtype: torch.dtype
    offload: Offload | None = None
    tile_size: int | None = None

    def onload(self, *networks: nn.Module | None) -> AbstractContextManager[None]:
        """Return a context in which networks are on the device."""
        return nullcontext() if self.offload is None else self.offload.onload(*networks)
