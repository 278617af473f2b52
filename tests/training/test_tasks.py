"""Inpainting and super-resolution as tasks of the diffusion stage: what is seen, what is trained, what comes out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from latentdiff.training.config import DiffusionTraining, load_config
from latentdiff.training.data.batches import draw_batch
from latentdiff.training.data.conditions import ConcatConditioning, Task
from latentdiff.training.losses.diffusion import diffusion_losses
from latentdiff.training.networks.tasks import widened
from latentdiff.training.setup import load_components, network_to_train, prepare_data
from PIL import Image
from safetensors import safe_open

from latentdiff import Pipeline
from latentdiff.checkpoints import load_pipeline, save_pipeline
from latentdiff.cli import main
from latentdiff.commands.train import train as cli_train
from latentdiff.errors import InputError
from latentdiff.images import to_tensor
from latentdiff.marks import COMPOSITE, source_type_of
from tests.training.test_lora_stage import file as lora_file  # noqa: F401  (a fixture)
from tests.training.test_stages import SIZE, check_interrupted, pictures, recipe

INPAINT = ["lora=null", "task=inpaint", "full_mask=0.25"]
QUICK: dict[str, Any] = {"num_inference_steps": 2, "output_type": "latent"}


def config_of(file: str, *changes: str) -> DiffusionTraining:
    config = load_config(file, list(changes))
    assert isinstance(config, DiffusionTraining)
    return config


@pytest.fixture
def upscale_file(tmp_path: Path) -> str:
    """A recipe of a small upscaler of windows of tiny pictures, concat its autoencoder."""
    if not (tmp_path / "pictures").exists():
        pictures(tmp_path / "pictures", 6)
    cli_train(recipe(tmp_path, "autoencoder"), [], False, None)
    changes = ["task: upscale", "degradation: 0.5", "max_noise_level: 20"]
    file = Path(recipe(tmp_path, "diffusion"))
    file.write_text(file.read_text() + "\n".join(changes) + "\n")
    return str(file)


def test_new_channels_change_nothing_at_first(built_model: Path) -> None:
    unet = load_pipeline(built_model).unet
    assert unet is not None
    wide, x = widened(unet, 5), torch.randn(2, 4, 8, 8)
    timesteps, context = torch.tensor([3, 700]), torch.randn(2, 5, 16)
    concat = torch.randn(2, 5, 8, 8)
    with torch.no_grad():
        before, after = unet(x, timesteps, context), wide(torch.cat([x, concat], dim=1), timesteps, context)
    torch.testing.assert_close(after, before, atol=1e-6, rtol=1e-5)
    assert wide.config.in_channels == 9 and unet.config.in_channels == 4


def test_a_mask_and_what_is_kept_are_those_of_the_pipeline(lora_file: str, tmp_path: Path) -> None:  # noqa: F811
    config = config_of(lora_file, *INPAINT, "run.batch_size=16")
    components = load_components(config)
    assert components.inpaints
    data = prepare_data(config, components, tmp_path / "run")
    batch, again = (draw_batch(data, config, 1) for _ in range(2))
    assert batch.concat is not None and again.concat is not None and batch.concat.kept is not None
    assert torch.equal(batch.concat.channels, again.concat.channels)
    shares = [draw_batch(data, config, 1, part).concat for part in (slice(0, 5), slice(5, 16))]
    assert torch.equal(torch.cat([share.channels for share in shares if share is not None]), batch.concat.channels)
    full = batch.concat.channels.flatten(1).mean(dim=1) == 1
    assert 0 < int(full.sum()) < 16
    inputs = batch.concat.inputs(components)
    assert inputs.shape == (16, 5, *batch.latents.shape[2:])
    number = int((~full).nonzero()[0])
    kept, factor = batch.concat.kept[number], components.autoencoder.config.downsample_factor
    white = Image.fromarray((kept.abs().sum(dim=0) == 0).numpy().astype(np.uint8) * 255)
    whole = Image.fromarray(((kept.permute(1, 2, 0) + 1) * 127.5).round().to(torch.uint8).numpy())
    assert torch.equal(to_tensor([whole])[0] * (kept != 0), kept)
    mask = torch.from_numpy(np.asarray(white)[::factor, ::factor] > 0).float()
    assert (mask >= batch.concat.channels[number, 0]).all()  # what happens to be middle grey looks masked


def test_an_inpainting_run_resumes_and_makes_a_model_that_paints(lora_file: str, tmp_path: Path) -> None:  # noqa: F811
    file = Path(lora_file)
    file.write_text(yaml.safe_dump(config_of(lora_file, *INPAINT).model_dump(mode="json")))
    check_interrupted(str(file), tmp_path)
    pipe = Pipeline.from_pretrained(tmp_path / "unbroken/model", device="cpu")
    assert pipe.unet.config.in_channels == 9
    assert not torch.equal(pipe.unet.conv_in.weight[:, 4:], torch.zeros_like(pipe.unet.conv_in.weight[:, 4:]))
    image, mask = Image.new("RGB", (32, 32), "red"), Image.new("L", (32, 32))
    mask.paste(255, (8, 8, 24, 24))
    drawn = pipe("red fox", image=image, mask=mask, num_inference_steps=2).images[0]
    assert drawn.getpixel((1, 1)) == (255, 0, 0)
    with Image.open(tmp_path / "unbroken/samples/00000004.png") as samples:
        assert samples.height == 2 * SIZE + 2
        assert source_type_of(samples) == COMPOSITE  # of what is drawn and what it is drawn from


def test_parts_alone_are_trained_and_written_as_a_variant(lora_file: str, tmp_path: Path) -> None:  # noqa: F811
    parts, base = ["conv_in", "up_blocks.1"], tmp_path / "base"
    config = config_of(lora_file, *INPAINT, "train.kind=unet", f"train.parts=[{', '.join(parts)}]")
    save_pipeline(load_pipeline(str(config.start_from)), base)
    file = Path(lora_file)
    file.write_text(yaml.safe_dump(config.model_copy(update={"start_from": str(base)}).model_dump(mode="json")))
    cli_train(str(file), [], False, None)
    trained = Path(config.run.out) / "model"
    before, after = (load_pipeline(place).unet.state_dict() for place in (base, trained))
    changed = {name for name, weight in after.items() if not torch.equal(weight, before[name])}
    inside = {name for name in after if name.startswith(("conv_in.", "up_blocks.1."))}
    assert "conv_in.weight" in changed and len(changed) > len(inside) / 2 and changed <= inside
    assert main(["convert", str(trained), str(tmp_path / "variant"), "--variant-of", str(base), "--rank", "1000"]) == 0
    with safe_open(tmp_path / "variant/unet/unet_difference.safetensors", "pt") as held:
        assert set(held.keys()) == changed
    found = load_pipeline(tmp_path / "variant").unet.state_dict()
    assert all(torch.equal(found[name], weight) for name, weight in after.items())
    with pytest.raises(InputError, match=r"no weights of 'up_blocks\.7'; its parts are conv_in, "):
        network_to_train(*(config_of(str(file), "train.parts=[up_blocks.7]"), None, load_components(config)))  # type: ignore[arg-type]


def test_an_upscaling_run_makes_a_model_that_enlarges(upscale_file: str, tmp_path: Path) -> None:
    config = config_of(upscale_file)
    components = load_components(config)
    data = prepare_data(config, components, tmp_path / "run")
    batch = draw_batch(data, config, 0)
    assert batch.concat is not None and batch.concat.levels is not None
    assert batch.concat.channels.shape == (4, 3, 8, 8) and 0 <= int(batch.concat.levels.max()) <= 20
    check_interrupted(upscale_file, tmp_path)
    pipe = Pipeline.from_pretrained(tmp_path / "unbroken/model", device="cpu")
    assert pipe.components.upscales and pipe.components.low_res_schedule is not None
    assert pipe.components.low_res_schedule.class_name == "DDPMScheduler"
    result = pipe("a", image=Image.new("RGB", (8, 8), "red"), num_inference_steps=2)
    assert result.images[0].size == (16, 16)


@pytest.mark.parametrize("changes", [INPAINT, None], ids=["inpaint", "upscale"])
def test_the_loss_moves_the_new_channels(
    tmp_path: Path, request: pytest.FixtureRequest, changes: list[str] | None
) -> None:
    file = request.getfixturevalue("upscale_file" if changes is None else "lora_file")
    config = config_of(file, *(changes or []))
    components = load_components(config)
    data = prepare_data(config, components, tmp_path / "loss")
    unet = network_to_train(config, data, components)
    batch = draw_batch(data, config, 0)
    noise, timesteps = torch.randn_like(batch.latents), torch.full((len(batch),), 500)
    torch.nn.init.normal_(unet.conv_out.weight, std=0.1)
    diffusion_losses(unet, components, config.objective, batch, timesteps, noise).mean().backward()
    gradient: Any = unet.conv_in.weight.grad
    assert (gradient[:, batch.latents.shape[1] :].abs().amax(dim=(0, 2, 3)) > 0).all()


def test_samples_are_stacked() -> None:
    assert Task(4, None, 0.0, 0.0, 0).draw(np.zeros((16, 16, 3), np.uint8), np.random.default_rng(0)).kept is not None
    stacked = ConcatConditioning.stack([ConcatConditioning(torch.zeros(1, 2, 2), torch.zeros(3, 8, 8))] * 3)
    assert stacked.kept is not None and stacked.kept.shape == (3, 3, 8, 8) and stacked.levels is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["low_res_schedule={beta_end: 0.01}"], "unknown key 'task.low_res_schedule'"),
        ([*INPAINT, "prior={prompt: x}"], "task inpaint does not go with prior"),
        ([*INPAINT, "self_conditioning=true"], "does not go with objective.self_conditioning"),
        ([*INPAINT, "data.buckets=true"], r"does not go with data\.buckets"),
        ([*INPAINT, "data.zoom=2"], r"data\.zoom 2 leaves most of a picture out; it needs data\.crop random"),
        (["lora=null", "task=paint"], r"task.kind must be one of .*got 'paint'"),
    ],
)
def test_what_does_not_go_together_is_refused(lora_file: str, changes: list[str], message: str) -> None:  # noqa: F811
    with pytest.raises(InputError, match=message):
        load_config(lora_file, changes)


def test_a_model_to_start_from_does_the_task_or_is_refused(lora_file: str, upscale_file: str, tmp_path: Path) -> None:  # noqa: F811
    with pytest.raises(InputError, match="a lora has no new input channels; leave it out, or start_from a model that"):
        load_components(config_of(lora_file, "task=inpaint"))
    wide = load_components(config_of(lora_file, *INPAINT))
    save_pipeline(wide, tmp_path / "wide")
    start = f"start_from={tmp_path / 'wide'}"
    assert load_components(
        config_of(lora_file, "task=inpaint", start)
    ).inpaints  # a lora of a model that inpaints already
    for task, does in (("text_to_image", "inpaint"), ("upscale", "inpaint")):
        with pytest.raises(InputError, match=f"task {task} must be what .*wide does, {does}; start_from another model"):
            load_components(config_of(lora_file, f"task={task}", start))
    cli_train(upscale_file, ["run.steps=1"], False, str(tmp_path / "small"))
    changes = ["lora=null", "task=upscale", f"start_from={tmp_path / 'small/model'}"]
    assert load_components(config_of(lora_file, *changes, "max_noise_level=20")).upscales
    with pytest.raises(InputError, match="max_noise_level must be at most 20, which the model was told of; lower it"):
        load_components(config_of(lora_file, *changes))
