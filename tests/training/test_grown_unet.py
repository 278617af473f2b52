"""A U-Net that training gives more layers than the one it starts from has."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from latentdiff.training.networks.grown_unet import grown_unet

from latentdiff.errors import InputError, ModelConfigError
from latentdiff.models.unet import UNet2DConditionModel, UNetConfig
from tests.models.tiny import randomize

ATTENDED = {
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
}

DEEPER = {"transformer_layers_per_block": 2}
FINER = {"layers_per_block": [3, 1]}
ALL = {**ATTENDED, **DEEPER, "layers_per_block": [2, 3]}


@pytest.fixture
def started() -> UNet2DConditionModel:
    """A U-Net with attention at the coarser of two resolutions."""
    config: dict[str, Any] = {
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        "block_out_channels": [8, 16],
        "layers_per_block": 1,
        "cross_attention_dim": 12,
        "attention_head_dim": 2,
        "norm_num_groups": 4,
    }
    unet = UNet2DConditionModel(UNetConfig.from_dict(config)).eval()
    randomize(unet)
    return unet


@pytest.mark.parametrize("changes", [ATTENDED, {**ATTENDED, "only_cross_attention": [True, False]}, DEEPER, FINER, ALL])
def test_what_is_grown_begins_by_changing_nothing_and_learns(
    started: UNet2DConditionModel, changes: dict[str, Any]
) -> None:
    grown = grown_unet(started, changes).eval()
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([3, 500]), torch.randn(2, 5, 12)
    torch.testing.assert_close(grown(*inputs), started(*inputs))
    new = {name: tensor for name, tensor in grown.named_parameters() if name not in dict(started.named_parameters())}
    assert new and UNetConfig.from_dict(grown.config.to_dict()) == grown.config
    grown(*inputs).square().mean().backward()
    last = [name for name, tensor in new.items() if not tensor.any() and name.endswith(".weight")]
    assert last and all(new[name].grad is not None and new[name].grad.any() for name in last)


def test_new_channels_of_latents_are_not_seen_at_first_and_learn(started: UNet2DConditionModel) -> None:
    grown = grown_unet(started, {"in_channels": 6, "out_channels": 6}).eval()
    times, states, noisy = torch.tensor([3, 500]), torch.randn(2, 5, 12), torch.randn(2, 6, 8, 8)
    found = grown(noisy, times, states)
    torch.testing.assert_close(found[:, :4], started(noisy[:, :4], times, states))
    assert not found[:, 4:].any()
    (found - noisy).square().mean().backward()
    gradients = grown.conv_in.weight.grad, grown.conv_out.weight.grad
    assert gradients[0] is not None and gradients[0][:, 4:].any()
    assert gradients[1] is not None and gradients[1][4:].any()


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"down_block_types": ["DownBlock2D"] * 2}, InputError, "changes layers of the U-Net of start_from, down_blo"),
        ({"layers_per_block": 3, "block_out_channels": [8, 24]}, InputError, "changes layers"),
        ({"in_channels": 3}, InputError, "changes layers .* conv_in.weight"),
        ({"only_cross_attention": True}, InputError, r"changes layers .*attn1.to_k"),
        ({"down_block_types": ["CrossAttnDownBlock2D"]}, ModelConfigError, "down_block_types"),
        ({"transformer_layers_per_block": "two"}, ModelConfigError, "transformer_layers_per_block"),
    ],
)
def test_what_cannot_grow(
    started: UNet2DConditionModel, changes: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        grown_unet(started, changes)
