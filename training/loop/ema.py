"""Exponential moving average of a model's weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Ema:
    """Hold the average beside the live weights, in float32.

    The decay warms up as min(decay, (1 + n) / (10 + n)) after n updates, so that early averages forget the start.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.weights = {name: p.detach().float().clone() for name, p in model.named_parameters()}

    def to(self, device: torch.device) -> None:
        """Move the average to a device."""
        self.weights = {name: weight.to(device) for name, weight in self.weights.items()}

    def next_decay(self) -> float:
        """Return the share of the average in the next one."""
        return min(self.decay, (1 + self.updates) / (10 + self.updates))

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average towards the live weights."""
        decay = self.next_decay()
        self.updates += 1
        parameters = dict(model.named_parameters())
        live = [parameters[name].detach().float() for name in self.weights]
        torch._foreach_lerp_(list(self.weights.values()), live, 1 - decay)

    @contextmanager
    def swapped_into(self, model: nn.Module) -> Iterator[None]:
        """Put the average into the model, in evaluation mode, for a `with` block; live weights come back after it."""
        training = model.training
        live = {name: p.detach().clone() for name, p in model.named_parameters()}
        self._copy(self.weights, model.eval())
        try:
            yield
        finally:
            self._copy(live, model.train(training))

    @staticmethod
    @torch.no_grad()
    def _copy(weights: dict[str, Tensor], model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
