"""What the text encoders share: prompts to states, their result, multi-head attention, the activations configs name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from latentdiff.errors import InputError

if TYPE_CHECKING:
    from latentdiff.models.tokenizer import Tokenizer


@dataclass(frozen=True)
class TextStates:
    """What a text encoder makes of a batch of prompts.

    Attributes:
        last_hidden_state: one vector per token, (B, L, D).
        pooled: one vector per prompt, (B, P).
        hidden_states: the embeddings and the output of each layer, each (B, L, D), before any final norm.
    """

    last_hidden_state: Tensor
    pooled: Tensor
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


class Encoded(NamedTuple):
    """What a model's text encoders make of one text.

    Attributes:
        states: (n, L, D), n windows of L tokens.
        pooled: (P,), one vector for the whole text (its first window), where the model wants that.
        tokens: how many, begin and end included.
    """

    states: Tensor
    pooled: Tensor | None
    tokens: int


@torch.no_grad()
def encode_penultimate(text: str, encoders: Sequence[tuple[Any, Tokenizer]], clip_skip: int = 0) -> Encoded:
    """Return the states of the last layer but one of several CLIP encoders side by side, not normalised.

    The pooled vector is that of the last encoder. `clip_skip` leaves out so many layers more.

    Source: Podell et al. 2023, arXiv 2307.01952, section 2.1.
    """
    states, pooled, counts = [], None, [0]
    for encoder, tokenizer in encoders:
        tokens = tokenizer([text])
        rows = tokens.input_ids.reshape(tokens.n_chunks, -1).to(next(encoder.parameters()).device)
        encoded = encoder(rows)
        if clip_skip > len(encoded.hidden_states) - 2:
            most = len(encoded.hidden_states) - 2
            raise InputError(f"clip_skip must be from 0 to {most} for this model, got {clip_skip}; try 0")
        states.append(encoded.hidden_states[-2 - clip_skip])  # (n, L, D_i)
        pooled, counts = encoded.pooled[0], tokens.counts
    return Encoded(torch.cat(states, dim=-1), pooled, counts[0])


@torch.no_grad()
def encode_prompts(
    texts: Sequence[str], text_encoder: Any, tokenizer: Tokenizer | None, clip_skip: int = 0
) -> tuple[Tensor, list[int]]:
    """Return the token states (B, n, L, D) of texts, n windows of L tokens each, and the number of tokens of each.

    Padding is hidden from the encoder only where its config says `use_attention_mask`, as diffusers does. An encoder
    that comes without a tokenizer (`pixels.LabelEncoder`) takes the texts as they are.

    Raises:
        InputError: layers are to be left out (`clip_skip`) of an encoder that is not CLIP, or all of them.
    """
    skipping = "clip_skip" in inspect.signature(text_encoder.forward).parameters
    if clip_skip and not skipping:
        raise InputError(f"clip_skip is for CLIP text encoders, got {type(text_encoder).__name__}; leave it out")
    if tokenizer is None:
        return text_encoder.encode(texts)
    tokens = tokenizer(list(texts))
    windows = (len(texts) * tokens.n_chunks, -1)
    device = next(text_encoder.parameters()).device
    mask = tokens.attention_mask.reshape(windows).to(device) if text_encoder.config.use_attention_mask else None
    options = {"clip_skip": clip_skip} if skipping else {}
    states = text_encoder(tokens.input_ids.reshape(windows).to(device), mask, **options).last_hidden_state
    return states.unflatten(0, (len(texts), tokens.n_chunks)), tokens.counts
