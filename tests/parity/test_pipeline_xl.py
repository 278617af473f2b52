"""Stable Diffusion XL and its refiner, tiny and with random weights: the same picture in diffusers, and round trips."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from latentdiff import Pipeline
from latentdiff.checkpoints import Components, load_pipeline, save_pipeline
from latentdiff.checkpoints.inspect import describe_folder
from latentdiff.diffusion import NoiseSchedule
from latentdiff.errors import InputError
from latentdiff.images import to_tensor
from latentdiff.models.autoencoder import AutoencoderConfig, AutoencoderKL
from latentdiff.models.clip import CLIPTextConfig, CLIPTextModel
from latentdiff.models.tokenizer import Tokenizer
from latentdiff.models.unet import UNet2DConditionModel, UNetConfig
from tests.conftest import AUTOENCODER, UNET
from tests.models.tiny import CLIP, noise_picture, randomize, write_clip_vocabulary
from tests.parity.test_pipeline_clip import SAMPLERS

WORDS = {**CLIP, "vocab_size": 600, "bos_token_id": 522, "eos_token_id": 523}
SETTINGS: dict[str, Any] = {"num_inference_steps": 8, "guidance_scale": 4.0}


def components(folder: Path, *, refiner: bool = False) -> Components:
    """A base model with two text encoders of widths 16 and 24, or a refiner with the second alone."""
    wide = {**WORDS, "hidden_size": 24, "architectures": ["CLIPTextModelWithProjection"]}
    encoders = [CLIPTextModel(CLIPTextConfig.from_dict(config)) for config in (WORDS, wide)][refiner:]
    ids = 5 if refiner else 6
    unet = {
        **UNET,
        "cross_attention_dim": sum(encoder.config.hidden_size for encoder in encoders),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": CLIP["projection_dim"] + 8 * ids,
        "use_linear_projection": True,
        "transformer_layers_per_block": [1, 2],
    }
    autoencoder = AutoencoderKL(AutoencoderConfig.from_dict(AUTOENCODER))
    networks = [UNet2DConditionModel(UNetConfig.from_dict(unet)), autoencoder]
    for seed, network in enumerate([*networks, *encoders]):
        randomize(network, seed)
        network.requires_grad_(False).eval()
    autoencoder.decoder.conv_out.weight *= 5  # contrast
    tokenizers = [
        Tokenizer.from_folder(write_clip_vocabulary(folder / name, pad_token=pad))
        for name, pad in (("first", "<|endoftext|>"), ("second", "!"))
    ][refiner:]
    schedule = NoiseSchedule(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, timestep_spacing="leading", steps_offset=1
    )
    return Components(
        unet=networks[0],
        autoencoder=networks[1],
        text_encoder=encoders[0],
        tokenizer=tokenizers[0],
        schedule=schedule,
        text_encoder_2=None if refiner else encoders[1],
        tokenizer_2=None if refiner else tokenizers[1],
        force_zeros=not refiner,
    )


@pytest.fixture(scope="module", params=["base", "refiner"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp(request.param)
    save_pipeline(components(place, refiner=request.param == "refiner"), place / "model", dtype=None)
    return place / "model"


def theirs(folder: Path, scheduler: str, **options: Any) -> Any:
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32, local_files_only=True)
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("sampler", [*SAMPLERS, "euler"])
@pytest.mark.parametrize("negative", ["", "cat"])
def test_same_picture_from_the_same_seed(model: Path, sampler: str, negative: str) -> None:
    name, changes = SAMPLERS.get(sampler, ("EulerDiscreteScheduler", {}))
    pipe, peer = Pipeline.from_pretrained(model, device="cpu"), theirs(model, name, **changes)
    generator = torch.Generator().manual_seed(0)
    options: dict[str, Any] = {**SETTINGS, "sampler": sampler, "negative_prompt": negative, "output_type": "pt"}
    peers: dict[str, Any] = {**SETTINGS, "negative_prompt": negative or None, "output_type": "pt"}
    if "XLImg2Img" in type(peer).__name__:
        picture = noise_picture(32, 32)
        drawn = pipe("the red fox", image=picture, strength=0.5, seed=0, **options).images
        with torch.no_grad():
            latents = peer.vae.encode(to_tensor([picture])).latent_dist.mode() * peer.vae.config.scaling_factor
        expected = peer("the red fox", image=latents, strength=0.5, generator=generator, **peers).images
    else:
        drawn = pipe("the red fox", seed=0, **options).images
        expected = peer("the red fox", generator=generator, height=32, width=32, **peers).images
    assert (drawn - expected).abs().max() <= 2 / 255
    assert drawn.std() > 0.05


def test_same_picture_with_layers_left_out(model: Path) -> None:
    pipe, peer = Pipeline.from_pretrained(model, device="cpu"), theirs(model, "DDIMScheduler")
    if "XLImg2Img" in type(peer).__name__:
        pytest.skip("compared by the base model")
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {**SETTINGS, "latents": noise, "clip_skip": 1, "output_type": "pt"}
    drawn = pipe("the red fox", sampler="ddim", **options).images
    expected = peer("the red fox", height=32, width=32, **options).images
    assert (drawn - expected).abs().max() <= 2 / 255
    assert not torch.allclose(drawn, pipe("the red fox", sampler="ddim", **{**options, "clip_skip": 0}).images)
    with pytest.raises(InputError, match="clip_skip must be from 0 to 2 for this model, got 9"):
        pipe("the red fox", clip_skip=9)


def test_round_trip(model: Path, tmp_path: Path) -> None:
    loaded = load_pipeline(model)
    save_pipeline(loaded, tmp_path / "again", dtype=None)
    for file in sorted(model.rglob("*")):
        if file.is_file():
            assert (tmp_path / "again" / file.relative_to(model)).read_bytes() == file.read_bytes(), file
    described = describe_folder(model)
    assert described["components"].keys() >= {"unet", "vae", "text_encoder_2"}


def test_prompt_pooled_text_and_size_have_a_say(model: Path) -> None:
    pipe = Pipeline.from_pretrained(model, device="cpu")
    plain = pipe("the red fox", num_inference_steps=3, output_type="latent").images
    for other in ({"prompt": "cat"}, {"prompt": "the red fox", "negative_prompt": "cat"}):
        assert not torch.allclose(pipe(**other, num_inference_steps=3, output_type="latent").images, plain, atol=1e-4)
    long = pipe("red fox " * 9, num_inference_steps=3, output_type="latent")
    assert long.token_counts == [20] and torch.isfinite(long.images).all()
