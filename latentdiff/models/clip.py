"""The CLIP text encoders of Stable Diffusion. Weight names are those of the published files: `text_model.` and so on.

transformers' CLIPTextModel and CLIPTextModelWithProjection are one class here; the config says which.

Source: Radford et al. 2021, arXiv 2103.00020, section 2.4; Cherti et al. 2022, arXiv 2212.07143.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from latentdiff.errors import InputError
from latentdiff.models.config import ModelConfig, require, require_positive
from latentdiff.models.text import ACTIVATIONS, TextStates, attend

if TYPE_CHECKING:
    from typing_extensions import Self

WITH_PROJECTION = "CLIPTextModelWithProjection"
LEGACY_EOS = 2  # in configs of before 2023: the end of a prompt is then the first of its highest token


@dataclass(frozen=True)
class CLIPTextConfig(ModelConfig):
    """Shape of a CLIP text encoder; the keys and their defaults are those of transformers' config.json.

    Attributes:
        max_position_embeddings: the longest window, in tokens.
        projection_dim: width of the pooled vector, where there is a projection.
        eos_token_id: the token whose state is the pooled vector.
        use_attention_mask: whether the model that contains the encoder masks padding; as diffusers reads it.
        with_projection: whether a last layer projects the pooled vector; read from "architectures".
    """

    class_name: ClassVar[str] = "CLIPTextModel"
    ignored: ClassVar[None] = None
    fixed: ClassVar[dict[str, tuple[Any, ...]]] = {"model_type": ("clip_text_model",)}

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 49407
    use_attention_mask: bool = False
    with_projection: bool = False

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Read the content of a config.json; see `ModelConfig.from_dict`."""
        return super().from_dict({"with_projection": WITH_PROJECTION in (data.get("architectures") or ()), **data})

    def to_dict(self) -> dict[str, Any]:
        """Return the content of a config.json that transformers reads."""
        return {name: value for name, value in super().to_dict().items() if name != "with_projection"}

    def header(self) -> dict[str, Any]:
        """Return what names the class in transformers' config.json."""
        architecture = WITH_PROJECTION if self.with_projection else self.class_name
        return {"architectures": [architecture], "model_type": "clip_text_model"}

    def check(self) -> None:
        """Raise ModelConfigError when the values do not fit together."""
        require_positive(self, "vocab_size", "hidden_size", "intermediate_size", "projection_dim")
        require_positive(self, "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
        require(
            self.hidden_size % self.num_attention_heads == 0,
            f"hidden_size must be a multiple of num_attention_heads ({self.num_attention_heads}), "
            f"got {self.hidden_size}",
        )
        require(
            self.hidden_act in ACTIVATIONS,
            f"hidden_act must be {' or '.join(ACTIVATIONS)}, got {self.hidden_act!r}; use another text encoder",
        )


class CLIPTextModel(nn.Module):
    """Turn tokens into one vector each that knows of all before it, and a prompt into one vector."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.config = config
        self.text_model = CLIPTextTransformer(config)
        if config.with_projection:
            self.text_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        clip_skip: int = 0,
        end_token_id: int | None = None,
    ) -> TextStates:
        """Encode windows of text.

        Args:
            input_ids: (B, L) int64, each row with its end token.
            attention_mask: (B, L), 0 for padding, which no token then looks at; None, as Stable Diffusion was trained,
                looks at everything before.
            clip_skip: how many of the last layers `last_hidden_state` leaves out; it is normalised all the same.
                Stable Diffusion XL takes `hidden_states[-2]`, not normalised, instead.
            end_token_id: the token that ends a window, at whose first place the pooled vector is taken; None for what
                the config says, which in many published ones is only that it has the highest number.

        Returns:
            The states of the tokens (B, L, D), and the end token's (B, D), or (B, P) with a projection.

        Raises:
            InputError: a window is longer than the encoder's, or `clip_skip` leaves no layer.
        """
        config, length = self.config, input_ids.shape[1]
        if length > config.max_position_embeddings:
            raise InputError(
                f"the text encoder takes windows of {config.max_position_embeddings} tokens, got {length}; "
                "split the prompt"
            )
        if not 0 <= clip_skip < config.num_hidden_layers:
            raise InputError(f"clip_skip must be from 0 to {config.num_hidden_layers - 1}, got {clip_skip}")
        hidden_states = self.text_model(input_ids, attention_mask)
        last = self.text_model.final_layer_norm(hidden_states[-1])  # (B, L, D)
        rows = torch.arange(len(input_ids), device=input_ids.device)
        pooled = last[rows, self._ends(input_ids, end_token_id)]  # (B, D)
        if config.with_projection:
            pooled = self.text_projection(pooled)  # (B, P)
        if clip_skip:
            last = self.text_model.final_layer_norm(hidden_states[-1 - clip_skip])
        return TextStates(last, pooled, hidden_states)

    def _ends(self, input_ids: Tensor, end_token_id: int | None) -> Tensor:
        """Return the place of each window's end (B,)."""
        end = self.config.eos_token_id if end_token_id is None else end_token_id
        legacy = end_token_id is None and end == LEGACY_EOS
        return (input_ids if legacy else (input_ids == end).int()).argmax(dim=1)


class CLIPTextTransformer(nn.Module):
    """Embeddings, layers and the norm after them, which is applied by the model around this."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.embeddings = nn.ModuleDict(
            {
                "token_embedding": nn.Embedding(config.vocab_size, width),
                "position_embedding": nn.Embedding(config.max_position_embeddings, width),
            }
        )
        layers = nn.ModuleList(CLIPEncoderLayer(config) for _ in range(config.num_hidden_layers))
        self.encoder = nn.ModuleDict({"layers": layers})
        self.final_layer_norm = nn.LayerNorm(width, config.layer_norm_eps)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, ...]:
        """Return the embeddings and each layer's output, each (B, L, D), for input_ids (B, L)."""
        length = input_ids.shape[1]
        positions = torch.arange(length, device=input_ids.device)
        x = self.embeddings["token_embedding"](input_ids) + self.embeddings["position_embedding"](positions)
        mask = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()  # (L, L)
        if attention_mask is not None:
            mask = mask & attention_mask.bool()[:, None, None, :]  # (B, 1, L, L)
        states = [x]
        for layer in self.encoder["layers"]:  # type: ignore[attr-defined]
            states.append(layer(states[-1], mask))
        return tuple(states)


class CLIPEncoderLayer(nn.Module):
    """Attention, then two layers on each token alone; each after a norm and added to its input."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.self_attn = CLIPAttention(config)
        self.layer_norm1 = nn.LayerNorm(width, config.layer_norm_eps)
        self.mlp = nn.ModuleDict(
            {"fc1": nn.Linear(width, config.intermediate_size), "fc2": nn.Linear(config.intermediate_size, width)}
        )
        self.layer_norm2 = nn.LayerNorm(width, config.layer_norm_eps)
        self.activation = ACTIVATIONS[config.hidden_act]

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Return (B, L, D) for x (B, L, D) and mask (L, L) or (B, 1, L, L)."""
        x = x + self.self_attn(self.layer_norm1(x), mask)
        return x + self.mlp["fc2"](self.activation(self.mlp["fc1"](self.layer_norm2(x))))


class CLIPAttention(nn.Module):
    """Multi-head attention of each token to itself and those before it."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)
        self.heads = config.num_attention_heads

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Return (B, L, D) for x (B, L, D) and mask (L, L) or (B, 1, L, L)."""
        return self.out_proj(attend(self.q_proj(x), self.k_proj(x), self.v_proj(x), self.heads, mask))
