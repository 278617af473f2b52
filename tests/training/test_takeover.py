"""Autoencoders that begin as another: its layers taken over, its latents kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from latentdiff.training.config import AutoencoderTraining, load_config
from latentdiff.training.losses.autoencoder import latent_distance
from latentdiff.training.networks.takeover import take_over
from latentdiff.training.train_autoencoder import assemble
from torch.nn import functional as F

from latentdiff.checkpoints import load_autoencoder, save_model
from latentdiff.commands.train import train as cli_train
from latentdiff.errors import InputError
from latentdiff.models.autoencoder import AutoencoderConfig, AutoencoderKL, Decoder
from tests.models.tiny import randomize
from tests.training.test_stages import SIZE, check_interrupted, pictures, recipe, weights_of


def autoencoder(*channels: int, latents: int = 4) -> AutoencoderKL:
    levels = len(channels)
    config = AutoencoderConfig.from_dict(
        {
            "block_out_channels": channels,
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "latent_channels": latents,
        }
    )
    randomize(model := AutoencoderKL(config))
    return model


def test_new_levels_begin_by_changing_nothing() -> None:
    model, started = autoencoder(8, 8, 8, 16), autoencoder(8, 16)
    take_over(model, started)
    own, given = model.state_dict(), started.state_dict()
    for name, theirs in (
        ("encoder.down_blocks.3.resnets.0.conv1.weight", "encoder.down_blocks.1.resnets.0.conv1.weight"),
        ("decoder.up_blocks.0.resnets.1.conv2.weight", "decoder.up_blocks.0.resnets.1.conv2.weight"),
    ):
        assert torch.equal(own[name], given[theirs]), name
    last = [
        last_features(one.decoder, torch.randn(2, 4, 3, 2, generator=torch.Generator().manual_seed(0)))
        for one in (model, started)
    ]
    torch.testing.assert_close(last[0], F.interpolate(last[1], scale_factor=4, mode="nearest"))
    first = model.encoder.conv_in(torch.rand(2, 3, 16, 16))
    torch.testing.assert_close(model.encoder.down_blocks[0](first), F.avg_pool2d(first, 2))


def last_features(decoder: Decoder, latents: torch.Tensor) -> torch.Tensor:
    """Return what a decoder normalizes and turns into pictures."""
    found: list[torch.Tensor] = []
    with decoder.conv_norm_out.register_forward_pre_hook(lambda _, given: found.extend(given)):
        decoder(latents)
    return found[0]


def test_one_of_the_same_shape_is_taken_over_whole() -> None:
    model, started = autoencoder(8, 16), autoencoder(8, 16)
    take_over(model, started)
    images = torch.rand(1, 3, 16, 16)
    assert torch.equal(model.encode(images).mode(), started.encode(images).mode())
    with pytest.raises(InputError, match="1 more levels than model"):
        take_over(autoencoder(8), started)
    with pytest.raises(InputError, match=r"the first 1 of model.block_out_channels must be 8, .* got \[4, 8, 16\]"):
        take_over(autoencoder(4, 8, 16), started)
    assert latent_distance(model.encode(images), images, started) == 0


def test_more_latent_channels_begin_by_changing_nothing() -> None:
    model, started, images = autoencoder(8, 8, 16, latents=7), autoencoder(8, 8, 16), torch.rand(2, 3, 16, 16)
    take_over(model, started)
    ours, theirs = model.encode(images), started.encode(images)
    torch.testing.assert_close(ours.mean[:, :4], theirs.mean)
    torch.testing.assert_close(ours.logvar[:, :4], theirs.logvar)
    assert ours.mean[:, 4:].std() > 0
    assert latent_distance(ours, images, started) < 1e-9
    torch.testing.assert_close(model.decode(ours.mode()), started.decode(theirs.mode()))
    model.decode(ours.mode()).square().mean().backward()
    gradient = model.decoder.conv_in.weight.grad
    assert gradient is not None and gradient[:, 4:].any()


def test_latents_are_compared_with_those_of_smaller_pictures() -> None:
    model, started, images = autoencoder(8, 8, 16), autoencoder(8, 16), torch.rand(2, 3, 16, 16)
    expected = (model.encode(images).mode() - started.encode(F.avg_pool2d(images, 2)).mode()).square().mean()
    found = latent_distance(model.encode(images), images, started)
    torch.testing.assert_close(found, expected)
    found.backward()
    assert all(parameter.grad is None for parameter in started.parameters())


def test_training_keeps_latents_near_and_resumes_to_the_bit(tmp_path: Path) -> None:
    pictures(tmp_path / "pictures", 4)
    file = recipe(tmp_path, "autoencoder")
    first = load_config(file)
    assert isinstance(first, AutoencoderTraining)
    save_model(AutoencoderKL(AutoencoderConfig.from_dict(first.model)), tmp_path / "started")
    images, distances = torch.rand(2, 3, SIZE, SIZE) * 2 - 1, []
    started = load_autoencoder(tmp_path / "started")
    for weight in (0, 100):
        run = tmp_path / f"run{weight}"
        changes = [f"start_from={tmp_path / 'started'}", f"loss.latents={weight}", "loss.kl=0.1", "run.steps=12"]
        cli_train(file, changes, False, str(run))
        model, _ = assemble(first)
        saved = {name: tensor for name, tensor in weights_of(run).items() if not name.startswith("ema.")}
        model.load_state_dict(saved)
        distances.append(latent_distance(model.encode(images), images, started).item())
    assert distances[1] < 0.5 * distances[0]
    Path(file).write_text(Path(file).read_text() + f"start_from: {tmp_path / 'started'}\nloss: {{latents: 1}}\n")
    check_interrupted(file, tmp_path)


def test_the_decoder_alone_is_trained_and_the_latents_stay(tmp_path: Path) -> None:
    pictures(tmp_path / "pictures", 4)
    file = recipe(tmp_path, "autoencoder")
    first = load_config(file)
    assert isinstance(first, AutoencoderTraining)
    shape = AutoencoderConfig.from_dict({**first.model, "scaling_factor": 0.18215})
    randomize(started := AutoencoderKL(shape))
    save_model(started, tmp_path / "started")
    Path(file).write_text(Path(file).read_text() + f"start_from: {tmp_path / 'started'}\ndecoder_only: true\n")
    cli_train(file, ["run.steps=4"], False, str(tmp_path / "run"))
    trained, images = load_autoencoder(tmp_path / "run"), torch.rand(2, 3, SIZE, SIZE) * 2 - 1
    latents = started.encode(images).mode()
    assert torch.equal(trained.encode(images).mode(), latents)
    assert trained.config.scaling_factor == 0.18215
    for name, tensor in started.decoder.named_parameters():
        assert not torch.equal(trained.get_parameter(f"decoder.{name}"), tensor), name
    assert not torch.equal(trained.decode(latents), started.decode(latents))
    check_interrupted(file, tmp_path)
    with pytest.raises(
        InputError, match="decoder_only needs the encoder of start_from; give model the numbers of its vae"
    ):
        cli_train(file, ["model.layers_per_block=2"], False, str(tmp_path / "other"))


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    pictures(tmp_path / "pictures", 4)
    file = recipe(tmp_path, "autoencoder")
    for change in ("loss.latents=1", "decoder_only=true"):
        with pytest.raises(InputError, match="name an autoencoder there"):
            load_config(file, [change])
    save_model(autoencoder(8, 16, latents=5), tmp_path / "five")
    with pytest.raises(InputError, match=r"start_from must have 4 latent channels or fewer, .* got 5 channels"):
        cli_train(file, [f"start_from={tmp_path / 'five'}"], False, str(tmp_path / "run"))
