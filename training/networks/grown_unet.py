"""More of the U-Net that training starts from: residual blocks, attention, transformer blocks, channels of latents."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from latentdiff.errors import InputError
from latentdiff.models.unet import UNet2DConditionModel, UNetConfig

IN_UP_BLOCK = re.compile(r"^(up_blocks\.(\d+)\.(?:resnets|attentions))\.(\d+)\.(.*)$")
# Layers by which a residual block, a transformer and a block of one add to what they are given.
RESNET_ENDS, TRANSFORMER_ENDS, BLOCK_ENDS = (".conv2.",), (".proj_out.",), (".to_out.0.", ".ff.net.2.")


@torch.no_grad()
def grown_unet(started: UNet2DConditionModel, changes: Mapping[str, Any]) -> UNet2DConditionModel:
    """Return a U-Net with more layers or channels of latents than another, that draws what the other draws.

    What is new begins by adding 0 (Chen et al. 2016, Net2Net, arXiv 1511.05641). Residual blocks are added at the end
    of a level on the way down, and after the first one of the level on the way up; channels after those that are there.

    Args:
        changes: keys of `UNetConfig` with other values, those of `config.checks.GROWING`.

    Raises:
        InputError: it would have less somewhere, or layers of other shapes.
        ModelConfigError: the values do not fit the other keys.
    """
    grown = UNet2DConditionModel(UNetConfig.from_dict({**started.config.to_dict(), **changes}))
    own, weights = grown.state_dict(), _places(started, grown)
    for name in ("conv_in.weight", "conv_out.weight", "conv_out.bias"):
        more = [new - old for new, old in zip(own[name].shape, weights[name].shape)]
        if min(more) >= 0:
            weights[name] = F.pad(weights[name], [side for size in reversed(more) for side in (0, size)])
    lost = next((name for name, tensor in weights.items() if name not in own or own[name].shape != tensor.shape), None)
    if lost is not None:
        raise InputError(f"model changes layers of the U-Net of start_from, {lost} first; its keys can only add some")
    for name in own.keys() - weights.keys():
        transformer, _, inside = name.partition(".transformer_blocks.")
        grows_a_transformer = inside and f"{transformer}.proj_out.weight" in weights
        ends = BLOCK_ENDS if grows_a_transformer else RESNET_ENDS + TRANSFORMER_ENDS
        if any(end in name for end in ends):
            own[name].zero_()
        elif name.endswith("conv_shortcut.weight"):  # which then passes on the first channels, those from below
            own[name].copy_(torch.eye(*own[name].shape[:2])[:, :, None, None])
        elif name.endswith("conv_shortcut.bias"):
            own[name].zero_()
    grown.load_state_dict({**own, **weights})
    return grown.to(next(started.parameters()).device)


def _places(started: UNet2DConditionModel, grown: UNet2DConditionModel) -> dict[str, Tensor]:
    """Return the weights of a U-Net by their names in the grown one.

    On the way up the first layer of a level sees the last map of the way down, the second the one before it, and so on:
    the layers that are added come after the first.
    """
    added = [len(new.resnets) - len(old.resnets) for new, old in zip(grown.up_blocks, started.up_blocks)]  # type: ignore[union-attr, arg-type]
    weights = {}
    for name, tensor in started.state_dict().items():
        if found := IN_UP_BLOCK.match(name):
            part, block, layer, rest = found.groups()
            name = f"{part}.{int(layer) + (added[int(block)] if int(layer) else 0)}.{rest}"
        weights[name] = tensor
    return weights
