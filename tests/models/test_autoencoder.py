"""The autoencoder: shapes, the distribution of its latents, gradients, refused configurations."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from latentdiff.errors import ModelConfigError
from latentdiff.models.autoencoder import AutoencoderConfig, AutoencoderKL, DiagonalGaussian
from tests.models.tiny import AUTOENCODERS, randomize, relative_error


def tiny(name: str = "stable-diffusion") -> AutoencoderKL:
    model = AutoencoderKL(AutoencoderConfig.from_dict(AUTOENCODERS[name]))
    randomize(model)
    return model


def images(height: int = 16, width: int = 24) -> torch.Tensor:
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_decoded_latents_have_the_size_of_the_images(name: str) -> None:
    model = tiny(name)
    factor = model.config.downsample_factor
    latents = model.encode(images()).mode()
    assert latents.shape == (2, model.config.latent_channels, 16 // factor, 24 // factor)
    assert model.decode(latents).shape == (2, 3, 16, 24)


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_every_parameter_gets_a_gradient(name: str) -> None:
    model = tiny(name)
    reconstruction, posterior = model(images(), torch.Generator().manual_seed(1))
    (reconstruction.square().mean() + posterior.kl().mean()).backward()
    without = [key for key, weight in model.named_parameters() if weight.grad is None or not weight.grad.any()]
    assert without == []


def test_reconstruction_is_of_the_mode_without_a_generator_and_of_a_sample_with_one() -> None:
    model = tiny()
    with torch.no_grad():
        posterior = model.encode(images())
        assert torch.equal(model(images())[0], model.decode(posterior.mode()))
        drawn = model.decode(posterior.sample(torch.Generator().manual_seed(3)))
        assert torch.equal(model(images(), torch.Generator().manual_seed(3))[0], drawn)


def test_kl_of_a_known_gaussian() -> None:
    mean, variance = torch.full((2, 1, 2, 2), 3.0), torch.tensor(4.0)
    posterior = DiagonalGaussian(mean, variance.log().expand_as(mean))
    expected = 4 * 0.5 * (9 + 4 - 1 - variance.log())
    torch.testing.assert_close(posterior.kl(), expected.expand(2))


def test_sample_takes_noise_or_a_generator_and_scales_it_by_the_standard_deviation() -> None:
    posterior = DiagonalGaussian(torch.full((2, 1, 2, 2), 3.0), torch.full((2, 1, 2, 2), 4.0).log())
    noise = torch.randn(2, 1, 2, 2, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(posterior.sample(noise), 3 + 2 * noise)
    assert torch.equal(posterior.sample(torch.Generator().manual_seed(5)), posterior.sample(noise))


def test_log_variance_is_clamped() -> None:
    model = tiny("no-quant-conv")
    with torch.no_grad():
        model.encoder.conv_out.bias.fill_(1000.0)
        assert model.encode(images()).logvar.max() == 20


def test_channels_last_gives_the_same_pictures() -> None:
    model = tiny()
    with torch.no_grad():
        expected = model(images())[0]
        model.to(memory_format=torch.channels_last)
        assert relative_error(model(images().to(memory_format=torch.channels_last))[0], expected) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    model = tiny().to(dtype)
    with torch.no_grad():
        reconstruction, posterior = model(images().to(dtype), torch.Generator().manual_seed(0))
    assert reconstruction.dtype == dtype
    assert reconstruction.isfinite().all()
    assert posterior.kl().dtype == torch.float32


def test_config_survives_the_way_through_json() -> None:
    config = AutoencoderConfig.from_dict(AUTOENCODERS["no-attention"] | {"_class_name": "AutoencoderKL"})
    assert AutoencoderConfig.from_dict(config.to_dict()) == config
    assert config.down_block_types == ("DownEncoderBlock2D",) * 3
    assert replace(config, scaling_factor=1.0).scaling_factor == 1


def test_a_config_that_is_no_object_is_refused() -> None:
    with pytest.raises(ModelConfigError, match="must be an object with named settings, got 3"):
        AutoencoderConfig.from_dict(3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_out_channels": [16, 30]}, r"multiples of norm_num_groups \(8\), got \[16, 30\]"),
        ({"down_block_types": ["AttnDownEncoderBlock2D"] * 2}, "down_block_types must be DownEncoderBlock2D once per"),
        ({"up_block_types": ["UpDecoderBlock2D"]}, "up_block_types must be UpDecoderBlock2D once per"),
        ({"scaling_factor": 0}, "scaling_factor must be above 0, got 0"),
        ({"layers_per_block": 0}, "layers_per_block must be at least 1, got 0"),
        ({"block_out_channels": []}, r"block_out_channels must be at least 1, got \[\]"),
        ({"latent_channels": "4"}, "latent_channels must be of type int, got '4'"),
        ({"use_quant_conv": 1}, "use_quant_conv must be of type bool, got 1"),
        ({"act_fn": "relu"}, 'needs act_fn = "silu" or "swish", got \'relu\'; choose'),
        ({"latents_mean": [0.0]}, "needs latents_mean = null, got"),
        ({"latent_chanels": 4}, "has no setting 'latent_chanels'; did you mean 'latent_channels'"),
    ],
)
def test_refused_configurations(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelConfigError, match=message) as caught:
        AutoencoderConfig.from_dict(AUTOENCODERS["stable-diffusion"] | change)
    assert "\n" not in str(caught.value)
