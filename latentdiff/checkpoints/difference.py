"""Compute and apply the difference between the weights of two networks.

A difference is a safetensors file. For the weight of a layer that both networks have in one shape it may hold LoRA
factors, `LAYER.lora_down.weight` and `LAYER.lora_up.weight`, whose product is added to the base's weight; whatever else
differs is there whole, under its own name, such as the weight of an input layer that has more channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from latentdiff.checkpoints.header import TensorInfo
from latentdiff.checkpoints.weights import FLOATS, read_weights
from latentdiff.errors import ModelMismatchError
from latentdiff.models.lora import Factors, NetworkT, factors_fit, layers_of, merge

__all__ = ["DOWN", "UP", "apply_difference", "difference"]

DOWN, UP = ".lora_down.weight", ".lora_up.weight"
NAMED = 5  # tensors in an error


@torch.no_grad()
def difference(base: nn.Module, variant: nn.Module, rank: int) -> dict[str, Tensor]:
    """Return the tensors of a file that makes of one network another, all but exactly.

    Args:
        base: stays as it is.
        variant: may have other layers, and layers of other shapes.
        rank: of the factors; a weight that they would need more numbers for than it has is kept whole.

    Returns:
        Tensors in float32; none for weights in which the two are equal.

    Source: Eckart and Young 1936 (a truncated singular value decomposition is the nearest matrix of its rank).
    """
    theirs, layers, tensors = base.state_dict(), layers_of(variant), dict[str, Tensor]()
    for name, tensor in variant.state_dict().items():
        layer, before = name.removesuffix(".weight"), theirs.get(name)
        if before is not None and torch.equal(tensor.float(), before.float()):
            continue
        if before is None or before.shape != tensor.shape or layer not in layers:
            tensors[name] = tensor.float()
            continue
        change = (tensor.double() - before.double()).flatten(1)  # (O, I * h * w)
        if rank * sum(change.shape) >= change.numel():
            tensors[name] = tensor.float()
            continue
        up, values, down = torch.linalg.svd(change, full_matrices=False)
        scale, ones = values[:rank].sqrt(), (1,) * (tensor.ndim - 2)
        tensors[layer + DOWN] = (scale[:, None] * down[:rank]).float().reshape(rank, *tensor.shape[1:])
        tensors[layer + UP] = (up[:, :rank] * scale).float().reshape(-1, rank, *ones)
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def apply_difference(file: Path, tensors: Mapping[str, TensorInfo], base: nn.Module, network: NetworkT) -> NetworkT:
    """Return a network whose weights are those of another, with a difference; it shares all that are the same.

    Args:
        file: of the difference.
        tensors: of its header.
        base: the other network; stays as it is.
        network: of the wanted shape, without memory.

    Raises:
        ModelMismatchError: a name or shape fits neither network, or the difference lacks something.
        ModelValueError: a weight is not finite.
    """
    theirs, wanted = base.state_dict(), {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    shared = {name: tensor for name, tensor in theirs.items() if wanted.get(name) == tuple(tensor.shape)}
    halves = {name for name in tensors if name.endswith((DOWN, UP))}
    wrong = _wrong_factors(tensors, halves, {name: wanted[name] for name in shared}, layers_of(network))
    for name in sorted(tensors.keys() - halves):
        info = tensors[name]
        if info.shape != wanted.get(name) or info.dtype not in FLOATS:
            wrong.append(f"{name[:100]} is {info.dtype} {list(info.shape)} instead of {wanted.get(name, 'absent')}")
    wrong += [f"{name} is missing" for name in sorted(wanted.keys() - shared.keys() - tensors.keys())]
    if wrong:
        more = f" and {len(wrong) - NAMED} more" if len(wrong) > NAMED else ""
        raise ModelMismatchError(f"{file}: {'; '.join(wrong[:NAMED])}{more}")
    like = next(base.parameters())
    whole = read_weights(file, {n: i for n, i in tensors.items() if n not in halves}, like.dtype, like.device)
    network.load_state_dict({**shared, **whole}, strict=True, assign=True)
    held = read_weights(file, {name: tensors[name] for name in halves}, torch.float32, like.device)
    layers = sorted(name.removesuffix(DOWN) for name in halves if name.endswith(DOWN))
    factors = {name: Factors(held[name + DOWN], held[name + UP], float(len(held[name + DOWN]))) for name in layers}
    return merge(network, [(factors, 1.0)])


def _wrong_factors(
    tensors: Mapping[str, TensorInfo],
    halves: set[str],
    shared: Mapping[str, tuple[int, ...]],
    layers: Mapping[str, nn.Module],
) -> list[str]:
    """Return what is wrong with the factors among some tensors, whose names end as those of factors do."""
    wrong = []
    for layer in sorted({name.removesuffix(DOWN).removesuffix(UP) for name in halves}):
        down, up, weight = tensors.get(layer + DOWN), tensors.get(layer + UP), shared.get(f"{layer}.weight")
        if weight is None or layer not in layers or f"{layer}.weight" in tensors:
            wrong.append(f"{layer[:100]} is no layer that both networks have, or it is there whole too")
        elif down is None or up is None:
            wrong.append(f"{layer} has one of its two factors")
        elif not {down.dtype, up.dtype} <= FLOATS.keys() or not factors_fit(weight, down.shape, up.shape):
            shapes = f"{down.dtype} {list(down.shape)} and {up.dtype} {list(up.shape)}"
            wrong.append(f"the factors of {layer}, {shapes}, make no change of {list(weight)}")
    return wrong
