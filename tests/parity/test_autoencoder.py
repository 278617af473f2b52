"""The autoencoder against diffusers: same weights, same numbers, and each reads the other's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL as Reference

from latentdiff.models.autoencoder import AutoencoderConfig, AutoencoderKL
from tests.models.tiny import AUTOENCODERS, randomize, relative_error
from tests.parity.published import AUTOENCODERS as PUBLISHED
from tests.parity.published import shapes_on_meta


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_same_numbers(name: str) -> None:
    reference = Reference.from_config(AUTOENCODERS[name] | _block_types(name)).eval()
    randomize(reference)
    ours = AutoencoderKL(AutoencoderConfig.from_dict(dict(reference.config)))
    ours.load_state_dict(reference.state_dict(), strict=True)
    images = torch.randn(2, 3, 16, 24)
    with torch.no_grad():
        expected, posterior = reference.encode(images).latent_dist, ours.encode(images)
        assert relative_error(posterior.mean, expected.mean) < 1e-5
        assert relative_error(posterior.logvar, expected.logvar) < 1e-5
        assert relative_error(posterior.kl(), expected.kl()) < 1e-5
        assert relative_error(ours.decode(expected.mean), reference.decode(expected.mean).sample) < 1e-5
        drawn = expected.sample(torch.Generator().manual_seed(4))
        assert relative_error(posterior.sample(torch.Generator().manual_seed(4)), drawn) < 1e-5


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_diffusers_reads_what_we_write(name: str, tmp_path: Path) -> None:
    ours = AutoencoderKL(AutoencoderConfig.from_dict(AUTOENCODERS[name]))
    reference = Reference.from_config(ours.config.to_dict())
    reference.load_state_dict(ours.state_dict(), strict=True)
    reference.save_pretrained(tmp_path)
    assert AutoencoderConfig.from_dict(Reference.load_config(tmp_path)) == ours.config


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_have_the_same_weights(name: str) -> None:
    reference = shapes_on_meta(lambda: Reference.from_config(PUBLISHED[name]))
    assert shapes_on_meta(lambda: AutoencoderKL(AutoencoderConfig.from_dict(PUBLISHED[name]))) == reference


def _block_types(name: str) -> dict[str, list[str]]:
    count = len(AUTOENCODERS[name]["block_out_channels"])
    return {"down_block_types": ["DownEncoderBlock2D"] * count, "up_block_types": ["UpDecoderBlock2D"] * count}
