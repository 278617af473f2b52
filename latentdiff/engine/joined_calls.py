"""Join calls of a U-Net for several pictures, each at a timestep and with a text of its own, into one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from latentdiff.models.attention import KeyValue
from latentdiff.models.unet import PreparedUNet

__all__ = ["JoinedUNet", "text_shape"]


def text_shape(network: PreparedUNet) -> tuple[int, ...]:
    """Return the shape that the text of prepared networks must share to be joined; () for one that reads none."""
    first = next((block for transformer in network.texts for block in transformer), None)
    return () if first is None else tuple(first[0][0].shape[1:])


class JoinedUNet:
    """Several prepared networks of one U-Net as one.

    Args:
        networks: with texts of the same `text_shape`; of one alone nothing is copied.
    """

    def __init__(self, networks: Sequence[PreparedUNet]) -> None:
        self.networks = tuple(networks)
        first, shifts = networks[0], [network.shifts for network in networks]
        self._places = [0]  # where the rows of each begin in those of all
        for one in shifts:
            self._places.append(self._places[-1] + one.shape[0] * one.shape[1])
        masks = [network.mask for network in networks if network.mask is not None]
        self._network = first
        if len(networks) > 1:
            rows = torch.cat([one.flatten(0, 1) for one in shifts])[None]  # (1, R, sum C)
            texts = [
                [[_joined(alike) for alike in zip(*blocks)] for blocks in zip(*transformers)]
                for transformers in zip(*(network.texts for network in networks))
            ]
            self._network = PreparedUNet(first.unet, rows, texts, torch.cat(masks) if masks else None, first.predict)

    @torch.no_grad()
    def __call__(self, inputs: Sequence[Tensor], steps: Sequence[Tensor]) -> list[Tensor]:
        """Return the prediction (b, C_out, H, W) for each network.

        Args:
            inputs: for each network its sample (b, C_in, H, W).
            steps: for each network (b,), see `PreparedUNet`.
        """
        if len(self.networks) == 1:
            return [self._network(inputs[0], steps[0])]
        rows = []
        for network, place, own in zip(self.networks, self._places, steps):
            images, count = network.shifts.shape[:2]
            image = torch.arange(len(own), device=own.device) if images > 1 else torch.zeros_like(own)
            rows.append(place + image * count + own)
        outputs = self._network(torch.cat(list(inputs)), torch.cat(rows))
        return list(outputs.split([len(one) for one in inputs]))


def _joined(several: Sequence[KeyValue]) -> KeyValue:
    return torch.cat([keys for keys, _ in several]), torch.cat([values for _, values in several])
