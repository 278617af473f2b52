"""Low-rank adaptation (LoRA): two thin matrices for each layer, whose product changes its weight.

A network takes LoRAs as a copy of itself that shares every weight they leave alone. The original is never written to,
so taking them out again is going back to it.

Source: Hu et al. 2021, arXiv 2106.09685, section 4.1; of convolutions (LoCon): Yeh et al. 2023, arXiv 2309.14859.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from latentdiff.errors import ModelMismatchError, ModelValueError

__all__ = ["Factors", "LoRA", "NetworkT", "WeightedLoRA", "factors_fit", "layers_of", "merge", "share_weights"]

NetworkT = TypeVar("NetworkT", bound=nn.Module)


@dataclass(frozen=True)
class Factors:
    """What is added to the weight (O, I), or (O, I, h, w) of a convolution, of one layer: alpha / rank * up @ down.

    Attributes:
        down: (rank, I), or (rank, I, h, w); (rank, I, 1, 1) beside `mid`.
        up: (O, rank), or (O, rank, 1, 1).
        alpha: what the product is scaled by, times the rank.
        mid: (rank, rank, h, w) of a convolution in Tucker form, between the two; None otherwise.
    """

    down: Tensor
    up: Tensor
    alpha: float
    mid: Tensor | None = None

    @property
    def rank(self) -> int:
        """How many rows `down` has."""
        return self.down.shape[0]

    def change(self) -> Tensor:
        """Return what is added to the weight, in float32: (O, I * h * w), or (O, I, h, w) in Tucker form."""
        down, up = self.down.float().flatten(1), self.up.float().flatten(1)
        product = up @ down if self.mid is None else torch.einsum("or,rskl,si->oikl", up, self.mid.float(), down)
        return product * (self.alpha / self.rank)

    def fit(self, weight: tuple[int, ...]) -> bool:
        """Say whether they change a weight of this shape."""
        mid = None if self.mid is None else tuple(self.mid.shape)
        return factors_fit(weight, tuple(self.down.shape), tuple(self.up.shape), mid)


@dataclass(frozen=True, eq=False)
class LoRA:
    """Factors for some layers of the networks of a model.

    Attributes:
        networks: "unet", "text_encoder" or "text_encoder_2" -> name of a layer -> its factors.
        path: the file they were read from, "" for none.
        hash: SHA-256 of that file.
        defaults: of generation options, where it was trained for others than its model has; see
            `checkpoints.generation_config`.
    """

    networks: Mapping[str, Mapping[str, Factors]]
    path: str = ""
    hash: str = ""
    defaults: Mapping[str, Any] = field(default_factory=dict)


class WeightedLoRA(NamedTuple):
    """A LoRA in a model, and how much of it is in the U-Net and in the text encoders."""

    lora: LoRA
    unet: float
    text: float

    def record(self) -> dict[str, Any]:
        """Return, JSON-ready, what finds it again; the weight is one number where both are the same."""
        weight = self.unet if self.unet == self.text else [self.unet, self.text]
        return {"path": self.lora.path or None, "hash": self.lora.hash, "weight": weight}


def layers_of(network: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """Return the layers of a network that a LoRA can change, by name."""
    return {name: layer for name, layer in network.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d))}


def factors_fit(
    weight: tuple[int, ...], down: tuple[int, ...], up: tuple[int, ...], mid: tuple[int, ...] | None = None
) -> bool:
    """Say whether factors of these shapes change a weight of that shape; axes of length one at the end do not count."""
    rank, kernel = down[:1], weight[2:]
    if rank < (1,) or _matrix(up) != (*weight[:1], *rank):
        return False
    if mid is None:
        return _matrix(down) == (*rank, *_matrix(weight)[1:])
    return len(weight) == 4 and _matrix(down) == (*rank, weight[1]) and mid == (*rank, *rank, *kernel)


def _matrix(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[:2] if all(length == 1 for length in shape[2:]) else shape


def share_weights(network: NetworkT) -> NetworkT:
    """Return a copy of a network whose weights lie in the same memory until one of both is moved, cast or merged."""
    memory: dict[int, Any] = {id(p): nn.Parameter(p.detach(), p.requires_grad) for p in network.parameters()}
    memory |= {id(buffer): buffer.detach() for buffer in network.buffers()}
    return copy.deepcopy(network, memory)


@torch.no_grad()
def merge(network: NetworkT, changes: Sequence[tuple[Mapping[str, Factors], float]]) -> NetworkT:
    """Return a copy of a network with changes in its weights, which are summed in float32; it shares all others.

    Args:
        network: stays as it is.
        changes: factors by name of the layer, and by what they are multiplied; 0 leaves them out.

    Raises:
        ModelMismatchError: there is no such layer, or it has another shape.
        ModelValueError: a changed weight is not finite in the dtype of the network.
    """
    merged = share_weights(network)
    layers, changes = layers_of(merged), [change for change in changes if change[1]]
    for name in dict.fromkeys(name for factors, _ in changes for name in factors):
        own = [(factors[name], scale) for factors, scale in changes if name in factors]
        layer = layers.get(name)
        if layer is None or not all(factors.fit(tuple(layer.weight.shape)) for factors, _ in own):
            raise ModelMismatchError(f"a LoRA changes layer {name}, which this model has not or in another shape")
        weight = layer.weight.float()
        for factors, scale in own:
            weight = weight + scale * factors.change().to(weight.device).view_as(weight)
        weight = weight.to(layer.weight.dtype)
        if not torch.isfinite(weight).all():
            raise ModelValueError(f"{name} is not finite in {weight.dtype} with its LoRAs; give them smaller weights")
        layer.weight = nn.Parameter(weight, layer.weight.requires_grad)
    return merged
