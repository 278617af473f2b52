"""Every size of the table is one that can be trained, and costs what its FLOPs say."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
from accelerate import Accelerator
from latentdiff.training.config import DiffusionTraining
from latentdiff.training.speedrun import table
from latentdiff.training.speedrun.begin import costs_of, embedded_psnr, start_model
from latentdiff.training.speedrun.machine import Machine, measure
from latentdiff.training.speedrun.plan import Plan
from latentdiff.training.speedrun.recipes import Material, autoencoder_config, unet_config
from latentdiff.training.speedrun.run import Wish
from latentdiff.training.speedrun.table import Size

from latentdiff.models.autoencoder import AutoencoderConfig, AutoencoderKL
from latentdiff.models.unet import UNet2DConditionModel, UNetConfig
from tests.conftest import AUTOENCODER, UNET
from tests.training.test_stages import pictures

MACHINE = Machine("a processor", "cpu", 2, 2**34, 1e11, 1e11, 0.01)
SIZES = [*table.LATENTS, table.of_pixels(32), table.of_pixels(16)]


def plan_of(size: Size) -> Plan:
    return Plan(size.name, size.side, 500, 2000, 32, {"evaluation": 1.0}, 10_000)


@pytest.mark.parametrize("size", SIZES, ids=lambda size: size.name)
@pytest.mark.parametrize(
    "material",
    [
        Material("pictures", texts=["a fox", "a cat"], held_out=0.1),
        Material("pictures"),
        Material("pictures", captions=["a fox"], texts=["a fox"]),
        Material("data", emoji=True),
    ],
    ids=["captions", "none", "one", "emoji"],
)
def test_a_size_has_configs(size: Size, material: Material, tmp_path: Path) -> None:
    """Reading them refuses whatever cannot be."""
    if size.autoencoder:
        config = autoencoder_config(size, material, plan_of(size), tmp_path / "autoencoder", 0.1)
        assert (config.run.steps, config.data.size, config.model["sample_size"]) == (500, size.side, size.side)
        assert config.data.variants == ["plain"]
    found = unet_config(size, material, plan_of(size), tmp_path, 0.01)
    assert (found.run.steps, found.run.batch_size, found.data.size) == (2000, 32, size.side)
    assert found.text_encoder == ("embedded" if material.reads_text else "none")
    assert found.autoencoder == (str(tmp_path / "autoencoder") if size.autoencoder else None)
    assert found.data.held_out == material.held_out and bool(found.data.keep) == material.emoji
    assert len(found.samples.prompts) == table.PROMPTS


@pytest.mark.parametrize("captions", [["a fox", "a cat"], []])
def test_the_embedded_model_is_trained_further(captions: list[str], tmp_path: Path) -> None:
    start, components = start_model("embedded" if captions else "start", tmp_path)
    assert components is not None and components.reads_text == bool(captions)
    size = table.of_embedded(components.native_size[0])
    config = unet_config(
        size, Material("pictures", texts=captions, start=start), plan_of(size), tmp_path, 1, components
    )
    assert isinstance(config, DiffusionTraining) and config.start_from == start
    assert len(config.samples.prompts) == table.PROMPTS and config.data.variants == ["plain", "flip"]
    assert config.run.save_every == 2 and config.run.sample_every == 334


def test_costs_follow_from_flops() -> None:
    costs = [costs_of(size, MACHINE) for size in (*SIZES, table.of_embedded(64))]
    assert all(value > 0 for one in costs[:4] for value in asdict(one).values())
    small, middle, *_, embedded = costs
    assert middle.unet == pytest.approx(4 * small.unet, rel=0.3)  # a quarter of the pixels
    assert middle.autoencoder == pytest.approx(4 * small.autoencoder, rel=0.01)
    assert embedded.autoencoder == 0 and embedded.encode > 0
    assert costs[4].autoencoder == costs[4].encode == 0  # of pixels


def test_a_machine_is_measured() -> None:
    networks = AutoencoderKL(AutoencoderConfig.from_dict(AUTOENCODER)), UNet2DConditionModel(UNetConfig.from_dict(UNET))
    found = measure(*networks, None, Accelerator(cpu=True))
    assert found.autoencoder > 1e6 and found.unet > 1e6 and found.caption == 0
    assert found.device == "cpu" and found.memory > 0 and found.name


def test_the_embedded_autoencoder_is_tried_on_the_pictures(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "pictures", 4)
    psnr, side = embedded_psnr(Wish(str(folder)).data(), tmp_path / "cache")
    assert 15 < psnr < 60 and side % 8 == 0
