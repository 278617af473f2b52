"""Estimate what a training step keeps for its backward pass, from shapes alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from ..config import RunConfig
from .distributed import own_shares
from .sharding import shards_weights

__all__ = ["activation_bytes", "kept_by_step"]


def kept_by_step(accelerator: Accelerator, run: RunConfig, network: nn.Module, *inputs: Tensor, **options: Any) -> int:
    """Return about how many bytes a micro-step keeps for its backward pass; 0 where that is not known.

    Args:
        network: not prepared by the accelerator.
        inputs, options: of one image.
    """
    if run.gradient_checkpointing or run.compile or shards_weights(accelerator):
        return 0
    share = own_shares(accelerator, run)[0]
    halves = 1 if accelerator.mixed_precision == "no" else 2  # at least
    return (share.stop - share.start) * activation_bytes(network, *inputs, **options) // halves


def activation_bytes(network: nn.Module, *inputs: Tensor, **options: Any) -> int:
    """Return the bytes that a forward pass in float32 keeps for its backward pass; nothing is computed.

    It is rather too little: the weights of attention are left out, which fused kernels never hold.

    Args:
        network: not compiled, sharded or checkpointed.
        inputs, options: of one image.
    """
    weights = {
        name: tensor.detach().to("meta").requires_grad_(tensor.requires_grad)
        for name, tensor in [*network.named_parameters(), *network.named_buffers()]
    }
    kept = dict[int, Tensor]()  # by their memory, which views share

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    shapes = tree_map(lambda tensor: tensor.to("meta"), (inputs, options))
    with saved_tensors_hooks(keep, lambda tensor: tensor), _PlainAttention():
        functional_call(network, weights, *shapes)
    for weight in weights.values():
        kept.pop(weight.untyped_storage()._cdata, None)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


class _PlainAttention(TorchFunctionMode):
    """Let attention keep what a fused kernel keeps: query, key, value and result."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        if function is F.scaled_dot_product_attention:
            query, key, value = arguments[:3]
            return query * key.sum() * value.sum()
        return function(*arguments, **(options or {}))
