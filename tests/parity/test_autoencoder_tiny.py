"""The tiny decoder against diffusers' AutoencoderTiny, its file beside a model, and the previews it makes."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderTiny as Reference

from latentdiff import Pipeline
from latentdiff.checkpoints import save_pipeline
from latentdiff.checkpoints.folder import TINY_DECODER
from latentdiff.errors import ModelConfigError, ModelLoadError
from latentdiff.models.autoencoder_tiny import AutoencoderTiny, AutoencoderTinyConfig
from latentdiff.serve.preview import CheapPreview
from tests.models.tiny import randomize, relative_error

SHAPE = {"decoder_block_out_channels": [8, 8], "num_decoder_blocks": [2, 1], "latent_channels": 4}


@pytest.fixture
def with_decoder(built_model: Path, tmp_path: Path) -> Path:
    """A model with a tiny decoder as diffusers saves it, its encoder too."""
    model = shutil.copytree(built_model, tmp_path / "model")
    randomize(reference := Reference(**SHAPE, encoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1)))
    reference.save_pretrained(model / TINY_DECODER)
    return model


def test_a_model_has_the_decoder_that_diffusers_saved(with_decoder: Path, tmp_path: Path) -> None:
    components = Pipeline.from_pretrained(with_decoder, device="cpu").components
    found, reference = components.tiny_decoder, Reference.from_pretrained(with_decoder / TINY_DECODER)
    assert isinstance(found, AutoencoderTiny)
    latents = torch.randn(2, 4, 5, 3)
    with torch.no_grad():
        decoded = found.decode(latents)
        assert relative_error(decoded, reference.decode(latents).sample) < 1e-6
    picture = CheapPreview()(components, latents[:1])
    assert picture.size == (6, 10)
    save_pipeline(components, tmp_path / "saved", torch.float32)
    again = Pipeline.from_pretrained(tmp_path / "saved", device="cpu").components.tiny_decoder
    assert again is not None
    assert torch.equal(again.decode(latents), decoded)
    save_pipeline(replace(components, tiny_decoder=None), tmp_path / "saved", torch.float32)
    assert Pipeline.from_pretrained(tmp_path / "saved", device="cpu").components.tiny_decoder is None


def test_pictures_and_the_models_hash_do_not_depend_on_it(with_decoder: Path, built_model: Path) -> None:
    drawn = [
        Pipeline.from_pretrained(place, device="cpu")("fox", num_inference_steps=1)
        for place in (with_decoder, built_model)
    ]
    assert drawn[0].images[0].tobytes() == drawn[1].images[0].tobytes()
    assert drawn[0].settings["model_hash"] == drawn[1].settings["model_hash"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latent_channels": 3}, "decodes latents of 3 channels, those of vae have 4; remove it"),
        ({"decoder_block_out_channels": [8, 16]}, r"decoder_block_out_channels must be all alike, got \[8, 16\]"),
        ({"num_decoder_blocks": [2]}, r"num_decoder_blocks must have 2 numbers, got \[2\]"),
        ({"num_decoder_blocks": [900, 900]}, "num_decoder_blocks must be 64 in all at most"),
        ({"scaling_factor": 0.0}, "scaling_factor must be above 0"),
        ({"act_fn": "gelu"}, "act_fn"),
        ({"num_decoder_blocks": [1, 1]}, "layers.4.weight is missing"),
    ],
)
def test_one_that_does_not_fit_is_refused(with_decoder: Path, change: dict[str, object], message: str) -> None:
    place = with_decoder / TINY_DECODER
    if "latent_channels" in change:
        Reference(**SHAPE | change, encoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1)).save_pretrained(place)
    else:
        config = json.loads((place / "config.json").read_text())
        (place / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ModelLoadError, match=message):
        Pipeline.from_pretrained(with_decoder, device="cpu")


def test_the_config_that_is_written_is_diffusers_own() -> None:
    ours = AutoencoderTiny(AutoencoderTinyConfig.from_dict(SHAPE))
    reference = Reference.from_config(
        ours.config.to_dict(), encoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1)
    )
    own = {name: tensor.shape for name, tensor in ours.state_dict().items()}
    assert own == {name: each.shape for name, each in reference.state_dict().items() if name.startswith("decoder.")}
    with pytest.raises(ModelConfigError, match="no setting 'num_blocks'"):
        AutoencoderTinyConfig.from_dict({"num_blocks": [1]})
