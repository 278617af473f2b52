"""LoRA while it is trained: thin layers beside those of a frozen network, whose outputs are added to theirs.

The network itself keeps its names, weights and forward pass; the thin layers are called by hooks on its layers.

Source: Hu et al. 2021, arXiv 2106.09685, section 4.1; of convolutions (LoCon): Yeh et al. 2023, arXiv 2309.14859.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from latentdiff.errors import InputError
from latentdiff.models.lora import Factors, layers_of

from ..config import LoraConfig
from ..data.batches import Conditioning

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

# Which layers of a U-Net each kind is.
KINDS = {
    "attention": r"attn[12]\.to_(q|k|v|out\.0)|proj_(in|out)",
    "feed_forward": r"ff\.net\.(0\.proj|2)",
    "convolution": r"(conv1|conv2|conv_shortcut)|(down|up)samplers\.0\.conv",
}


class LoraLayer(nn.Module):
    """What is added to the output of one layer: alpha / rank * up(down(dropout(x))); zero at the start."""

    def __init__(self, layer: nn.Linear | nn.Conv2d, config: LoraConfig) -> None:
        super().__init__()
        self.alpha = float(config.rank if config.alpha is None else config.alpha)
        self.scale = self.alpha / config.rank
        self.dropout = nn.Dropout(config.dropout)
        self.down: nn.Linear | nn.Conv2d
        self.up: nn.Linear | nn.Conv2d
        if isinstance(layer, nn.Linear):
            self.down = nn.Linear(layer.in_features, config.rank, bias=False)
            self.up = nn.Linear(config.rank, layer.out_features, bias=False)
        else:
            kernel: Any = {"kernel_size": layer.kernel_size, "stride": layer.stride, "padding": layer.padding}
            self.down = nn.Conv2d(layer.in_channels, config.rank, bias=False, **kernel)
            self.up = nn.Conv2d(config.rank, layer.out_channels, 1, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return what is added, of the shape of the layer's output, for the layer's input."""
        return self.scale * self.up(self.down(self.dropout(x)))

    def factors(self, dtype: torch.dtype) -> Factors:
        """Return the same as a LoRA file has it."""
        return Factors(self.down.weight.detach().to(dtype), self.up.weight.detach().to(dtype), self.alpha)


class Adapted(nn.Module):
    """A frozen network with thin layers beside some of its own, called as the network is.

    Attributes:
        network: the frozen one, which itself gives the adapted output.
        adapters: the thin layers, by name of their layer with "/" for ".".
    """

    def __init__(self, network: nn.Module, config: LoraConfig) -> None:
        super().__init__()
        pattern = re.compile(rf"(.*\.)?({'|'.join(KINDS[kind] for kind in config.layers)})")
        chosen = {name: layer for name, layer in layers_of(network).items() if pattern.fullmatch(name)}
        if not chosen:
            raise InputError(f"lora.layers {', '.join(config.layers)}: the network has none of them; choose others")
        self.network = network.requires_grad_(False)
        self.adapters = nn.ModuleDict({name.replace(".", "/"): LoraLayer(one, config) for name, one in chosen.items()})
        for name, layer in chosen.items():
            layer.register_forward_hook(_adding(self.adapters[name.replace(".", "/")]))

    def train(self, mode: bool = True) -> Self:
        """Switch the thin layers' dropout on or off; the network has none, since it is not trained."""
        super().train(mode)
        self.network.eval()
        return self

    def forward(self, *inputs: Tensor, **options: Unpack[Conditioning]) -> Tensor:
        """Return what the network does."""
        return self.network(*inputs, **options)

    def factors(self, dtype: torch.dtype = torch.float32) -> Mapping[str, Factors]:
        """Return the thin layers by name of their layer, as `models.lora.LoRA` has those of one network."""
        layers: Any = self.adapters.items()
        return {name.replace("/", "."): layer.factors(dtype) for name, layer in layers}


def _adding(adapter: nn.Module) -> Any:
    def add(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + adapter(inputs[0])

    return add
