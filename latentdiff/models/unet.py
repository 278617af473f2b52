"""The U-Net that predicts noise in latents. Weight names are those of diffusers' UNet2DConditionModel.

One network for every configuration of Stable Diffusion 1.x, 2.x and XL, with their inpainting and upscaling variants.

Source: Ronneberger et al. 2015, arXiv 1505.04597; Dhariwal and Nichol 2021, arXiv 2105.05233; Rombach et al. 2022,
arXiv 2112.10752, section 3.3; Podell et al. 2023, arXiv 2307.01952.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latentdiff.errors import InputError
from latentdiff.models.attention import KeyValue, TextTimeEmbedding
from latentdiff.models.blocks import BlockInputs, BlockShape, DownBlock, MidBlock, UpBlock
from latentdiff.models.config import ModelConfig, require, require_positive
from latentdiff.models.layers import ResnetBlock2D, TimestepEmbedding, activate, sinusoidal_embedding

DOWN_BLOCKS = {"CrossAttnDownBlock2D": True, "DownBlock2D": False}
UP_BLOCKS = {"CrossAttnUpBlock2D": True, "UpBlock2D": False}
MID_BLOCK = "UNetMidBlock2DCrossAttn"

Texts = list[list[list[KeyValue]]]
"""Keys and values of each transformer, each of its blocks, and each attention of that to the text."""

# (sample (B, C_in, H, W), shifts (B, sum C), texts, mask (B, 1, 1, L) or None) -> prediction (B, C_out, H, W)
Predict = Callable[[Tensor, Tensor, Texts, "Tensor | None"], Tensor]


@dataclass(frozen=True)
class UNetConfig(ModelConfig):
    """Shape of a U-Net; the keys and their defaults are those of diffusers' unet/config.json.

    Where a key may be one value or several, several are one per resolution, finest first.

    Attributes:
        sample_size: side of the training latents; informative.
        in_channels: latent channels, with those of mask and masked picture (inpainting) or small picture (upscaling).
        flip_sin_to_cos: whether the cosines of the time embedding come first; `freq_shift` bends its frequencies.
        layers_per_block: residual blocks per resolution on the way down; the way up has one more.
        cross_attention_dim: width of the text states.
        attention_head_dim: the NUMBER of attention heads, a misnomer that all published files share.
        class_embed_type: None, "timestep" or "projection"; with None, `num_class_embeds` asks for a learned table.
        addition_embed_type: what is added to the time embedding: None; "text", one vector of the text states, pooled by
            `addition_embed_type_num_heads` heads, as in DeepFloyd IF; "text_time", pooled text of the encoder's own and
            picture sizes, as in Stable Diffusion XL.
        time_cond_proj_dim: width of the embedded guidance scale of latent consistency models.
        self_conditioning: whether the second half of the input channels is the x0 estimate of the call before; a key of
            ours, written only where true.
    """

    class_name: ClassVar[str] = "UNet2DConditionModel"
    fixed: ClassVar[dict[str, tuple[Any, ...]]] = {
        "act_fn": ("silu", "swish"),
        "attention_type": ("default",),
        "center_input_sample": (False,),
        "class_embeddings_concat": (False,),
        "conv_in_kernel": (3,),
        "conv_out_kernel": (3,),
        "cross_attention_norm": (None,),
        "downsample_padding": (1,),
        "dual_cross_attention": (False,),
        "encoder_hid_dim": (None,),
        "encoder_hid_dim_type": (None,),
        "mid_block_only_cross_attention": (None, False),
        "mid_block_scale_factor": (1,),
        "num_attention_heads": (None,),
        "resnet_out_scale_factor": (1,),
        "resnet_skip_time_act": (False,),
        "resnet_time_scale_shift": ("default",),
        "reverse_transformer_layers_per_block": (None,),
        "time_embedding_act_fn": (None,),
        "time_embedding_dim": (None,),
        "time_embedding_type": ("positional",),
        "timestep_post_act": (None,),
    }

    sample_size: int | tuple[int, ...] | None = None
    in_channels: int = 4
    out_channels: int = 4
    flip_sin_to_cos: bool = True
    freq_shift: float = 0
    down_block_types: tuple[str, ...] = (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D")
    mid_block_type: str | None = MID_BLOCK
    up_block_types: tuple[str, ...] = ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3)
    only_cross_attention: bool | tuple[bool, ...] = False
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int | tuple[int, ...] = 2
    dropout: float = 0.0
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int | tuple[int, ...] = 1280
    transformer_layers_per_block: int | tuple[int, ...] = 1
    attention_head_dim: int | tuple[int, ...] = 8
    use_linear_projection: bool = False
    class_embed_type: str | None = None
    num_class_embeds: int | None = None
    projection_class_embeddings_input_dim: int | None = None
    addition_embed_type: str | None = None
    addition_embed_type_num_heads: int = 64
    addition_time_embed_dim: int | None = None
    upcast_attention: bool | None = False
    time_cond_proj_dim: int | None = None
    self_conditioning: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return the content of a config.json that the reference class reads."""
        values = super().to_dict()
        if not self.self_conditioning:
            del values["self_conditioning"]
        return values

    @property
    def time_channels(self) -> int:
        """Width of the time embedding."""
        return 4 * self.block_out_channels[0]

    @property
    def expects_sizes(self) -> bool:
        """Whether it is told pooled text and picture sizes, as Stable Diffusion XL is."""
        return self.addition_embed_type == "text_time"

    def shapes(self, attended: Sequence[bool]) -> list[BlockShape]:
        """Return the shape of each resolution, finest first; `attended` says which ones have attention."""
        return [
            BlockShape(
                channels=channels,
                layers=self._at("layers_per_block", i),
                heads=self._at("attention_head_dim", i) if attended[i] else None,
                transformer_layers=self._at("transformer_layers_per_block", i),
                context_channels=self._at("cross_attention_dim", i),
                only_cross=self._at("only_cross_attention", i),
                time_channels=self.time_channels,
                groups=self.norm_num_groups,
                eps=self.norm_eps,
                linear=self.use_linear_projection,
                upcast=bool(self.upcast_attention),
                dropout=self.dropout,
            )
            for i, channels in enumerate(self.block_out_channels)
        ]

    def middle_shape(self) -> BlockShape:
        """Return the shape of the block between the way down and the way up, which has attention of both kinds."""
        return replace(self.shapes([True] * len(self.block_out_channels))[-1], only_cross=False)

    def check(self) -> None:
        """Raise ModelConfigError when the values do not fit together."""
        require_positive(self, "in_channels", "out_channels", "block_out_channels", "layers_per_block")
        require_positive(self, "norm_num_groups", "cross_attention_dim", "transformer_layers_per_block", "sample_size")
        require_positive(self, "attention_head_dim", "num_class_embeds", "projection_class_embeddings_input_dim")
        require_positive(self, "addition_embed_type_num_heads", "addition_time_embed_dim", "time_cond_proj_dim")
        count = len(self.block_out_channels)
        self._check_blocks(count)
        for name in ("only_cross_attention", "layers_per_block", "cross_attention_dim", "attention_head_dim"):
            self._check_length(name, count)
        self._check_length("transformer_layers_per_block", count)
        for i, channels in enumerate(self.block_out_channels):
            groups, heads = self.norm_num_groups, self._at("attention_head_dim", i)
            require(
                channels % groups == 0,
                f"block_out_channels must be multiples of norm_num_groups ({groups}), got {channels}",
            )
            attended = DOWN_BLOCKS[self.down_block_types[i]] or UP_BLOCKS[self.up_block_types[-1 - i]]
            middle = i == count - 1 and self.mid_block_type is not None
            require(
                not (attended or middle) or channels % heads == 0,
                f"block_out_channels must be multiples of attention_head_dim, the number of heads ({heads}), "
                f"got {channels}",
            )
        require(0 <= self.dropout < 1, f"dropout must be at least 0 and below 1, got {self.dropout}; 0 switches it off")
        self._check_embeddings()

    def _at(self, name: str, index: int) -> Any:
        value = getattr(self, name)
        return value[index] if isinstance(value, tuple) else value

    def _check_length(self, name: str, count: int) -> None:
        value = getattr(self, name)
        require(
            not isinstance(value, tuple) or len(value) == count,
            f"{name} must be one value or one per member of block_out_channels ({count}), got {value!r}",
        )

    def _check_blocks(self, count: int) -> None:
        for name, choices in (("down_block_types", DOWN_BLOCKS), ("up_block_types", UP_BLOCKS)):
            types = getattr(self, name)
            require(
                len(types) == count,
                f"{name} must have one member per member of block_out_channels ({count}), got {len(types)}",
            )
            for given in types:
                require(given in choices, f"{name} must be of {', '.join(choices)}, got {given!r}; use another model")
        require(
            self.mid_block_type in (MID_BLOCK, None),
            f"mid_block_type must be {MID_BLOCK} or null, got {self.mid_block_type!r}; use another model",
        )

    def _check_embeddings(self) -> None:
        kinds = (None, "timestep", "projection")
        require(
            self.class_embed_type in kinds,
            f"class_embed_type must be null, timestep or projection, got {self.class_embed_type!r}; use another model",
        )
        require(
            self.addition_embed_type in (None, "text", "text_time"),
            f"addition_embed_type must be null, text or text_time, got {self.addition_embed_type!r}; use another model",
        )
        width = self.projection_class_embeddings_input_dim
        if self.class_embed_type == "projection" or self.expects_sizes:
            require(width is not None, "projection_class_embeddings_input_dim is missing; give the width of its input")
        if self.expects_sizes:
            require(self.addition_time_embed_dim is not None, "addition_time_embed_dim is missing; SD XL has 256")
        if self.addition_embed_type == "text":
            states, heads = self.cross_attention_dim, self.addition_embed_type_num_heads
            require(
                isinstance(states, int) and states % heads == 0,
                f"cross_attention_dim must be one multiple of addition_embed_type_num_heads ({heads}), got {states}",
            )


class UNet2DConditionModel(nn.Module):
    """Predict noise (or velocity, or the clean latents: whatever it was trained for) from noisy latents, time and text.

    A new network starts as if its residual blocks and transformers were not there (their last layers are zero), and
    predicts 0 everywhere.

    Source: zero initialisation: Dhariwal and Nichol 2021, arXiv 2105.05233; Goyal et al. 2017, arXiv 1706.02677.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        widths = config.block_out_channels
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(widths[0], config.time_channels, config.time_cond_proj_dim)
        self.class_embedding = _class_embedding(config)
        self.add_embedding = _add_embedding(config)
        down = config.shapes([DOWN_BLOCKS[name] for name in config.down_block_types])
        up = config.shapes([UP_BLOCKS[name] for name in reversed(config.up_block_types)])
        self.down_blocks = nn.ModuleList()
        skips = [widths[0]]  # channels of the maps that the way down leaves for the way up
        for i, shape in enumerate(down):
            self.down_blocks.append(DownBlock(widths[max(i - 1, 0)], shape, downsample=i < last))
            skips += [shape.channels] * (shape.layers + (i < last))
        self.mid_block = MidBlock(config.middle_shape()) if config.mid_block_type else None
        self.up_blocks = nn.ModuleList()
        for i, shape in reversed(list(enumerate(up))):
            joined = [skips.pop() for _ in range(shape.layers + 1)]
            self.up_blocks.append(UpBlock(widths[min(i + 1, last)], joined, shape, upsample=i > 0))
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, widths[0], config.norm_eps)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)
        self._zero_last_layers()

    def forward(
        self,
        sample: Tensor,
        timesteps: Tensor,
        context: Tensor,
        *,
        class_labels: Tensor | None = None,
        added: Mapping[str, Tensor] | None = None,
        context_mask: Tensor | None = None,
    ) -> Tensor:
        """Return the prediction (B, C_out, H, W).

        Args:
            sample: noisy latents (B, C_in, H, W).
            timesteps: (B,), integers or not.
            context: text states (B, L, D).
            class_labels: (B,) numbers, or (B, P) where the config says class_embed_type "projection".
            added: "text_embeds" (B, P) and "time_ids" (B, 6) where it says addition_embed_type "text_time";
                "timestep_cond" (B, G) where it has time_cond_proj_dim, optional.
            context_mask: (B, L), 0 for text tokens to leave out; at least one per row stays.

        Raises:
            InputError: an input that the config asks for is missing.
        """
        time = self.embedded(timesteps, class_labels, added or {})  # (B, 4 * C_0)
        shifts = self._shifts(time, context, context_mask)
        return self._predict(sample, shifts, self.texts(context), _attention_mask(context_mask))[0]

    @torch.no_grad()
    def prepare(
        self,
        timesteps: Tensor,
        context: Tensor,
        *,
        class_labels: Tensor | None = None,
        added: Mapping[str, Tensor] | None = None,
        context_mask: Tensor | None = None,
        texts: Callable[[Tensor], Texts] | None = None,
        shifts: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> PreparedUNet:
        """Compute once what does not change while sampling: all that the network makes of time and of text.

        Args:
            timesteps: (N,), every timestep at which the network will be called.
            context: text states (B, L, D).
            class_labels: as in `forward`.
            added: as in `forward`.
            context_mask: as in `forward`.
            texts: computes what `self.texts` does; None for that.
            shifts: computes what `self.shifts` does without a mask; None for that.

        Returns:
            A function of the sample and of the index of each image's timestep. It holds its own results, so threads may
            prepare and call one network at once. It does not see later changes of the weights that made them.
        """
        labels = None if class_labels is None else class_labels[:, None]
        extra = {name: value[:, None] for name, value in (added or {}).items()}
        time = self.embedded(timesteps[None], labels, extra)  # (B or 1, N, 4 * C_0)
        shifted = self.shifts(time, context, context_mask) if shifts is None else shifts(time, context)
        seen = self.texts(context) if texts is None else texts(context)
        return PreparedUNet(self, shifted, seen, _attention_mask(context_mask))

    def shifts(self, time: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return what is added in all residual blocks, (B or 1, N, sum C).

        Args:
            time: embeddings (B or 1, N, 4 * C_0) of N timesteps.
            context: text states (B, L, D), looked at where addition_embed_type is "text".
            mask: (B, L), 0 for text tokens to leave out, or None.
        """
        return torch.cat(self._shifts(time, context, mask), dim=-1)

    def embedded(self, timesteps: Tensor, class_labels: Tensor | None, added: Mapping[str, Tensor]) -> Tensor:
        """Return the time embedding (..., D) of timesteps (...), with all that is added to it but the text.

        The shapes of the arguments, which are those of `forward`, broadcast.
        """
        config, dtype = self.config, self.conv_in.weight.dtype
        time = self._sinusoidal(timesteps, config.block_out_channels[0]).to(dtype)  # (..., C_0)
        embedding = self.time_embedding(time, added.get("timestep_cond"))  # (..., D)
        if self.class_embedding is not None:
            if class_labels is None:
                raise InputError("this U-Net expects class_labels (its noise level or class) and got none; pass them")
            if config.class_embed_type == "timestep":
                class_labels = self._sinusoidal(class_labels, config.block_out_channels[0])
            if config.class_embed_type is not None:
                class_labels = class_labels.to(dtype)
            embedding = embedding + self.class_embedding(class_labels)
        if config.expects_sizes and self.add_embedding is not None:
            if not {"text_embeds", "time_ids"} <= added.keys():
                raise InputError(
                    f"this U-Net expects text_embeds and time_ids, got {sorted(added)}; pass them as `added`"
                )
            sizes = self._sinusoidal(added["time_ids"], config.addition_time_embed_dim or 0)  # (..., 6, A)
            inputs = torch.cat([added["text_embeds"], sizes.flatten(-2).to(dtype)], dim=-1)  # (..., P + 6 * A)
            embedding = embedding + self.add_embedding(inputs)
        return embedding

    def predict(self, sample: Tensor, shifts: Tensor, texts: Texts, mask: Tensor | None = None) -> Tensor:
        """Return the prediction (B, C_out, H, W) from what `prepare` makes of time and text.

        Args:
            sample: noisy latents (B, C_in, H, W).
            shifts: what is added in all residual blocks, (B, sum C).
            texts: keys and values of each transformer.
            mask: (B, 1, 1, L) bool or None.
        """
        return self.predict_keeping(sample, shifts, texts, mask)[0]

    def predict_keeping(
        self, sample: Tensor, shifts: Tensor, texts: Texts, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return what `predict` does, and the map that the finest level gets from those below, (B, C, H, W)."""
        return self._predict(sample, self._split(shifts), texts, mask)

    def predict_finest(
        self, sample: Tensor, shifts: Tensor, texts: Texts, deep: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """Return the prediction (B, C_out, H, W) by the finest level alone.

        Args:
            sample, shifts, texts, mask: as of `predict`, all of them.
            deep: map from the levels below, which `predict_keeping` returned of another call.

        Source: Ma et al. 2023, arXiv 2312.00858, section 3.3.
        """
        first: Any = self.down_blocks[0]
        last: Any = self.up_blocks[-1]
        later = len(last.resnets), len(last.attentions)
        own = self._split(shifts)
        conditions = BlockInputs(
            iter([*own[: len(first.resnets)], *own[len(own) - later[0] :]]),
            iter([*texts[: len(first.attentions)], *texts[len(texts) - later[1] :]]),
            mask,
        )
        hidden = self.conv_in(sample)  # (B, C_0, H, W)
        skips = [hidden, *first.maps(hidden, conditions)]
        return self._output(last(deep, skips, conditions))

    def attentions_to_text(self) -> list[list[int]]:
        """Return how many attentions look at the text, of each block of each transformer, in the order of `Texts`."""
        return [
            [2 if layer.only_cross else 1 for layer in transformer.transformer_blocks]
            for block in self._blocks()
            for transformer in block.attentions
        ]

    def _shifts(self, time: Tensor, context: Tensor, mask: Tensor | None) -> list[Tensor]:
        """Return what is added in each residual block, (..., C), for time embeddings (B, D) or (B or 1, N, D)."""
        if isinstance(self.add_embedding, TextTimeEmbedding):
            text = self.add_embedding(context.to(time.dtype), mask)  # (B, D)
            time = time + (text[:, None] if time.dim() == 3 else text)
        time = F.silu(time)
        return [resnet.time_emb_proj(time) for resnet in self._resnets()]

    def shift_channels(self) -> list[int]:
        """Return how many channels are shifted in each residual block, those of `shifts` in turn."""
        return [resnet.conv1.out_channels for resnet in self._resnets()]

    def _split(self, shifts: Tensor) -> Sequence[Tensor]:
        return shifts.split(self.shift_channels(), dim=-1)

    def _predict(
        self, sample: Tensor, shifts: Sequence[Tensor], texts: Texts, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        conditions = BlockInputs(iter(shifts), iter(texts), mask)
        hidden = self.conv_in(sample)  # (B, C_0, H, W)
        skips = [hidden]
        for block in self.down_blocks:
            skips += block(skips[-1], conditions)
        hidden = skips[-1]  # (B, C_last, H / 2^n, W / 2^n)
        if self.mid_block is not None:
            hidden = self.mid_block(hidden, conditions)
        for block in self.up_blocks[:-1]:
            hidden = block(hidden, skips, conditions)
        deep = hidden
        return self._output(self.up_blocks[-1](deep, skips, conditions)), deep

    def _output(self, hidden: Tensor) -> Tensor:
        return self.conv_out(activate(self.conv_norm_out(hidden)))  # (B, C_out, H, W)

    def texts(self, context: Tensor) -> Texts:
        """Return keys and values of each transformer to the text states (B, L, D)."""
        return [transformer.keys_values(context) for block in self._blocks() for transformer in block.attentions]

    def _resnets(self) -> list[ResnetBlock2D]:
        return [resnet for block in self._blocks() for resnet in block.resnets]

    def _blocks(self) -> list[Any]:
        middle = [] if self.mid_block is None else [self.mid_block]
        return [*self.down_blocks, *middle, *self.up_blocks]

    def _sinusoidal(self, values: Tensor, channels: int) -> Tensor:
        config = self.config
        return sinusoidal_embedding(values, channels, cosine_first=config.flip_sin_to_cos, shift=config.freq_shift)

    def _zero_last_layers(self) -> None:
        layers: list[nn.Module] = [self.conv_out]
        for block in self._blocks():
            layers += [resnet.conv2 for resnet in block.resnets]
            layers += [transformer.proj_out for transformer in block.attentions]
        for parameter in (parameter for layer in layers for parameter in layer.parameters()):
            nn.init.zeros_(parameter)


class PreparedUNet:
    """A U-Net that has already seen the text and every timestep; `UNet2DConditionModel.prepare` makes it.

    Args:
        unet: whose other layers are used.
        shifts: for each image (or one for all) and timestep, what is added in all residual blocks, (B or 1, N, sum C).
        texts: keys and values of each transformer.
        mask: (B, 1, 1, L) bool or None.
        predict: what computes the rest, `UNet2DConditionModel.predict` of the U-Net or an engine that does the same.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        shifts: Tensor,
        texts: Texts,
        mask: Tensor | None,
        predict: Predict | None = None,
    ) -> None:
        self.unet = unet
        self.predict = unet.predict if predict is None else predict
        self.shifts = shifts
        self.texts = texts
        self.mask = mask

    @torch.no_grad()
    def __call__(self, sample: Tensor, steps: Tensor) -> Tensor:
        """Return the prediction (B, C_out, H, W).

        Args:
            sample: noisy latents (B, C_in, H, W); B as in the context.
            steps: (B,) int64, each image's index into the timesteps given to `prepare`; images may differ.
        """
        rows = torch.arange(len(steps), device=steps.device) if len(self.shifts) > 1 else torch.zeros_like(steps)
        return self.predict(sample, self.shifts[rows, steps], self.texts, self.mask)

    def rows(self, index: slice | Tensor) -> PreparedUNet:
        """Return the same for some of the images: a slice (no copy), or their numbers (int64) in any order."""
        shifts = self.shifts[index] if len(self.shifts) > 1 else self.shifts
        texts = [
            [[(keys[index], values[index]) for keys, values in block] for block in transformer]
            for transformer in self.texts
        ]
        return PreparedUNet(self.unet, shifts, texts, None if self.mask is None else self.mask[index], self.predict)

    def run_by(self, predict: Predict) -> PreparedUNet:
        """Return the same with another function that computes the rest."""
        return PreparedUNet(self.unet, self.shifts, self.texts, self.mask, predict)


def _class_embedding(config: UNetConfig) -> nn.Module | None:
    if config.class_embed_type == "timestep":
        return TimestepEmbedding(config.block_out_channels[0], config.time_channels)
    if config.class_embed_type == "projection":
        return TimestepEmbedding(config.projection_class_embeddings_input_dim or 0, config.time_channels)
    if config.num_class_embeds is not None:
        return nn.Embedding(config.num_class_embeds, config.time_channels)
    return None


def _add_embedding(config: UNetConfig) -> nn.Module | None:
    if config.addition_embed_type == "text":
        assert isinstance(config.cross_attention_dim, int)
        return TextTimeEmbedding(config.cross_attention_dim, config.time_channels, config.addition_embed_type_num_heads)
    if config.expects_sizes:
        return TimestepEmbedding(config.projection_class_embeddings_input_dim or 0, config.time_channels)
    return None


def _attention_mask(context_mask: Tensor | None) -> Tensor | None:
    return None if context_mask is None else context_mask.bool()[:, None, None, :]
