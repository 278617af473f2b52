"""Configs: every shipped recipe parses, unknown keys name the closest valid one, overrides apply."""

from pathlib import Path

import pytest
import torch
import yaml
from latentdiff.training.config import (
    AutoencoderTraining,
    DiffusionTraining,
    ImageTextTraining,
    completed,
    load_config,
    parse_config,
)

from latentdiff.diffusion.schedule import NoiseSchedule
from latentdiff.errors import InputError
from latentdiff.models.autoencoder import AutoencoderConfig, AutoencoderKL
from latentdiff.models.image_text import ImageTextConfig, ImageTextModel
from latentdiff.models.unet import UNet2DConditionModel, UNetConfig

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
RECIPE = """
stage: autoencoder
data: {folder: pictures}
run: {out: runs/x, steps: 10, batch_size: 2}
model: {}
"""


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.name)
def test_shipped_recipes_parse(file: Path) -> None:
    assert isinstance(load_config(file), AutoencoderTraining | DiffusionTraining | ImageTextTraining)


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.name)
def test_shipped_recipes_build_their_networks(file: Path) -> None:
    config = load_config(file)
    with torch.device("meta"):
        if isinstance(config, AutoencoderTraining):
            network = AutoencoderKL(AutoencoderConfig.from_dict(config.model))
            assert network.config.sample_size == config.data.size
        elif isinstance(config, ImageTextTraining):
            assert ImageTextModel(ImageTextConfig.from_dict(config.model)).config.image_size == config.data.size
        elif config.start_from is not None:
            assert config.start_from in ("embedded", "runs/emoji128-taught", "sd-v1-5.safetensors")
        else:
            UNet2DConditionModel(UNetConfig.from_dict(config.model))
            assert NoiseSchedule.from_dict(config.schedule).prediction_type == "v_prediction"


def test_override_wins_and_is_typed(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE)
    config = load_config(file, ["run.steps=3", "run.precision=no", "optimizer.betas=[0.8, 0.9]"])
    assert (config.run.steps, config.run.precision) == (3, "no")
    assert config.optimizer.betas == (0.8, 0.9)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run.stepz=3", "unknown key 'run.stepz'; did you mean 'steps'"),
        ("run.steps=0", "run.steps"),
        ("run.steps=many", "run.steps"),
        ("stage=autoenoder", "stage must be one of"),
        ("run.steps", "--set needs key=value"),
        ("stage.x=1", "is a value, not a section"),
        (
            "optimizer.kind=adam",
            "optimizer.kind: input should be 'adamw', 'adamw_8bit', 'adafactor' or 'muon', got 'adam'",
        ),
        ("run.trackers=[tensorboard, tensorboard]", "run.trackers names one twice; leave that out"),
        ("run.trackers=[mlflow]", "run.trackers.0: input should be 'tensorboard', 'wandb' or 'trackio', got 'mlflow'"),
        (
            "optimizer={kind: adafactor, betas: [0.9, 0.95]}",
            "optimizer.betas are those of adamw; leave them out with optimizer.kind adafactor",
        ),
    ],
)
def test_wrong_entry_is_one_line_that_says_what_to_do(tmp_path: Path, override: str, message: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE)
    with pytest.raises(InputError) as caught:
        load_config(file, [override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["- a list", "a: [", ""])
def test_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(InputError):
        load_config(file)
    with pytest.raises(InputError, match="cannot read config"):
        load_config(tmp_path / "missing.yaml")


def test_a_config_of_an_earlier_release_is_completed_with_defaults() -> None:
    tree = yaml.safe_load(next(file for file in CONFIGS if file.name == "emoji-lora.yaml").read_text())
    whole = parse_config(tree).model_dump(mode="json")
    del whole["data"]["crop"], whole["run"]["ema_snapshots"], whole["prior"]
    assert completed(whole) == parse_config(tree).model_dump(mode="json")
    assert completed({**whole, "gone": 1}) == {**whole, "gone": 1}
