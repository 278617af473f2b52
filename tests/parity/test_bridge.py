"""To diffusers and back in memory: the same picture, and the same bytes under both."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from PIL import Image
from torch import nn

from latentdiff import Pipeline
from latentdiff.checkpoints import Components, load_pipeline
from latentdiff.diffusion import NoiseSchedule
from latentdiff.errors import InputError
from latentdiff.models.autoencoder import AutoencoderConfig, AutoencoderKL
from latentdiff.models.pixels import LabelConfig, LabelEncoder, PixelSpace, PixelSpaceConfig
from latentdiff.models.unet import UNet2DConditionModel, UNetConfig
from tests.checkpoints.test_single_file import FAMILIES, components_of, tiny
from tests.conftest import UNET
from tests.models.tiny import AUTOENCODERS, noise_picture

pytestmark = pytest.mark.long

PICTURE = noise_picture(32, 32)
KINDS = [*FAMILIES, "inpainting", "embedded"]


@pytest.fixture(params=KINDS)
def components(request: pytest.FixtureRequest, built_model: Path) -> Components:
    if request.param == "embedded":
        return load_pipeline(built_model)
    if request.param == "inpainting":
        return components_of(tiny("Stable Diffusion XL"), channels=9)
    return components_of(tiny(request.param))


def memory(network: nn.Module) -> set[int]:
    return {parameter.data_ptr() for parameter in network.parameters()}


def theirs(pipe: Any, components: Components, **options: Any) -> Any:
    """What the pipeline of diffusers draws with the same noise."""
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    generator = torch.Generator().manual_seed(4)
    if components.inpaints:
        mask = Image.new("L", (32, 32))
        mask.paste(255, (16, 0, 32, 32))
        options |= {"image": PICTURE, "mask_image": mask, "strength": 1.0}
    elif components.upscales:
        options |= {"image": PICTURE.resize((8, 8))}
    elif "Img2Img" in type(pipe).__name__:
        options |= {"image": PICTURE, "strength": 0.6}
    if "image" not in options or components.inpaints:
        options |= {"height": 32, "width": 32}
    return pipe("a red fox", num_inference_steps=3, generator=generator, output_type="pt", **options).images


def test_both_use_the_same_memory_and_draw_the_same(components: Components) -> None:
    """Ours to theirs, and that one back: shared weights, equal settings, equal pictures."""
    peer = Pipeline(components).to_diffusers()
    again = Pipeline.from_diffusers(peer)
    assert memory(peer.unet) == memory(components.unet) == memory(again.unet)  # type: ignore[arg-type]
    assert memory(peer.vae) == memory(components.autoencoder) == memory(again.autoencoder)
    encoder = getattr(peer, "text_encoder", None) or peer.text_encoder_2
    assert memory(encoder) == memory(components.text_encoder) == memory(again.text_encoder)
    assert (again.components.inpaints, again.components.upscales) == (components.inpaints, components.upscales)
    assert again.components.force_zeros == components.force_zeros
    assert again.components.schedule.sigmas.equal(components.schedule.sigmas)
    second = again.to_diffusers()
    assert torch.equal(theirs(peer, components), theirs(second, components))
    if not (components.inpaints or components.upscales or "Img2Img" in type(peer).__name__):
        noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        options: dict[str, Any] = {"latents": noise, "height": 32, "width": 32, "num_inference_steps": 3}
        drawn = again("a red fox", sampler="euler", guidance_scale=7.5, output_type="pt", **options).images
        expected = theirs(peer, components, latents=noise, guidance_scale=7.5)
        assert (drawn - expected).abs().max() <= 2 / 255


def test_nobody_is_warned_of_what_is_put_right(built_model: Path) -> None:
    components = load_pipeline(built_model)
    assert components.schedule.steps_offset == 0  # which pipelines of Stable Diffusion warn of
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Pipeline(components).to_diffusers().scheduler.config.steps_offset == 0


def test_a_folder_of_diffusers_is_the_one_we_write(components: Components, tmp_path: Path) -> None:
    """What diffusers saves of the bridged pipeline loads here with the same weights, bitwise."""
    Pipeline(components).to_diffusers().save_pretrained(tmp_path / "theirs")
    Pipeline(components).save_pretrained(tmp_path / "ours")
    first, second = (load_pipeline(tmp_path / name) for name in ("theirs", "ours"))
    for name in ("unet", "autoencoder", "text_encoder", "text_encoder_2"):
        one, other = getattr(first, name), getattr(second, name)
        assert (one is None) == (other is None)
        if one is not None:
            found, wanted = one.state_dict(), other.state_dict()
            assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_what_has_no_counterpart_is_refused() -> None:
    space, encoder = PixelSpace(PixelSpaceConfig()), LabelEncoder(LabelConfig(labels=("a",), hidden_size=16))
    unet = UNet2DConditionModel(UNetConfig.from_dict({**UNET, "in_channels": 3, "out_channels": 3}))
    pipe = Pipeline(Components(unet=unet, autoencoder=space, text_encoder=encoder, schedule=NoiseSchedule()))
    with pytest.raises(InputError, match="diffusers has no pipeline for models of pixels or classes"):
        pipe.to_diffusers()
    eight = AutoencoderKL(AutoencoderConfig.from_dict(AUTOENCODERS["no-quant-conv"]))
    unet = UNet2DConditionModel(UNetConfig.from_dict({**UNET, "in_channels": 17, "out_channels": 8}))
    tiny_one = components_of(tiny("Stable Diffusion 1.x"))
    pipe = Pipeline(replace(tiny_one, unet=unet, autoencoder=eight))
    with pytest.raises(InputError, match="take latents of 4 channels, got a model of 8"):
        pipe.to_diffusers()
    with pytest.raises(InputError, match=r"one of StableDiffusionPipeline, .*; got SimpleNamespace"):
        Pipeline.from_diffusers(SimpleNamespace())
