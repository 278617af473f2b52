"""The encoder of T5 as a text encoder: transformers' network under the interface of ours, for folders of its layout.

Source: Raffel et al. 2019, arXiv 1910.10683.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from latentdiff.models.config import ModelConfig, require, require_positive
from latentdiff.models.text import TextStates


@dataclass(frozen=True)
class T5Config(ModelConfig):
    """Shape of a T5 encoder; the keys and their defaults are those of transformers' config.json.

    Attributes:
        d_model: width of the states; `d_kv` that of each head, `d_ff` that of the layers in the middle.
        feed_forward_proj: "relu" (T5) or "gated-gelu" (T5 1.1, Flan-T5).
        use_attention_mask: whether the model that contains the encoder masks padding; as diffusers reads it.
    """

    class_name: ClassVar[str] = "T5EncoderModel"
    ignored: ClassVar[None] = None
    fixed: ClassVar[dict[str, tuple[Any, ...]]] = {"model_type": ("t5",)}
    max_position_embeddings: ClassVar[int] = 2**20  # positions are relative, so windows may be of any length

    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 2048
    num_layers: int = 6
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = "relu"
    use_attention_mask: bool = False

    @property
    def hidden_size(self) -> int:
        """Width of the states."""
        return self.d_model

    def header(self) -> dict[str, Any]:
        """Return what names the class in transformers' config.json."""
        return {"architectures": [self.class_name], "model_type": "t5"}

    def check(self) -> None:
        """Raise ModelConfigError when the values do not fit together."""
        require_positive(self, "vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads")
        require_positive(self, "relative_attention_num_buckets", "relative_attention_max_distance")
        kinds = ("relu", "gated-gelu")
        require(
            self.feed_forward_proj in kinds,
            f"feed_forward_proj must be {' or '.join(kinds)}, got {self.feed_forward_proj!r}; use another text encoder",
        )


class T5EncoderModel(nn.Module):
    """Turn tokens into one vector each that knows of all the others. Importing transformers takes seconds.

    Attributes:
        kept_in_float32: how the names of weights end that stay in float32 where the others are float16, in which their
            products overflow; as in transformers.
    """

    kept_in_float32: ClassVar[tuple[str, ...]] = (".wo.weight",)

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        from transformers import T5Config as Config
        from transformers import T5EncoderModel as Model

        self.config = config
        model = Model(Config(**config.to_dict(), dropout_rate=0.0, tie_word_embeddings=True))
        self.shared = model.shared
        self.encoder = model.encoder
        self.encoder.embed_tokens = None  # the same weights as `shared`

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> TextStates:
        """Encode windows of text.

        Args:
            input_ids: (B, L) int64.
            attention_mask: (B, L), 0 for padding, which no token then looks at; None looks at everything.

        Returns:
            The states of the tokens (B, L, D), without a pooled vector.
        """
        embeddings = self.shared(input_ids)  # (B, L, D)
        encoded = self.encoder(inputs_embeds=embeddings, attention_mask=attention_mask, output_hidden_states=True)
        return TextStates(encoded.last_hidden_state, None, encoded.hidden_states)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> T5EncoderModel:
        """Move or cast the weights, as `to` and its like do, but leave `kept_in_float32` in float32."""
        before = {name: weight.data for name, weight in self._kept()}
        super()._apply(fn, recurse)
        for name, weight in self._kept():
            if weight.dtype == torch.float16:
                weight.data = before[name].to(weight.device, torch.float32)
        return self

    def _kept(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, weight) for name, weight in self.named_parameters() if name.endswith(self.kept_in_float32)]
