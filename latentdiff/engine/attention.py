"""Choose the attention function: torch's own, or that of xformers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latentdiff.errors import InputError, MissingDependencyError, suggest
from latentdiff.models.attention import Attention, SpatialAttention

__all__ = ["ATTENTIONS", "find_attention", "use_attention"]

# query (B, heads, N, d), keys and values (B, heads, L, d), attn_mask (B, 1, 1, L) bool or None -> (B, heads, N, d)
Attend = Callable[..., Tensor]


def find_attention(name: str, device: torch.device) -> Attend:
    """Return the function called `name`, one of `ATTENTIONS`.

    Raises:
        InputError: unknown name, or one that does not run on the device.
        MissingDependencyError: xformers is not installed.
    """
    if not isinstance(name, str) or name not in ATTENTIONS:
        raise InputError(f"attention {name!r} is unknown{suggest(str(name), ATTENTIONS)}")
    return ATTENTIONS[name](device)


def use_attention(attend: Attend, *networks: nn.Module) -> None:
    """Let networks, the U-Net and the autoencoder, compute attention by a function; they are changed in place."""
    for module in (module for network in networks for module in network.modules()):
        if isinstance(module, Attention | SpatialAttention):
            module.attend = attend


def _sdpa(device: torch.device) -> Attend:
    return F.scaled_dot_product_attention


def _xformers(device: torch.device) -> Attend:
    if device.type != "cuda":
        raise InputError(f"xformers attention runs on CUDA only, got {device.type}; leave --attention out")
    try:
        from xformers.ops import memory_efficient_attention
    except ImportError as error:
        raise MissingDependencyError(
            "xformers attention needs the package xformers; install it with `pip install latentdiff[xformers]`"
        ) from error

    def attend(query: Tensor, keys: Tensor, values: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        bias = None if attn_mask is None else _bias(attn_mask, query)
        query, keys, values = (x.transpose(1, 2) for x in (query, keys, values))  # (B, L, heads, d)
        return memory_efficient_attention(query, keys, values, attn_bias=bias).transpose(1, 2)

    return attend


def _bias(mask: Tensor, query: Tensor) -> Tensor:
    """Return what xformers adds before the softmax, (B, heads, N, L), for mask (B, 1, 1, L) and query (B, heads, N, d).

    It reads rows in steps of eight, so each must begin at a multiple of eight: they are cut from longer ones.
    """
    batch, heads, count, _ = query.shape
    length = mask.shape[-1]
    bias = query.new_zeros(batch, 1, 1, -(-length // 8) * 8)
    bias[..., :length].masked_fill_(~mask, -torch.inf)
    return bias.expand(-1, heads, count, -1)[..., :length]


ATTENTIONS: dict[str, Callable[[torch.device], Attend]] = {"sdpa": _sdpa, "xformers": _xformers}
