"""The U-Net against diffusers: same weights, same numbers, and each reads the other's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel as Reference
from torch import Tensor

from latentdiff.models.unet import UNet2DConditionModel, UNetConfig
from tests.models.tiny import UNETS, randomize, relative_error, unet_inputs
from tests.parity.published import UNETS as PUBLISHED
from tests.parity.published import shapes_on_meta


def both(name: str) -> tuple[UNet2DConditionModel, Any]:
    reference = Reference.from_config(UNETS[name]).eval()
    randomize(reference)
    ours = UNet2DConditionModel(UNetConfig.from_dict(dict(reference.config)))
    ours.load_state_dict(reference.state_dict(), strict=True)
    return ours, reference


def call(reference: Any, inputs: dict[str, Any]) -> Tensor:
    """Call diffusers' network with our names of arguments."""
    added = inputs.get("added") or {}
    with torch.no_grad():
        return reference(
            inputs["sample"],
            inputs["timesteps"],
            inputs["context"],
            class_labels=inputs.get("class_labels"),
            timestep_cond=added.get("timestep_cond"),
            added_cond_kwargs=added,
            encoder_attention_mask=inputs.get("context_mask"),
        ).sample


@pytest.mark.parametrize("size", [(16, 16), (7, 10)])
@pytest.mark.parametrize("name", UNETS)
def test_same_numbers(name: str, size: tuple[int, int]) -> None:
    ours, reference = both(name)
    inputs = unet_inputs(ours.config, size)
    with torch.no_grad():
        assert relative_error(ours(**inputs), call(reference, inputs)) < 1e-5


@pytest.mark.parametrize("name", ["sd1", "xl"])
def test_same_numbers_with_a_mask_and_fractional_timesteps(name: str) -> None:
    ours, reference = both(name)
    inputs = unet_inputs(ours.config) | {
        "context_mask": torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]),
        "timesteps": torch.tensor([0.25, 980.5]),
    }
    with torch.no_grad():
        assert relative_error(ours(**inputs), call(reference, inputs)) < 1e-5


@pytest.mark.parametrize("name", ["sd2", "x4-upscaler"])
def test_same_gradients(name: str) -> None:
    ours, reference = both(name)
    inputs = unet_inputs(ours.config)
    ours(**inputs).square().mean().backward()
    reference(
        inputs["sample"], inputs["timesteps"], inputs["context"], class_labels=inputs.get("class_labels")
    ).sample.square().mean().backward()
    expected = {key: weight.grad for key, weight in reference.named_parameters()}
    largest = max(gradient.abs().max() for gradient in expected.values())
    for key, weight in ours.named_parameters():
        assert weight.grad is not None
        assert (weight.grad - expected[key]).abs().max() / largest < 1e-5, key


@pytest.mark.parametrize("name", UNETS)
def test_diffusers_reads_what_we_write(name: str, tmp_path: Path) -> None:
    ours = UNet2DConditionModel(UNetConfig.from_dict(UNETS[name]))
    reference = Reference.from_config(ours.config.to_dict())
    reference.load_state_dict(ours.state_dict(), strict=True)
    reference.save_config(tmp_path)
    assert UNetConfig.from_dict(Reference.load_config(tmp_path)) == ours.config


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_have_the_same_weights(name: str) -> None:
    reference = shapes_on_meta(lambda: Reference.from_config(PUBLISHED[name]))
    assert shapes_on_meta(lambda: UNet2DConditionModel(UNetConfig.from_dict(PUBLISHED[name]))) == reference
