"""The U-Net and the decoder as graphs of tensors: what torch.compile, OpenVINO and ONNX are given."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from latentdiff.models.autoencoder import AutoencoderKL
from latentdiff.models.bert import BertModel
from latentdiff.models.unet import Texts, UNet2DConditionModel

__all__ = [
    "DecoderGraph",
    "EncoderGraph",
    "ShiftsGraph",
    "TextsGraph",
    "Traced",
    "UNetGraph",
    "exported",
    "exported_shifts",
    "exported_texts",
    "flat_texts",
    "graph_of",
    "in_float32",
    "nested_texts",
]

NetworkT = TypeVar("NetworkT", bound=nn.Module)

# Of the inputs that a graph is traced with. Axes of one length would be taken for one and the same axis.
ROWS, HEIGHT, WIDTH, TOKENS, STEPS = 2, 16, 24, 7, 5
MAP = {0: "batch", 2: "height", 3: "width"}  # axes of a map that may have other lengths
WORDS = {0: "batch", 1: "tokens"}  # and of tokens


class Traced(NamedTuple):
    """A network that can be traced, in float32 and evaluation mode.

    Attributes:
        network: takes `inputs`.
        inputs: examples.
        names: of the inputs.
        dynamic: for each input the axes that may have other lengths, by what they are called.
    """

    network: nn.Module
    inputs: tuple[Tensor, ...]
    names: tuple[str, ...]
    dynamic: tuple[dict[int, str], ...]

    def axes(self, length: Callable[[str], Any]) -> tuple[Any, ...]:
        """Return `dynamic` as exporters take it, in the form of the arguments, with what stands for a length."""
        axes = tuple({axis: length(name) for axis, name in one.items()} for one in self.dynamic)
        return (*axes[:2], axes[2:]) if isinstance(self.network, UNetGraph) else axes


class UNetGraph(nn.Module):
    """A U-Net that takes time and text as `UNet2DConditionModel.prepare` makes them, in a row of tensors."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.unet = unet
        self.layout = unet.attentions_to_text()

    def forward(self, sample: Tensor, shifts: Tensor, *texts: Tensor) -> Tensor:
        """Return the prediction (B, C_out, H, W).

        Args:
            sample: noisy latents (B, C_in, H, W).
            shifts: (B, sum C).
            texts: keys and values (B, heads, L, d) of all attentions to the text in turn.
        """
        return self.unet.predict(sample, shifts, nested_texts(texts, self.layout))


class TextsGraph(nn.Module):
    """What a U-Net makes of the text, once for all steps, in a row of tensors as `UNetGraph` takes them."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, context: Tensor) -> tuple[Tensor, ...]:
        """Return keys and values (B, heads, L, d) of all attentions to the text states (B, L, D) in turn."""
        return tuple(tensor.contiguous() for tensor in flat_texts(self.unet.texts(context)))


class ShiftsGraph(nn.Module):
    """What a U-Net whose time embedding has the text in it adds in its residual blocks, once for all steps."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, time: Tensor, context: Tensor) -> Tensor:
        """Return (B, N, sum C) for embeddings (B, N, D) of timesteps and text states (B, L, D)."""
        return self.unet.shifts(time, context)


class EncoderGraph(nn.Module):
    """A text encoder from the vectors of tokens, which a table has, to the states of its last layer."""

    def __init__(self, encoder: BertModel) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, words: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the states (B, L, D) of tokens (B, L, D), given which of them are no padding (B, L)."""
        masked = self.encoder.config.use_attention_mask
        return self.encoder.encode(words, attention_mask if masked else None).last_hidden_state


class DecoderGraph(nn.Module):
    """An autoencoder that decodes."""

    def __init__(self, autoencoder: AutoencoderKL) -> None:
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, latents: Tensor) -> Tensor:
        """Return images (B, 3, H, W) of unscaled latents (B, C, h, w)."""
        return self.autoencoder.decode(latents)


def graph_of(network: UNet2DConditionModel | AutoencoderKL) -> UNetGraph | DecoderGraph:
    """Return a network as a graph of tensors, in evaluation mode; its weights are shared."""
    return (DecoderGraph(network) if isinstance(network, AutoencoderKL) else UNetGraph(network)).eval()


def flat_texts(texts: Texts) -> list[Tensor]:
    """Return the keys and values of all attentions in turn, as `UNetGraph` takes them."""
    return [tensor for transformer in texts for block in transformer for pair in block for tensor in pair]


def nested_texts(texts: Sequence[Tensor], layout: list[list[int]]) -> Texts:
    """Return the keys and values of all attentions by transformer, block and attention; see `attentions_to_text`."""
    pairs = iter(zip(texts[::2], texts[1::2]))
    return [[[next(pairs) for _ in range(count)] for count in transformer] for transformer in layout]


def exported(network: UNet2DConditionModel | AutoencoderKL | BertModel) -> Traced:
    """Return a network with what it takes to trace it for any batch, size and length of text.

    Its weights are shared, but for a copy where they are not in float32.
    """
    network = in_float32(network)
    if isinstance(network, AutoencoderKL):
        latents = torch.randn(ROWS, network.config.latent_channels, HEIGHT, WIDTH)
        return Traced(DecoderGraph(network).eval(), (latents,), ("latents",), (MAP,))
    if isinstance(network, BertModel):
        words = torch.randn(ROWS, TOKENS, network.config.hidden_size)
        mask = (torch.arange(TOKENS)[None] < torch.tensor([[TOKENS], [2]])).long()
        return Traced(EncoderGraph(network).eval(), (words, mask), ("words", "attention_mask"), (WORDS, WORDS))
    config, width = network.config, _context_width(network)
    sample = torch.randn(ROWS, config.in_channels, HEIGHT, WIDTH)
    with torch.no_grad():
        texts = flat_texts(network.texts(torch.randn(ROWS, TOKENS, width)))
    shifts = torch.randn(ROWS, sum(resnet.conv1.out_channels for resnet in network._resnets()))
    names = [f"{kind}_{number}" for number in range(len(texts) // 2) for kind in ("keys", "values")]
    axes = [MAP, {0: "batch"}, *({0: "batch", 2: "tokens"} for _ in texts)]
    inputs = (sample, shifts, *(tensor.contiguous() for tensor in texts))
    return Traced(UNetGraph(network).eval(), inputs, ("sample", "shifts", *names), tuple(axes))


def exported_texts(unet: UNet2DConditionModel) -> Traced:
    """Return what a U-Net makes of the text with what it takes to trace it; see `exported`."""
    unet = in_float32(unet)
    return Traced(TextsGraph(unet).eval(), (torch.randn(ROWS, TOKENS, _context_width(unet)),), ("context",), (WORDS,))


def exported_shifts(unet: UNet2DConditionModel) -> Traced:
    """Return what a U-Net adds in its residual blocks with what it takes to trace it; see `exported`."""
    unet = in_float32(unet)
    inputs = torch.randn(ROWS, STEPS, unet.config.time_channels), torch.randn(ROWS, TOKENS, _context_width(unet))
    axes = {0: "batch", 1: "steps"}, WORDS
    return Traced(ShiftsGraph(unet).eval(), inputs, ("time", "context"), axes)


def _context_width(unet: UNet2DConditionModel) -> int:
    width = unet.config.cross_attention_dim
    return width if isinstance(width, int) else width[0]


def in_float32(network: NetworkT) -> NetworkT:
    """Return a network in float32, itself where it is."""
    return network if next(network.parameters()).dtype == torch.float32 else copy.deepcopy(network).float()
