"""The BERT text encoder (MiniLM, the embedded model's, is one). Weight names are those of transformers' BertModel.

Dropout is left out: the encoder is frozen while diffusion is trained.

Source: Devlin et al. 2018, arXiv 1810.04805; Wang et al. 2020, arXiv 2002.10957.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latentdiff.errors import InputError
from latentdiff.models.config import ModelConfig, require, require_positive
from latentdiff.models.text import TextStates, attend


@dataclass(frozen=True)
class BertConfig(ModelConfig):
    """Shape of a BERT encoder; the keys and their defaults are those of transformers' config.json.

    Attributes:
        max_position_embeddings: the longest window, in tokens.
        use_attention_mask: whether the model that contains the encoder masks padding; as diffusers reads it.
    """

    class_name: ClassVar[str] = "BertModel"
    ignored: ClassVar[None] = None
    fixed: ClassVar[dict[str, tuple[Any, ...]]] = {
        "add_cross_attention": (False,),
        "hidden_act": ("gelu",),
        "is_decoder": (False,),
        "model_type": ("bert",),
        "position_embedding_type": ("absolute",),
    }

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0
    use_attention_mask: bool = False

    def check(self) -> None:
        """Raise ModelConfigError when the values do not fit together."""
        require_positive(self, "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
        require_positive(self, "intermediate_size", "max_position_embeddings", "type_vocab_size")
        require(
            self.hidden_size % self.num_attention_heads == 0,
            f"hidden_size must be a multiple of num_attention_heads ({self.num_attention_heads}), "
            f"got {self.hidden_size}",
        )
        require(
            self.pad_token_id is None or 0 <= self.pad_token_id < self.vocab_size,
            f"pad_token_id must be null or a token below vocab_size ({self.vocab_size}), got {self.pad_token_id}",
        )

    def header(self) -> dict[str, Any]:
        """Return what names the class in transformers' config.json."""
        return {"architectures": [self.class_name], "model_type": "bert", "hidden_act": "gelu"}


class BertModel(nn.Module):
    """Turn tokens into one vector each that knows of all the others."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = BertEmbeddings(config)
        layers = nn.ModuleList(BertLayer(config) for _ in range(config.num_hidden_layers))
        self.encoder = nn.ModuleDict({"layer": layers})
        self.pooler = nn.ModuleDict({"dense": nn.Linear(config.hidden_size, config.hidden_size)})

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> TextStates:
        """Encode windows of text.

        Args:
            input_ids: (B, L) int64.
            attention_mask: (B, L), 0 for padding, which no token then looks at; None looks at everything.

        Returns:
            The states of the tokens (B, L, D), and the first token's through a layer with tanh (B, D).

        Raises:
            InputError: a window is longer than the encoder's.
        """
        length, longest = input_ids.shape[1], self.config.max_position_embeddings
        if length > longest:
            raise InputError(f"the text encoder takes windows of {longest} tokens, got {length}; split the prompt")
        return self.encode(self.embeddings.word_embeddings(input_ids), attention_mask)

    def encode(self, words: Tensor, attention_mask: Tensor | None = None) -> TextStates:
        """Return what `forward` does, given the vectors of the tokens alone, (B, L, D)."""
        mask = None if attention_mask is None else attention_mask.bool()[:, None, None, :]  # (B, 1, 1, L)
        states = [self.embeddings(words)]  # each (B, L, D)
        for layer in self.encoder["layer"]:  # type: ignore[attr-defined]
            states.append(layer(states[-1], mask))
        pooled = torch.tanh(self.pooler["dense"](states[-1][:, 0]))  # (B, D)
        return TextStates(states[-1], pooled, tuple(states))


class BertEmbeddings(nn.Module):
    """The sum of a vector for the token, one for its position and one for its segment, normalised."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.word_embeddings = nn.Embedding(config.vocab_size, width, padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, width)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, width)
        self.LayerNorm = nn.LayerNorm(width, config.layer_norm_eps)

    def forward(self, words: Tensor) -> Tensor:
        """Return (B, L, D) for the vectors of tokens (B, L, D)."""
        positions = self.position_embeddings.weight[: words.shape[1]]  # (L, D)
        segment = self.token_type_embeddings.weight[0]  # (D,)
        return self.LayerNorm(words + segment + positions)


class BertLayer(nn.Module):
    """Attention, then two layers on each token alone; each added to its input and normalised."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.attention = nn.ModuleDict({"self": BertSelfAttention(config), "output": BertOutput(width, config)})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, config.intermediate_size)})
        self.output = BertOutput(config.intermediate_size, config)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Return (B, L, D) for x (B, L, D) and mask (B, 1, 1, L)."""
        x = self.attention["output"](self.attention["self"](x, mask), x)
        return self.output(F.gelu(self.intermediate["dense"](x)), x)


class BertSelfAttention(nn.Module):
    """Multi-head attention of all tokens to each other, without the layer after it."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.heads = config.num_attention_heads

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Return (B, L, D) for x (B, L, D) and mask (B, 1, 1, L)."""
        return attend(self.query(x), self.key(x), self.value(x), self.heads, mask)


class BertOutput(nn.Module):
    """A layer whose output is added to another input, and the sum normalised."""

    def __init__(self, in_channels: int, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(in_channels, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """Return (B, L, D) for x (B, L, C_in) and residual (B, L, D)."""
        return self.LayerNorm(self.dense(x) + residual)
