"""Attention: the transformer of the U-Net, which looks at the text, and the one layer in the autoencoder's middle.

Attribute names are those of diffusers' modules. Keys and values of the text are arguments, not made on the way, so that
sampling can make them once for all steps (`unet.PreparedUNet`).

Source: Vaswani et al. 2017, arXiv 1706.03762; Rombach et al. 2022, arXiv 2112.10752, section 3.3 and appendix E.2.1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latentdiff.models.layers import to_map, to_tokens

KeyValue = tuple[Tensor, Tensor]
"""Keys and values, each (B, heads, L, channels / heads)."""


def split_heads(tokens: Tensor, heads: int) -> Tensor:
    """Return (B, heads, L, C / heads) for tokens (B, L, C)."""
    return tokens.unflatten(2, (heads, -1)).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head attention of tokens to themselves, or to a context.

    Args:
        channels: width of the tokens.
        heads: number of heads; divides `channels`.
        context_channels: width of the context, None for attention to the tokens themselves.
        upcast: attend in float32 whatever the dtype of the weights.
    """

    attend = staticmethod(F.scaled_dot_product_attention)  # `engine.attention` sets others

    def __init__(self, channels: int, heads: int, context_channels: int | None = None, *, upcast: bool = False) -> None:
        super().__init__()
        source = channels if context_channels is None else context_channels
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(source, channels, bias=False)
        self.to_v = nn.Linear(source, channels, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])
        self.heads = heads
        self.upcast = upcast

    def keys_values(self, context: Tensor) -> KeyValue:
        """Return keys and values (B, heads, L, d) of context (B, L, D)."""
        return self._split(self.to_k(context)), self._split(self.to_v(context))

    def forward(self, tokens: Tensor, text: KeyValue | None = None, mask: Tensor | None = None) -> Tensor:
        """Attend to `text`, or to the tokens themselves when it is None.

        Args:
            tokens: (B, N, C).
            text: what `keys_values` made of the context.
            mask: (B, 1, 1, L) bool, False for context tokens to leave out.

        Returns:
            (B, N, C).
        """
        query = self._split(self.to_q(tokens))  # (B, heads, N, d)
        keys, values = self.keys_values(tokens) if text is None else text
        if self.upcast:
            query, keys, values = query.float(), keys.float(), values.float()
        attended = self.attend(query, keys, values, attn_mask=mask)  # (B, heads, N, d)
        return self.to_out[0](attended.transpose(1, 2).flatten(2).to(tokens.dtype))

    def _split(self, x: Tensor) -> Tensor:
        return split_heads(x, self.heads)


class AttentionPooling(nn.Module):
    """One vector of a text: its mean, and a learned place, attend to the text and to themselves.

    Args:
        channels: width of the text states.
        heads: number of heads; divides `channels`.
    """

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.positional_embedding = nn.Parameter(nn.init.normal_(torch.empty(1, channels), std=channels**-0.5))
        self.k_proj = nn.Linear(channels, channels)
        self.q_proj = nn.Linear(channels, channels)
        self.v_proj = nn.Linear(channels, channels)
        self.heads = heads

    def forward(self, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return (B, D) for text states (B, L, D) and a mask (B, L), 0 for tokens to leave out, or None."""
        kept = None if mask is None else F.pad(mask.bool(), (1, 0), value=True)[:, None, None, :]  # (B, 1, 1, 1 + L)
        if mask is None:
            mean = context.mean(dim=1, keepdim=True)  # (B, 1, D)
        else:
            shares = mask.to(context.dtype) / mask.sum(dim=1, keepdim=True).to(context.dtype)
            mean = shares[:, None] @ context
        first = mean + self.positional_embedding
        tokens = torch.cat([first, context], dim=1)  # (B, 1 + L, D)
        query, keys, values = (
            split_heads(projected, self.heads)
            for projected in (self.q_proj(first), self.k_proj(tokens), self.v_proj(tokens))
        )
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=kept).flatten(1)


class TextTimeEmbedding(nn.Module):
    """What a text adds to the time embedding, and so to every residual block; weight names are diffusers'.

    A new one adds 0.

    Source: Saharia et al. 2022, arXiv 2205.11487, section 2.3 (pooled text states added to the time embedding).
    """

    def __init__(self, channels: int, time_channels: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.pool = AttentionPooling(channels, heads)
        self.proj = nn.Linear(channels, time_channels)
        self.norm2 = nn.LayerNorm(time_channels)
        nn.init.zeros_(self.norm2.weight)

    def forward(self, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return (B, time_channels); arguments are those of `AttentionPooling`."""
        return self.norm2(self.proj(self.pool(self.norm1(context), mask)))


class GEGLU(nn.Module):
    """A linear layer whose second half, through GELU, gates the first.

    Source: Shazeer 2020, arXiv 2002.05202, Eq. 6.
    """

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.proj = nn.Linear(channels, 2 * out_channels)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return (B, N, C_out) for tokens (B, N, C)."""
        values, gates = self.proj(tokens).chunk(2, dim=-1)
        return values * F.gelu(gates)


class FeedForward(nn.Module):
    """Two layers on each token alone, four times as wide in the middle; index 1 of `net` is diffusers' dropout."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.net = nn.ModuleList([GEGLU(channels, 4 * channels), nn.Identity(), nn.Linear(4 * channels, channels)])

    def forward(self, tokens: Tensor) -> Tensor:
        """Return (B, N, C) for tokens (B, N, C)."""
        return self.net[2](self.net[0](tokens))


class BasicTransformerBlock(nn.Module):
    """Attention to the picture (to the text with `only_cross`), attention to the text, feed-forward; each added."""

    def __init__(
        self, channels: int, heads: int, context_channels: int, *, only_cross: bool = False, upcast: bool = False
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = Attention(channels, heads, context_channels if only_cross else None, upcast=upcast)
        self.norm2 = nn.LayerNorm(channels)
        self.attn2 = Attention(channels, heads, context_channels, upcast=upcast)
        self.norm3 = nn.LayerNorm(channels)
        self.ff = FeedForward(channels)
        self.only_cross = only_cross

    def keys_values(self, context: Tensor) -> list[KeyValue]:
        """Return the keys and values of context (B, L, D), of each attention that looks at it."""
        layers = (self.attn1, self.attn2) if self.only_cross else (self.attn2,)
        return [layer.keys_values(context) for layer in layers]

    def forward(self, tokens: Tensor, text: Sequence[KeyValue], mask: Tensor | None) -> Tensor:
        """Return (B, N, C) for tokens (B, N, C), text from `keys_values` and mask (B, 1, 1, L)."""
        if self.only_cross:
            tokens = tokens + self.attn1(self.norm1(tokens), text[0], mask)
        else:
            tokens = tokens + self.attn1(self.norm1(tokens))
        tokens = tokens + self.attn2(self.norm2(tokens), text[-1], mask)
        return tokens + self.ff(self.norm3(tokens))


class Transformer2DModel(nn.Module):
    """Add to a map what a transformer over its pixels, looking at the text, makes of it.

    Args:
        channels: of the map.
        heads: attention heads; divides `channels`.
        layers: number of transformer blocks.
        context_channels: width D of the text states.
        groups: of the group norm before the transformer.
        linear: project by linear layers; else by 1x1 convolutions, which differ in the shape of their weights.
        only_cross: attend to the text in both attentions of each block.
        upcast: attend in float32.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        layers: int,
        context_channels: int,
        *,
        groups: int,
        linear: bool = False,
        only_cross: bool = False,
        upcast: bool = False,
    ) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(channels, heads, context_channels, only_cross=only_cross, upcast=upcast)
            for _ in range(layers)
        )
        self.proj_out = nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)
        self.linear = linear

    def keys_values(self, context: Tensor) -> list[list[KeyValue]]:
        """Return the keys and values of context (B, L, D), block by block."""
        return [block.keys_values(context) for block in self.transformer_blocks]  # type: ignore[operator]

    def forward(self, x: Tensor, text: Sequence[Sequence[KeyValue]], mask: Tensor | None) -> Tensor:
        """Return (B, C, H, W) for x (B, C, H, W), text from `keys_values` and mask (B, 1, 1, L)."""
        hidden = self.norm(x)
        tokens = self.proj_in(to_tokens(hidden)) if self.linear else to_tokens(self.proj_in(hidden))  # (B, H*W, C)
        for block, block_text in zip(self.transformer_blocks, text):
            tokens = block(tokens, block_text, mask)
        return x + (to_map(self.proj_out(tokens), x) if self.linear else self.proj_out(to_map(tokens, x)))


class SpatialAttention(nn.Module):
    """Add to a map one-head attention of all its pixels to each other, as the autoencoder has it in the middle."""

    attend = staticmethod(F.scaled_dot_product_attention)

    def __init__(self, channels: int, *, groups: int, eps: float) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, H, W) for x (B, C, H, W)."""
        tokens = to_tokens(self.group_norm(x))[:, None]  # (B, 1, H*W, C)
        attended = self.attend(self.to_q(tokens), self.to_k(tokens), self.to_v(tokens))
        return x + to_map(self.to_out[0](attended[:, 0]), x)
