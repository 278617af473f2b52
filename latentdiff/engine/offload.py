"""Offload networks to CPU memory and move each to the device only while it runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock

import torch
from torch import nn

from latentdiff.errors import InputError

__all__ = ["Offload"]


class Offload:
    """The device that networks are moved to while they run, those of one thread at a time.

    Args:
        device: apart from the CPU.

    Raises:
        InputError: the device is the CPU.
    """

    def __init__(self, device: torch.device) -> None:
        if device.type == "cpu":
            raise InputError("offload needs a device apart from the CPU, got cpu; leave it out")
        self.device = device
        self._lock = RLock()  # a callback may draw too
        self._onloaded = list[nn.Module]()

    @contextmanager
    def onload(self, *networks: nn.Module | None) -> Iterator[None]:
        """Have networks on the device inside the block, and in CPU memory after it, whatever it raised.

        One that is there already, because an outer block has it, stays until that ends.
        """
        with self._lock:
            moved = [network for network in networks if network is not None and network not in self._onloaded]
            homes: list[_Home] = []
            self._onloaded += moved
            try:
                for network in moved:
                    homes.append(_Home(network))
                    network.to(self.device)
                yield
            finally:
                for home in homes:
                    home.restore()
                for network in moved:
                    self._onloaded.remove(network)


class _Home:
    """The tensors of a network in CPU memory, which those of another, or a file that is mapped, may share."""

    def __init__(self, network: nn.Module) -> None:
        modules = list(network.modules())
        self.parameters = [(parameter, parameter.data) for parameter in network.parameters()]
        self.buffers = [(module, name, buffer) for module in modules for name, buffer in module._buffers.items()]

    def restore(self) -> None:
        """Put them back into the network, which has not changed since: nothing is copied."""
        for parameter, tensor in self.parameters:
            parameter.data = tensor
        for module, name, buffer in self.buffers:
            module._buffers[name] = buffer
