"""Text encoders while they, or new words of theirs, are trained: captions are encoded anew in every step."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from latentdiff.checkpoints import Components, Encoders
from latentdiff.checkpoints.textual_inversion import TABLES, grown
from latentdiff.errors import InputError
from latentdiff.models.pixels import LabelEncoder
from latentdiff.models.tokenizer import Tokenizer

from ..config import TextualInversionConfig
from ..data.batches import Conditioning

if TYPE_CHECKING:
    from typing_extensions import Unpack


class JointNetwork(nn.Module):
    """A U-Net and the text encoder before it, called as the U-Net is, with tokens in place of text states.

    Attributes:
        words: what is trained of the text encoder, if that is not all of it.
    """

    def __init__(self, unet: nn.Module, text_encoder: nn.Module, words: Words | None = None) -> None:
        super().__init__()
        self.unet, self.text_encoder, self.words = unet, text_encoder, words

    def forward(self, sample: Tensor, timesteps: Tensor, tokens: Tensor, **options: Unpack[Conditioning]) -> Tensor:
        """Return what the U-Net does, for numbers and mask of tokens (B, 2, L)."""
        encoder: Any = self.text_encoder
        ids, mask = tokens.unbind(dim=1)  # (B, L)
        states = encoder(ids, mask if encoder.config.use_attention_mask else None).last_hidden_state  # (B, L, D)
        return self.unet(sample, timesteps, states, **options)


class Words(nn.Module):
    """The vectors (n, D) of new words, which a text encoder's own table gives as long as this is there.

    Source: Gal et al. 2022, arXiv 2208.01618, section 4.
    """

    def __init__(self, table: nn.Embedding, first: int, count: int) -> None:
        super().__init__()
        self.first = first
        self.vectors = nn.Parameter(table.weight[first : first + count].detach().clone())
        table.register_forward_hook(self._replace)

    def _replace(self, table: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        numbers = inputs[0] - self.first
        new = (numbers >= 0) & (numbers < len(self.vectors))
        learned = self.vectors[numbers.clamp(0, len(self.vectors) - 1)]
        return torch.where(new[..., None], learned.to(output.dtype), output)


def require_one_encoder(components: Encoders, what: str) -> None:
    """Raise InputError where there is no text encoder to train, or more than one."""
    if isinstance(components.text_encoder, LabelEncoder):
        raise InputError(f"{what} needs a model with a text encoder, got one of classes; use another model")
    if components.text_encoder_2 is not None:
        raise InputError(f"{what} knows models with one text encoder, and this one has two; use another model")


def train_encoder(components: Components) -> nn.Module:
    """Return the text encoder with all weights to be trained that the U-Net sees anything of."""
    encoder = components.text_encoder.requires_grad_(True).train()
    for unseen in ("pooler", "text_projection"):
        if isinstance(module := getattr(encoder, unseen, None), nn.Module):
            module.requires_grad_(False)
    return encoder


def add_words(components: Components, config: TextualInversionConfig) -> Components:
    """Return the components of a model that know a new word, whose vectors are those of the words it starts from.

    Raises:
        InputError: the model has no text encoder, or knows the word; or there is nothing to start from.
    """
    require_one_encoder(components, "textual_inversion")
    encoder, tokenizer = components.text_encoder, components.tokenizer
    assert tokenizer is not None
    numbers = inner_tokens(tokenizer, config.initializer)
    if not numbers:
        raise InputError(f"textual_inversion.initializer has no word, got {config.initializer!r}; name one")
    rows = _table(encoder).weight[[numbers[place % len(numbers)] for place in range(config.vectors)]].detach()
    grown_encoder, grown_tokenizer = grown(encoder, tokenizer, config.word, rows)
    return replace(components, text_encoder=grown_encoder, tokenizer=grown_tokenizer)


def inner_tokens(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the numbers of the tokens of a text without those that begin and end it."""
    begin = tokenizer([""]).counts[0] - 1  # one token ends a text, and with most one begins it
    tokens = tokenizer([text])
    numbers: list[int] = tokens.input_ids[0, begin : tokens.counts[0] - 1].tolist()
    return numbers


def new_words(components: Components, config: TextualInversionConfig) -> Words:
    """Return the vectors of the word that `add_words` put last into the vocabulary, to be trained."""
    assert components.tokenizer is not None
    return Words(_table(components.text_encoder), len(components.tokenizer) - config.vectors, config.vectors)


def _table(encoder: nn.Module) -> Any:
    return encoder.get_submodule(TABLES[type(encoder).__name__])
