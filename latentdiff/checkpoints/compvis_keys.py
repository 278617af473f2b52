"""Map weight names between the original (CompVis, sgm) layout and diffusers'.

A single file holds all networks of a model, each under a prefix. Our names are those of diffusers and transformers, so
the tables below are the only place where a weight has another name. They say for each weight of ours where it comes
from; read the other way, they write a file in the original layout.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from latentdiff.models.autoencoder import AutoencoderConfig
from latentdiff.models.unet import UP_BLOCKS, UNetConfig

__all__ = [
    "OLD_ATTENTION",
    "SourceKey",
    "autoencoder_keys",
    "clip_keys",
    "diffusers_keys",
    "join",
    "open_clip_keys",
    "unet_keys",
]

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "class_embedding": "label_emb",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
AUTOENCODER_MIDDLE = {"resnets.0": "block_1", "attentions.0": "attn_1", "resnets.1": "block_2"}
AUTOENCODER_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
# Names of the attention layer in autoencoders of diffusers that were published before 2023.
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
OPEN_CLIP_ENDS = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
}
OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
HEADS = ("q_proj", "k_proj", "v_proj")  # in this order, one below the other, in one tensor there


@dataclass(frozen=True)
class SourceKey:
    """Where a weight of ours lies in the original layout.

    Attributes:
        name: of the tensor there.
        part: which third of its rows is ours; None for all.
        transposed: whether rows and columns are exchanged there.
        as_convolution: whether it has two more axes of length one there.
    """

    name: str
    part: int | None = None
    transposed: bool = False
    as_convolution: bool = False

    def shape(self, ours: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the tensor there, given that of our weight."""
        if self.part is not None:
            ours = (3 * ours[0], *ours[1:])
        if self.transposed:
            ours = ours[::-1]
        return (*ours, 1, 1) if self.as_convolution else ours

    def take(self, tensor: Tensor) -> Tensor:
        """Return our weight, a view of the tensor there."""
        if self.as_convolution and tensor.ndim == 4:  # newer files have it as we do
            tensor = tensor[..., 0, 0]
        if self.transposed:
            tensor = tensor.T
        return tensor if self.part is None else tensor.chunk(3)[self.part]


def join(key_map: Mapping[str, SourceKey], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights, named as here, in the original layout."""
    components: dict[str, dict[int, Tensor]] = {}
    for ours, source in key_map.items():
        tensor = weights[ours]
        if source.transposed:
            tensor = tensor.T.contiguous()
        if source.as_convolution:
            tensor = tensor[..., None, None]
        components.setdefault(source.name, {})[source.part or 0] = tensor
    return {name: torch.cat([found[part] for part in sorted(found)]) for name, found in components.items()}


def unet_keys(names: Iterable[str], config: UNetConfig) -> dict[str, SourceKey]:
    """Return where the weights of a U-Net lie, below `model.diffusion_model.`."""
    assert isinstance(config.layers_per_block, int)
    blocks = config.layers_per_block + 1  # of each level there
    attended = [UP_BLOCKS[kind] for kind in config.up_block_types]

    def source(name: str) -> str:
        stem, leaf = name.rsplit(".", 1)
        if stem in UNET_ENDS:
            return f"{UNET_ENDS[stem]}.{leaf}"
        side, level, kind, index, rest = _block(stem)
        inner = f"{RESNET.get(rest, rest) if kind == 'resnets' else rest}.{leaf}"
        if side == "mid":
            return f"middle_block.{1 if kind == 'attentions' else 2 * index}.{inner}"
        if kind == "downsamplers":
            return f"input_blocks.{(level + 1) * blocks}.0.op.{leaf}"
        if kind == "upsamplers":  # behind the last layer of its level
            return f"output_blocks.{(level + 1) * blocks - 1}.{1 + attended[level]}.conv.{leaf}"
        number = level * blocks + index
        top = f"input_blocks.{number + 1}" if side == "down" else f"output_blocks.{number}"
        return f"{top}.{int(kind == 'attentions')}.{inner}"

    return {name: SourceKey(source(name)) for name in names}


def autoencoder_keys(names: Iterable[str], config: AutoencoderConfig) -> dict[str, SourceKey]:
    """Return where the weights of an autoencoder lie, below `first_stage_model.`."""
    levels = len(config.block_out_channels)

    def source(name: str) -> SourceKey:
        half, _, rest = name.partition(".")
        if half in ("quant_conv", "post_quant_conv"):
            return SourceKey(name)
        stem, leaf = rest.rsplit(".", 1)
        if not re.match("(mid|down|up)_block", stem):
            return SourceKey(f"{half}.{stem.replace('conv_norm_out', 'norm_out')}.{leaf}")
        side, level, kind, index, inner = _block(stem)
        if side == "mid":
            middle = AUTOENCODER_MIDDLE[f"{kind}.{index}"]
            inner = AUTOENCODER_ATTENTION[inner] if kind == "attentions" else inner
            matrix = kind == "attentions" and leaf == "weight" and inner != "norm"
            return SourceKey(f"{half}.mid.{middle}.{_shortcut(inner)}.{leaf}", as_convolution=matrix)
        level = level if side == "down" else levels - 1 - level
        if kind in ("downsamplers", "upsamplers"):
            return SourceKey(f"{half}.{side}.{level}.{kind[:-3]}e.{inner}.{leaf}")
        return SourceKey(f"{half}.{side}.{level}.block.{index}.{_shortcut(inner)}.{leaf}")

    return {name: source(name) for name in names}


def clip_keys(names: Iterable[str]) -> dict[str, SourceKey]:
    """Return where the weights of a CLIP text encoder lie, below its `transformer.`: under the names they have here."""
    return {name: SourceKey(name) for name in names}


def diffusers_keys(names: Iterable[str], *, old: bool) -> dict[str, SourceKey]:
    """Return where the weights of an autoencoder lie in a file of diffusers, `old` for one of before 2023."""

    def source(name: str) -> str:
        stem, leaf = name.rsplit(".", 1)
        for theirs, ours in OLD_ATTENTION.items():
            if old and ".attentions." in stem and stem.endswith(f".{ours}"):
                return f"{stem.removesuffix(ours)}{theirs}.{leaf}"
        return name

    return {name: SourceKey(source(name)) for name in names}


def open_clip_keys(names: Iterable[str]) -> dict[str, SourceKey]:
    """Return where the weights of a text encoder trained by OpenCLIP lie, below its `model.`."""

    def source(name: str) -> SourceKey:
        if name in OPEN_CLIP_ENDS:
            return SourceKey(OPEN_CLIP_ENDS[name])
        if name == "text_projection.weight":
            return SourceKey("text_projection", transposed=True)
        found = re.fullmatch(r"text_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
        assert found is not None, name
        layer, inner, leaf = found.groups()
        head = inner.removeprefix("self_attn.")
        if head in HEADS:
            return SourceKey(f"transformer.resblocks.{layer}.attn.in_proj_{leaf}", part=HEADS.index(head))
        return SourceKey(f"transformer.resblocks.{layer}.{OPEN_CLIP_LAYER[inner]}.{leaf}")

    return {name: source(name) for name in names}


def _block(stem: str) -> tuple[str, int, str, int, str]:
    """Split "down_blocks.1.resnets.0.conv1" into side, level (0 in the middle), kind, index and the rest."""
    found = re.fullmatch(r"(mid|down|up)_blocks?(?:\.(\d+))?\.([a-z]+)\.(\d+)\.(.+)", stem)
    assert found is not None, stem
    side, level, kind, index, rest = found.groups()
    return side, int(level or 0), kind, int(index), rest


def _shortcut(inner: str) -> str:
    return inner.replace("conv_shortcut", "nin_shortcut")
