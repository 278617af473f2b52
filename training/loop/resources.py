"""Estimate the memory and disk of a run before its first step."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from latentdiff.devices import memory_of
from latentdiff.errors import InputError, ModelLoadError, StorageError

from ..config import RunConfig
from .checkpointing import checkpoint_folders
from .optimizers import state_bytes
from .posthoc_ema import STORED
from .sharding import own
from .state import RunState

LEAST_BYTES = 12  # of a weight, its gradient and its average, in float32


@dataclass(frozen=True)
class Memory:
    """What a run keeps in memory, in bytes; and how much the device has.

    Attributes:
        trained, parameters: how many numbers are trained, of how many in all.
        activations: about how much a micro-step keeps for its backward pass, 0 where that is not known.
    """

    trained: int
    parameters: int
    weights: int
    gradients: int
    optimizer: int
    average: int
    there: int
    activations: int = 0

    @property
    def needed(self) -> int:
        """Return the sum, less activations."""
        return self.weights + self.gradients + self.optimizer + self.average

    def __str__(self) -> str:
        parts = (self.weights, self.gradients, self.optimizer, self.average)
        return "{} weights + {} + {} + {}".format(*map(readable, parts))


@dataclass(frozen=True)
class Disk:
    """What the checkpoints and snapshots of a run take that are still to come, in bytes, and how much is free."""

    checkpoint: int
    count: int
    free: int
    snapshot: int = 0
    snapshots: int = 0

    @property
    def needed(self) -> int:
        """Return what all of them take."""
        return self.count * self.checkpoint + self.snapshots * self.snapshot

    def __str__(self) -> str:
        more = f" and {self.snapshots} snapshots of {readable(self.snapshot)}" if self.snapshots else ""
        return f"{self.count} checkpoints of {readable(self.checkpoint)}{more}"


def require_small_enough(build: Callable[[], nn.Module], device: torch.device, processes: int = 1) -> None:
    """See that a network can be built and its training fits into memory, before anything else is done.

    Args:
        build: makes the network, here without weights.
        processes: that share it out.

    Raises:
        InputError: its values do not fit together, or it is too large.
    """
    try:
        with torch.device("meta"):
            network = build()
    except ModelLoadError as error:
        raise InputError(f"model: {error}") from error
    count, there = sum(parameter.numel() for parameter in network.parameters()), memory_of(device)
    if LEAST_BYTES * count > processes * there:
        raise InputError(
            f"model has {count:,} weights, which take at least {readable(LEAST_BYTES * count)} to train, and there are "
            f"{readable(there)}; make it smaller"
        )


def require_room(
    run: RunConfig, state: RunState, networks: Sequence[nn.Module], device: torch.device, activations: int
) -> None:
    """See that there is memory and disk for a run; see `estimate_memory` and `estimate_disk`."""
    estimate_memory(state, networks, device, activations)
    estimate_disk(run, state)


def estimate_memory(state: RunState, networks: Sequence[nn.Module], device: torch.device, activations: int) -> Memory:
    """Return what weights, gradients, optimizers, average and activations take.

    Args:
        networks: everything that is on the device while training.
        activations: see `Memory`.

    Raises:
        InputError: that is more than the device has.
    """
    parameters = {id(one): one for network in networks for one in network.parameters()}.values()
    groups = [group for optimizer in state.optimizers.values() for group in optimizer.param_groups]
    learnt = [parameter for group in groups for parameter in group["params"]]
    averages = state.averages().values()
    memory = Memory(
        trained=sum(parameter.numel() for parameter in learnt),
        parameters=sum(parameter.numel() for parameter in parameters),
        weights=sum(own(parameter).nbytes for parameter in parameters),
        gradients=sum(own(parameter).nbytes for parameter in learnt),
        optimizer=sum(map(state_bytes, state.optimizers.values())),
        average=sum(own(weight).nbytes for average in averages for weight in average.weights.values()),
        there=memory_of(device),
        activations=activations,
    )
    if memory.needed > memory.there:
        raise InputError(
            f"training needs {readable(memory.needed)} ({memory}: gradients, optimizer, average) and activations, and "
            f"there are {readable(memory.there)}; train a smaller model, with another optimizer.kind, or a lora"
        )
    if memory.needed + activations > memory.there:
        raise InputError(
            f"a step keeps about {readable(activations)} for its backward pass, besides {readable(memory.needed)}, and "
            f"there are {readable(memory.there)}; lower run.batch_size or data.size, raise run.accumulation, or set "
            "run.gradient_checkpointing"
        )
    return memory


def estimate_disk(run: RunConfig, state: RunState) -> Disk:
    """Return what the checkpoints take that the run folder does not have yet.

    Raises:
        StorageError: that is more than is free.
    """
    tensors = [tensor for module in state.modules.values() for tensor in module.state_dict().values()]
    tensors += [weight for average in state.averages().values() for weight in average.weights.values()]
    size = sum(tensor.nbytes for tensor in tensors) + sum(map(state_bytes, state.optimizers.values()))
    place = Path(run.out).resolve()
    have = len(checkpoint_folders(place))
    while not place.exists():
        place = place.parent
    count = max(1, run.keep_checkpoints + 1 - have)  # old ones go when a new one is there
    averaged = sum(weight.numel() for weight in state.ema.weights.values())
    coming = math.ceil(run.steps / run.ema_snapshots) if state.profiles else 0
    disk = Disk(size, count, shutil.disk_usage(place).free, averaged * len(state.profiles) * STORED.itemsize, coming)
    if disk.needed > disk.free:
        raise StorageError(
            f"{disk} need {readable(disk.needed)}, and {place} has {readable(disk.free)} free; free some, or lower "
            "run.keep_checkpoints"
        )
    return disk


def readable(count: float) -> str:
    """Return a number of bytes as text."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
