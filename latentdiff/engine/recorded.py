"""Run networks on a GPU as graphs of kernels: a call is recorded once and then started as a whole.

Starting kernels one by one takes a CPU longer than a GPU takes for the small ones; of large ones nothing is gained. So
each shape is measured both ways when it is first called, and what is not faster, or not the same to the bit, is run as
it is.
"""

from __future__ import annotations

import statistics
import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from threading import RLock
from typing import Any

import torch
from torch import Tensor, nn

from latentdiff.devices import Recorder, record_kernels, release_freed_memory, timed
from latentdiff.engine.engines import GraphEngine
from latentdiff.engine.graphs import graph_of
from latentdiff.models.autoencoder import AutoencoderKL
from latentdiff.models.unet import UNet2DConditionModel

__all__ = ["Recorded", "Recordings"]

KEPT = 16  # shapes of a network that are recorded; the one that was used longest ago goes first
GAIN = 1.03  # by which a recording has to be faster
ROUNDS = 5  # of the measurement


class Recorded(GraphEngine):
    """CUDA graphs of the U-Net and the decoder, each for a shape of its own; weights are read where they lie."""

    name = "graphs"
    recorded_as = "eager"

    def __init__(self, record: Recorder = record_kernels) -> None:
        super().__init__()
        self._record = record

    def _runner(self, network: UNet2DConditionModel | AutoencoderKL) -> Callable[..., Tensor]:
        return Recordings(graph_of(network), self._record)


@dataclass
class Recording:
    """A call that was recorded.

    Attributes:
        inputs: that it reads.
        replay: starts it.
        output: that it writes.
        given: what was copied into `inputs` last, with its version, so that texts are not copied at each step.
    """

    inputs: tuple[Tensor, ...]
    replay: Callable[[], None]
    output: Tensor
    given: list[tuple[Tensor, int] | None]

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Return a new tensor."""
        for number, (own, one) in enumerate(zip(self.inputs, inputs)):
            last = self.given[number]
            if last is None or last[0] is not one or last[1] != one._version:
                own.copy_(one)
                self.given[number] = one, one._version
        self.replay()
        return self.output.clone()


class Recordings:
    """The recordings of a network, by the shapes of its inputs; threads may share them.

    Args:
        graph: takes tensors and returns one.
        record: see `devices.record_kernels`.
    """

    def __init__(self, graph: nn.Module, record: Recorder) -> None:
        self._graph, self._record, self._lock = graph, record, RLock()
        self._kept = OrderedDict[tuple[Any, ...], Recording | None]()  # None where it is no gain

    @torch.no_grad()
    def __call__(self, *inputs: Tensor) -> Tensor:
        """Return what the network gives."""
        shape = tuple((tensor.shape, tensor.dtype, tensor.stride()) for tensor in inputs)
        with self._lock:  # for the whole call, as a recording has its inputs and output to itself
            if shape not in self._kept:
                self._kept[shape] = self._recorded(inputs)
                if len(self._kept) > KEPT:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(shape)
            recording = self._kept[shape]
            if recording is not None:
                return recording(*inputs)
        return self._graph(*inputs)

    def _recorded(self, inputs: tuple[Tensor, ...]) -> Recording | None:
        """Record a call; None where it cannot be, is no faster, or computes something else."""
        own, device = tuple(torch.empty_like(one).copy_(one) for one in inputs), inputs[0].device
        try:
            recording = Recording(own, *self._record(lambda: self._graph(*own), device), [None] * len(own))
            if not torch.equal(recording(*inputs), self._graph(*inputs)):
                return None
            ways = (lambda: self._graph(*inputs)), (lambda: recording(*inputs))
            plain, replayed = (statistics.median(timed(way, device) for _ in range(ROUNDS)) for way in ways)
        except RuntimeError as error:  # too little memory is one
            reason = " ".join(str(error).split())[:200]
            size = "x".join(map(str, inputs[0].shape))
            warnings.warn(f"a network for inputs of {size} runs without a graph: {reason}", stacklevel=2)
            release_freed_memory()
            return None
        return recording if plain > GAIN * replayed else None
