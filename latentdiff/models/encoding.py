"""Encode prompts into the U-Net's context, through one protocol for every text encoder.

CLIP (Stable Diffusion 1.x, 2.x), BERT and T5 are encoded by `TokenStates`, the two encoders of Stable Diffusion XL by
`PenultimateStates`; `pixels.LabelEncoder` does the same for classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from latentdiff.errors import InputError
from latentdiff.models.bert import BertModel
from latentdiff.models.clip import CLIPTextModel
from latentdiff.models.t5 import T5EncoderModel
from latentdiff.models.text import TextStates
from latentdiff.models.tokenizer import TokenBatch, Tokenizer
from latentdiff.prompts import parse_weights

__all__ = ["Encoded", "PenultimateStates", "PromptEncoder", "TokenEncoder", "TokenStates"]

TokenEncoder = BertModel | CLIPTextModel | T5EncoderModel


class Encoded(NamedTuple):
    """One text, encoded by a model's text encoders.

    Attributes:
        states: (n, L, D), n windows of L tokens: the context, once windows are put one behind the other.
        mask: (n, L) bool, False for padding. Stable Diffusion's U-Nets look at the padding too.
        pooled: (P,), one vector for the whole text (its first window); None where there is none.
        tokens: how many, one begin and one end included.
    """

    states: Tensor
    mask: Tensor
    pooled: Tensor | None
    tokens: int


class PromptEncoder(Protocol):
    """Texts to states; `checkpoints.Components.prompt_encoder` is that of a model."""

    def __call__(self, texts: Sequence[str], *, clip_skip: int = 0, weighted: bool = False) -> list[Encoded]:
        """Return what each text is encoded as.

        Args:
            texts: any number.
            clip_skip: how many more of the last layers of CLIP encoders to leave out.
            weighted: read `(fox:1.3)` as a fox of weight 1.3, see `prompts.parse_weights`.

        Raises:
            InputError: layers are to be left out of an encoder that is not CLIP, or all of them.
        """


class TokenStates:
    """The states after the last layer of one encoder: CLIP, BERT or T5.

    Padding is hidden from the encoder only where its config says `use_attention_mask`, as diffusers does.

    Args:
        encoder: of the model.
        tokenizer: its own.
        run: computes what the encoder does; None for the encoder itself.
    """

    def __init__(
        self, encoder: TokenEncoder, tokenizer: Tokenizer, run: Callable[..., TextStates] | None = None
    ) -> None:
        self.encoder, self.tokenizer, self.run = encoder, tokenizer, encoder if run is None else run

    @torch.no_grad()
    def __call__(self, texts: Sequence[str], *, clip_skip: int = 0, weighted: bool = False) -> list[Encoded]:
        """See `PromptEncoder`."""
        encoder, clip = self.encoder, isinstance(self.encoder, CLIPTextModel)
        if clip_skip and not clip:
            raise InputError(f"clip_skip is for CLIP text encoders, got {type(encoder).__name__}; leave it out")
        tokens = _tokens(self.tokenizer, texts, weighted)
        rows, mask = _rows(tokens, tokens.input_ids, encoder), _rows(tokens, tokens.attention_mask, encoder)
        options = {"clip_skip": clip_skip, "end_token_id": self.tokenizer.end_token_id} if clip else {}
        encoded = self.run(rows, mask if encoder.config.use_attention_mask else None, **options)
        states = _weigh(encoded.last_hidden_state, tokens, keep_mean=clip)
        return _split(states, mask, encoded.pooled, tokens)


class PenultimateStates:
    """The states after the last layer but one of several CLIP encoders side by side, not normalised.

    The pooled vector is that of the last encoder.

    Source: Podell et al. 2023, arXiv 2307.01952, section 2.1.
    """

    def __init__(self, encoders: Sequence[tuple[CLIPTextModel, Tokenizer]]) -> None:
        self.encoders = encoders

    @torch.no_grad()
    def __call__(self, texts: Sequence[str], *, clip_skip: int = 0, weighted: bool = False) -> list[Encoded]:
        """See `PromptEncoder`."""
        states = []
        for encoder, tokenizer in self.encoders:
            tokens = _tokens(tokenizer, texts, weighted)
            # The tokenizer's own end: where the config only says "the highest number", learned words have higher ones.
            encoded = encoder(_rows(tokens, tokens.input_ids, encoder), end_token_id=tokenizer.end_token_id)
            most = len(encoded.hidden_states) - 2
            if clip_skip > most:
                raise InputError(f"clip_skip must be from 0 to {most} for this model, got {clip_skip}; try 0")
            states.append(_weigh(encoded.hidden_states[-2 - clip_skip], tokens, keep_mean=True))  # (B * n, L, D_i)
        mask = _rows(tokens, tokens.attention_mask, encoder)
        return _split(torch.cat(states, dim=-1), mask, encoded.pooled, tokens)


def _tokens(tokenizer: Tokenizer, texts: Sequence[str], weighted: bool) -> TokenBatch:
    return tokenizer([parse_weights(text) for text in texts] if weighted else texts)


def _rows(tokens: TokenBatch, values: Tensor, encoder: nn.Module) -> Tensor:
    """Return values of tokens (B, n * L), window by window (B * n, L), where the encoder is."""
    return values.reshape(len(values) * tokens.n_chunks, -1).to(next(encoder.parameters()).device)


def _weigh(states: Tensor, tokens: TokenBatch, *, keep_mean: bool) -> Tensor:
    """Return states (B * n, L, D) times the weights of their tokens.

    CLIP's are then scaled to the mean they had, as other tools do; a state of BERT or T5 has a mean of about zero.
    Where CLIP's is near zero too, so that the scale would turn them or blow them up, they keep their size instead.
    """
    if bool((tokens.weights == 1).all()):
        return states
    weights = tokens.weights.reshape(states.shape[:2])[..., None].to(states)  # (B * n, L, 1)
    weighted = states * weights
    if not keep_mean:
        return weighted
    by_mean = states.mean(dim=(1, 2), keepdim=True) / weighted.mean(dim=(1, 2), keepdim=True)
    by_size = _size(states) / _size(weighted).clamp(min=torch.finfo(states.dtype).tiny)
    most = 1 + (weights - 1).abs().amax(dim=(1, 2), keepdim=True)  # that a scale of the weights explains
    usable = (by_mean >= by_size / most) & (by_mean <= by_size * most)
    return weighted * torch.where(usable, by_mean, by_size)


def _size(states: Tensor) -> Tensor:
    """Return the root mean square of each window's states (B * n, L, D), as (B * n, 1, 1)."""
    return states.float().square().mean(dim=(1, 2), keepdim=True).sqrt().to(states.dtype)


def _split(states: Tensor, mask: Tensor, pooled: Tensor | None, tokens: TokenBatch) -> list[Encoded]:
    """Return what each text is encoded as, without the empty windows that a longer text beside it asked for."""
    count, chunks = len(tokens.counts), tokens.n_chunks
    states, mask = states.unflatten(0, (count, chunks)), mask.bool().unflatten(0, (count, chunks))
    first = [None] * count if pooled is None else pooled.unflatten(0, (count, chunks))[:, 0]
    return [Encoded(states[i, :own], mask[i, :own], first[i], tokens.counts[i]) for i, own in enumerate(tokens.windows)]
