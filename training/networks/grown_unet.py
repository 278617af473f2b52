"""More attention in the U-Net that training starts from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from latentdiff.errors import InputError
from latentdiff.models.unet import UNet2DConditionModel, UNetConfig

# Layers by which a transformer adds to what it is given, and those by which a block of one does.
TRANSFORMER_ENDS, BLOCK_ENDS = (".proj_out.",), (".to_out.0.", ".ff.net.2.")


@torch.no_grad()
def grown_unet(started: UNet2DConditionModel, changes: Mapping[str, Any]) -> UNet2DConditionModel:
    """Return a U-Net with attention where another has none, or more of it, that draws what the other draws.

    What is new begins by adding 0 (Chen et al. 2016, Net2Net, arXiv 1511.05641).

    Args:
        changes: keys of `UNetConfig` with other values, those of `config.checks.GROWING`.

    Raises:
        InputError: it would have less somewhere, or layers of other shapes.
        ModelConfigError: the values do not fit the other keys.
    """
    grown = UNet2DConditionModel(UNetConfig.from_dict({**started.config.to_dict(), **changes}))
    own, weights = grown.state_dict(), started.state_dict()
    lost = next((name for name, tensor in weights.items() if name not in own or own[name].shape != tensor.shape), None)
    if lost is not None:
        raise InputError(f"model changes layers of the U-Net of start_from, {lost} first; its keys can only add some")
    for name in own.keys() - weights.keys():
        transformer, _, _ = name.partition(".transformer_blocks.")
        ends = BLOCK_ENDS if f"{transformer}.proj_out.weight" in weights else TRANSFORMER_ENDS
        if any(end in name for end in ends):
            own[name].zero_()
    grown.load_state_dict({**own, **weights})
    return grown.to(next(started.parameters()).device)
