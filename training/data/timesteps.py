"""Draw training timesteps: uniform, more often in the middle, or more often where the loss is large."""

from __future__ import annotations

import torch
from torch import Tensor, nn

HISTORY = 10  # losses that are remembered of each timestep


def stratified_timesteps(count: int, num_train_timesteps: int, generator: torch.Generator) -> Tensor:
    """Draw one timestep from each of `count` equal strata, shuffled: uniform, with less variance in the loss.

    Returns:
        (count,) int64.

    Source: Kingma et al. 2021, arXiv 2107.00630, appendix I.1.
    """
    offsets = torch.rand((), generator=generator) + torch.randperm(count, generator=generator)
    return (offsets / count * num_train_timesteps).long().clamp_max(num_train_timesteps - 1)


def logit_normal_timesteps(count: int, num_train_timesteps: int, generator: torch.Generator) -> Tensor:
    """Draw timesteps whose place between first and last has a normally distributed logit: more in the middle.

    Returns:
        (count,) int64.

    Source: Esser et al. 2024, arXiv 2403.03206, Eq. 19, with location 0 and scale 1.
    """
    places = torch.sigmoid(torch.randn(count, generator=generator))
    return (places * num_train_timesteps).long().clamp_max(num_train_timesteps - 1)


class ImportanceSampler(nn.Module):
    """Draw timesteps in proportion to the root of their mean squared loss, once each has been seen often enough.

    Its memory is a buffer, so that a checkpoint of a run holds it.

    Source: Nichol & Dhariwal 2021, arXiv 2102.09672, Eq. 18.
    """

    def __init__(self, num_train_timesteps: int) -> None:
        super().__init__()
        self.register_buffer("losses", torch.zeros(num_train_timesteps, HISTORY))
        self.register_buffer("seen", torch.zeros(num_train_timesteps, dtype=torch.int64))
        self.losses: Tensor
        self.seen: Tensor

    def probabilities(self) -> Tensor:
        """Return how likely each timestep is drawn, (T,) float32: alike until all have been seen `HISTORY` times."""
        if (self.seen < HISTORY).any():
            return torch.full_like(self.losses[:, 0], 1 / len(self.losses))
        roots = self.losses.square().mean(dim=1).sqrt()
        # A thousandth of all draws is uniform, so that no timestep is lost for good.
        return 0.999 * roots / roots.sum() + 0.001 / len(roots)

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return timesteps (count,) int64 and the weights (count,) that make the weighted loss the uniform one's."""
        probabilities = self.probabilities()
        if (self.seen < HISTORY).any():
            timesteps = stratified_timesteps(count, len(probabilities), generator)
        else:
            timesteps = torch.multinomial(probabilities, count, replacement=True, generator=generator)
        return timesteps, 1 / (len(probabilities) * probabilities[timesteps])

    @torch.no_grad()
    def update(self, timesteps: Tensor, losses: Tensor) -> None:
        """Remember the losses (B,) of timesteps (B,); those that are not finite are forgotten."""
        for timestep, loss in zip(timesteps.tolist(), losses.tolist()):
            if loss == loss and abs(loss) != float("inf"):
                self.losses[timestep, self.seen[timestep] % HISTORY] = loss
                self.seen[timestep] += 1
