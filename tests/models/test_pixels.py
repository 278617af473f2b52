"""Pixel space and class labels: what stands in for autoencoder and text encoder, saved, loaded and drawn with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from latentdiff import Pipeline
from latentdiff.checkpoints import Components, load_pipeline, save_pipeline
from latentdiff.checkpoints.inspect import describe_folder
from latentdiff.cli import main
from latentdiff.diffusion import NoiseSchedule
from latentdiff.errors import InputError, ModelConfigError
from latentdiff.models.pixels import LabelConfig, LabelEncoder, PixelSpace, PixelSpaceConfig
from latentdiff.models.unet import UNet2DConditionModel, UNetConfig

UNET: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": [16, 32],
    "norm_num_groups": 8,
    "attention_head_dim": 4,
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
}


def components(channels: int = 1, labels: tuple[str, ...] = ("one", "two", "three")) -> Components:
    torch.manual_seed(0)
    width = max(1, len(labels))
    shape = {"in_channels": channels, "out_channels": 2 * channels, "cross_attention_dim": width}
    unet = UNet2DConditionModel(UNetConfig.from_dict({**UNET, **shape}))
    for parameter in unet.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    space = PixelSpace(PixelSpaceConfig(latent_channels=channels))
    encoder = LabelEncoder(LabelConfig(labels=labels, hidden_size=width))
    schedule = NoiseSchedule(beta_schedule="squaredcos_cap_v2", variance_type="learned_range")
    networks = (network.requires_grad_(False) for network in (unet, space, encoder))
    unet, space, encoder = networks
    return Components(unet=unet, autoencoder=space, text_encoder=encoder, schedule=schedule)  # type: ignore[arg-type]


@pytest.mark.parametrize("channels", [1, 3])
def test_pixel_space_changes_nothing(channels: int) -> None:
    space = PixelSpace(PixelSpaceConfig(latent_channels=channels))
    images = torch.randint(0, 256, (2, channels, 4, 4)).expand(-1, 3, -1, -1) / 127.5 - 1
    latents = space.encode(images).mode()
    assert latents.shape == (2, channels, 4, 4)
    assert torch.allclose(space.decode(latents), images, atol=1e-6)
    assert space.encode(images).sample(torch.Generator().manual_seed(0)).sub(latents).abs().max() < 1e-5


def test_labels_are_unit_vectors_and_the_empty_prompt_is_zero() -> None:
    encoder = LabelEncoder(LabelConfig(labels=("a", "b"), hidden_size=3))
    encoded = encoder(["b", "", "a"])
    assert [one.states.tolist() for one in encoded] == [[[[0, 1, 0]]], [[[0, 0, 0]]], [[[1, 0, 0]]]]
    assert [one.tokens for one in encoded] == [1, 0, 1]
    assert [one.mask.tolist() for one in encoded] == [[[True]], [[False]], [[True]]]
    with pytest.raises(InputError, match="clip_skip is for CLIP text encoders, got classes"):
        encoder(["a"], clip_skip=1)
    with pytest.raises(InputError, match="one of which must be the prompt, got 'aa'; did you mean 'a'"):
        encoder(["aa"])


def test_an_unconditional_model_takes_any_prompt_for_none() -> None:
    states = torch.stack([one.states for one in LabelEncoder(LabelConfig())(["anything", ""])])
    assert states.shape == (2, 1, 1, 1) and not states.any()


@pytest.mark.parametrize(
    "config", [{"labels": ("a", "a"), "hidden_size": 2}, {"labels": ("a", "b")}, {"labels": ("",)}, {"hidden_size": 0}]
)
def test_bad_label_configs(config: dict[str, Any]) -> None:
    with pytest.raises(ModelConfigError):
        LabelConfig(**config)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_model_of_pixels_is_a_model(channels: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "model"
    save_pipeline(components(channels), folder, dtype=None)
    loaded = load_pipeline(folder)
    assert loaded.tokenizer is None and loaded.schedule.variance_type == "learned_range"
    assert describe_folder(folder)["image_size"] == 8
    pipe = Pipeline(loaded)
    result = pipe(["one", "three"], num_inference_steps=3, sampler="ddpm")
    assert [image.size for image in result.images] == [(8, 8)] * 2
    if channels == 1:
        assert np.ptp(np.asarray(result.images[0]), axis=2).max() == 0
    assert not np.array_equal(*(np.asarray(pipe(p, num_inference_steps=3).images[0]) for p in ("one", "two")))
    out = tmp_path / "a.png"
    assert main(["generate", "two", "--model", str(folder), "--steps", "3", "-o", str(out)]) == 0
    assert main(["replay", str(out), "-o", str(tmp_path / "b.png")]) == 0
    assert out.read_bytes() == (tmp_path / "b.png").read_bytes()
    assert main(["generate", "tow", "--model", str(folder), "-o", str(out)]) == 2
    assert "did you mean 'two'" in capsys.readouterr().err


def test_schedulers_of_diffusers_take_a_network_that_learns_its_variance() -> None:
    pipe = Pipeline(components())
    config = pipe.components.schedule.to_dict()
    ours = pipe("one", sampler="ddim", num_inference_steps=4, output_type="latent").images
    theirs = [
        pipe("one", sampler=kind.from_config(config, **options), num_inference_steps=4, output_type="latent").images
        for kind, options in ((DDIMScheduler, {"clip_sample": False}), (DDPMScheduler, {"clip_sample": True}))
    ]
    assert all(torch.isfinite(latents).all() and latents.shape == ours.shape for latents in theirs)


def test_parts_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    given = components()
    save_pipeline(given, tmp_path / "model", dtype=None)
    config = tmp_path / "model/scheduler/scheduler_config.json"
    config.write_text(config.read_text().replace("learned_range", "fixed_large"))
    with pytest.raises(ModelConfigError, match=r"output channels of unet and those of vae .* got 2 and 1"):
        load_pipeline(tmp_path / "model")


def test_an_unconditional_model_draws_without_a_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_pipeline(components(3, labels=()), "model", dtype=None)
    assert main(["generate", "--model", "model", "--steps", "2", "-n", "2", "--size", "8x8"]) == 0
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["picture-2.png", "picture.png"]
    assert main(["replay", "picture-2.png"]) == 0
    assert Path("picture-2-replay.png").read_bytes() == Path("picture-2.png").read_bytes()
