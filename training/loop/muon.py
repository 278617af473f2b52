"""An optimizer whose steps of matrices have equal singular values; vectors, first and last layers take AdamW's."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from latentdiff.devices import supports_bfloat16

MOMENTUM = 0.95
# Of the odd polynomial that moves singular values towards 1, and how often it is applied.
COEFFICIENTS, ROUNDS = (3.4445, -4.7750, 2.0315), 5
# Root mean square of a step over the learning rate, about that of AdamW, so that its rates are good here.
SIZE = 0.2
OUTER = ("conv_in", "conv_out")  # of a U-Net or autoencoder: what it reads of latents or pictures, and writes


class Muon(Optimizer):
    """Muon for matrices and the kernels of convolutions, of a model, and AdamW for all else.

    Args:
        model: whose parameters are trained, those that are.
        learning_rate: of both.
        betas: of AdamW.
        weight_decay: of both, times the learning rate.

    Source: Jordan et al. 2024 (Muon: orthogonalised momentum by Newton-Schulz iterations); Liu et al. 2025, arXiv
    2502.16982, section 2.2 (steps as large as AdamW's).
    """

    def __init__(
        self, model: nn.Module, learning_rate: float, betas: tuple[float, float], weight_decay: float = 0.0
    ) -> None:
        outer = {id(table.weight) for table in model.modules() if isinstance(table, nn.Embedding)}
        named = [(name, one) for name, one in model.named_parameters() if one.requires_grad]
        outer |= {id(one) for name, one in named if name.split(".")[-2] in OUTER}
        self._matrices = {one for _, one in named if one.ndim > 1 and id(one) not in outer}
        super().__init__([one for _, one in named], {"lr": learning_rate, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Take a step along the gradients that there are."""
        for group in self.param_groups:
            trained = [one for one in group["params"] if one.grad is not None]
            for parameter in trained:
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
            self._step_matrices([one for one in trained if one in self._matrices], group["lr"])
            self._step_rest([one for one in trained if one not in self._matrices], group)

    def state_bytes(self) -> int:
        """Return how many bytes are kept once a step was taken; single numbers are left out."""
        trained = (one for group in self.param_groups for one in group["params"])
        return sum(4 * one.numel() * (1 if one in self._matrices else 2) for one in trained)

    def _step_matrices(self, parameters: list[nn.Parameter], rate: float) -> None:
        alike = defaultdict[torch.Size, list[nn.Parameter]](list)
        for parameter in parameters:
            alike[parameter.flatten(1).shape].append(parameter)
        for shape, some in alike.items():
            steps = torch.stack([self._momentum(one).flatten(1) for one in some])
            steps = orthogonal(steps).to(some[0].dtype) * (SIZE * max(shape) ** 0.5 * rate)
            for parameter, step in zip(some, steps):
                parameter.sub_(step.view_as(parameter))

    def _momentum(self, parameter: nn.Parameter) -> Tensor:
        slot, gradient = self.state[parameter], parameter.grad
        assert gradient is not None
        if not slot:
            slot["momentum"] = torch.zeros_like(parameter)
        slot["momentum"].lerp_(gradient, 1 - MOMENTUM)
        return gradient.lerp(slot["momentum"], MOMENTUM)

    def _step_rest(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        first, second = group["betas"]
        for parameter in parameters:
            slot, gradient = self.state[parameter], parameter.grad
            assert gradient is not None
            if not slot:
                slot |= {"step": 0, "exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
            slot["step"] += 1
            slot["exp_avg"].lerp_(gradient, 1 - first)
            slot["exp_avg_sq"].lerp_(gradient.square(), 1 - second)
            spread = (slot["exp_avg_sq"] / (1 - second ** slot["step"])).sqrt_().add_(1e-8)
            parameter.addcdiv_(slot["exp_avg"], spread, value=-group["lr"] / (1 - first ** slot["step"]))


def orthogonal(matrices: Tensor) -> Tensor:
    """Return about the nearest matrices with orthogonal rows or columns: singular values become 0.7 to 1.2.

    Args:
        matrices: (N, R, C).

    Source: Jordan et al. 2024, in bfloat16 where the device computes in it.
    """
    tall = matrices.shape[-2] > matrices.shape[-1]
    if supports_bfloat16(matrices.device):
        matrices = matrices.bfloat16()
    found = matrices.mT if tall else matrices
    found = found / (found.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    one, three, five = COEFFICIENTS
    for _ in range(ROUNDS):
        square = found @ found.mT
        found = torch.baddbmm(found, torch.baddbmm(square, square, square, beta=three, alpha=five), found, beta=one)
    return found.mT if tall else found
