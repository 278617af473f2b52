"""Parts shared by the text encoders: result, multi-head attention, activations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class TextStates:
    """What a text encoder makes of a batch of prompts.

    Attributes:
        last_hidden_state: one vector per token, (B, L, D).
        pooled: one vector per prompt, (B, P); None where the encoder has none.
        hidden_states: the embeddings and the output of each layer, each (B, L, D), before any final norm.
    """

    last_hidden_state: Tensor
    pooled: Tensor | None
    hidden_states: tuple[Tensor, ...]


def attend(query: Tensor, key: Tensor, value: Tensor, heads: int, mask: Tensor | None) -> Tensor:
    """Return multi-head attention (B, L, D) of query, key and value (B, L, D).

    Args:
        query: (B, L, D).
        key: (B, L, D).
        value: (B, L, D).
        heads: number of heads; divides D.
        mask: bool, broadcastable to (B, heads, L, L), False where a token does not look at another.
    """
    query, key, value = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (query, key, value))  # (B, heads, L, d)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2).flatten(2)


def quick_gelu(x: Tensor) -> Tensor:
    """Return x * sigmoid(1.702 x), the approximation of GELU that the first CLIP models were trained with.

    Source: Hendrycks and Gimpel 2016, arXiv 1606.08415, section 2.
    """
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "quick_gelu": quick_gelu}
