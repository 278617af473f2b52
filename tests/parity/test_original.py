"""The original layout against diffusers' own converters, which read it, for every published shape."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.loaders import single_file_utils as theirs
from torch import Tensor, nn
from transformers import CLIPTextConfig as TheirConfig
from transformers import CLIPTextModelWithProjection

from latentdiff.checkpoints.compvis_keys import autoencoder_keys, clip_keys, join, open_clip_keys, unet_keys
from latentdiff.models.autoencoder import AutoencoderConfig, AutoencoderKL
from latentdiff.models.clip import CLIPTextConfig, CLIPTextModel
from latentdiff.models.unet import UNet2DConditionModel, UNetConfig
from tests.parity.published import AUTOENCODERS, UNETS

TEXT = {
    "bos_token_id": 48,
    "eos_token_id": 49,
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "projection_dim": 16,
    "num_hidden_layers": 3,
}


def small(config: dict[str, Any]) -> dict[str, Any]:
    """The same shape with few channels, whose tensors are cheap."""
    widths = config["block_out_channels"]
    narrow = [32 * (1 + i) for i in range(len(widths))]
    return {**config, "block_out_channels": narrow, "attention_head_dim": 2, "cross_attention_dim": 8}


def weights(network: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.rand(tensor.shape, generator=generator) for name, tensor in network.state_dict().items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("name", [name for name in UNETS if name != "lcm-dreamshaper"])
def test_unets(name: str) -> None:
    config = small(UNETS[name])
    with torch.device("meta"):
        network = UNet2DConditionModel(UNetConfig.from_dict(config))
    own = weights(network)
    places = unet_keys(own, network.config)
    there = join(places, own)
    prefixed = {f"model.diffusion_model.{key}": tensor for key, tensor in there.items()}
    assert_same(theirs.convert_ldm_unet_checkpoint(prefixed, config), own)
    assert_same({key: place.take(there[place.name]) for key, place in places.items()}, own)


@pytest.mark.parametrize("name", list(AUTOENCODERS))
def test_autoencoders(name: str) -> None:
    config = AUTOENCODERS[name]
    with torch.device("meta"):
        network = AutoencoderKL(AutoencoderConfig.from_dict({**config, "norm_num_groups": 8, **_narrow(config)}))
    own = weights(network)
    places = autoencoder_keys(own, network.config)
    there = join(places, own)
    prefixed = {f"first_stage_model.{key}": tensor for key, tensor in there.items()}
    assert_same(theirs.convert_ldm_vae_checkpoint(prefixed, network.config.to_dict()), own)
    assert all(place.shape(tuple(own[key].shape)) == tuple(there[place.name].shape) for key, place in places.items())
    assert_same({key: place.take(there[place.name]) for key, place in places.items()}, own)


def _narrow(config: dict[str, Any]) -> dict[str, Any]:
    return {"block_out_channels": [8 * (1 + i) for i in range(len(config["block_out_channels"]))]}


def test_text_encoders_of_open_clip() -> None:
    network = CLIPTextModel(CLIPTextConfig.from_dict({**TEXT, "num_attention_heads": 2, "with_projection": True}))
    own = weights(network)
    places = open_clip_keys(own)
    there = join(places, own)
    peer = CLIPTextModelWithProjection(TheirConfig(**TEXT, num_attention_heads=2))
    prefix = "conditioner.embedders.1.model."  # as in Stable Diffusion XL
    prefixed = {prefix + key: tensor for key, tensor in there.items()}
    assert_same(theirs.convert_open_clip_checkpoint(peer, prefixed, prefix), own)
    assert_same({key: place.take(there[place.name]) for key, place in places.items()}, own)
    assert {key: place.name for key, place in clip_keys(own).items()} == {key: key for key in own}
