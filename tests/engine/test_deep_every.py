"""Steps at which the finest level of the U-Net is called alone, with what the others gave before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from latentdiff import Pipeline
from latentdiff.cli import main
from latentdiff.engine.engines import Eager, Engine
from latentdiff.errors import InputError
from latentdiff.generation.result import read_record
from latentdiff.models.unet import UNet2DConditionModel, UNetConfig
from tests.models.tiny import UNETS, randomize, unet_inputs

FOX: dict[str, Any] = {"prompt": "the red fox", "num_inference_steps": 5, "output_type": "latent"}


class Other(Eager):
    """An engine that runs whole networks."""

    name = "other"
    require_levels = Engine.require_levels


@pytest.fixture
def counted(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often the middle and the way out of the U-Net are called."""
    unet, calls = pipe.components.unet, {"middle": 0, "out": 0}
    for name, module in (("middle", unet.mid_block), ("out", unet.conv_out)):
        forward: Any = module.forward  # type: ignore[union-attr]

        def count(*inputs: Any, name: str = name, forward: Any = forward) -> Any:
            calls[name] += 1
            return forward(*inputs)

        monkeypatch.setattr(module, "forward", count)
    return calls


@pytest.mark.parametrize("kind", ["sd1", "xl", "no-middle", "x4-upscaler"])
def test_the_finest_level_with_the_map_of_the_same_call_predicts_the_same(kind: str) -> None:
    config = UNetConfig.from_dict(UNETS[kind])
    unet = UNet2DConditionModel(config).eval()
    randomize(unet)
    inputs = unet_inputs(config)
    sample = inputs.pop("sample")
    prepared = unet.prepare(inputs.pop("timesteps")[:1], inputs.pop("context"), **inputs)
    shifts = prepared.shifts[:, 0].expand(len(sample), -1)
    with torch.no_grad():
        whole, deep = unet.predict_keeping(sample, shifts, prepared.texts, prepared.mask)
        finest = unet.predict_finest(sample, shifts, prepared.texts, deep, prepared.mask)
        other = unet.predict_finest(sample, shifts, prepared.texts, deep + 1, prepared.mask)
    assert torch.equal(whole, unet.predict(sample, shifts, prepared.texts, prepared.mask))
    assert torch.equal(finest, whole) and not torch.equal(other, whole)


@pytest.mark.parametrize(("every", "middle"), [(1, 5), (2, 3), (100, 1)])
def test_levels_are_called_at_every_so_manieth_step(
    pipe: Pipeline, counted: dict[str, int], every: int, middle: int
) -> None:
    plain: Tensor = pipe(**FOX).images
    counted.update(middle=0, out=0)
    drawn: Tensor = pipe(**FOX, deep_every=every).images
    assert counted == {"middle": middle, "out": 5}
    assert torch.equal(drawn, plain) == (every == 1)
    assert torch.equal(drawn, pipe(**FOX, deep_every=every).images)  # nothing is kept from one picture to the next


def test_it_counts_within_a_guidance_interval_too(pipe: Pipeline, counted: dict[str, int]) -> None:
    pipe(**FOX, deep_every=2, guidance_interval=(0.5, 5.0))
    assert counted["out"] == 5 and counted["middle"] < 5


def test_it_is_recorded_and_replayed(built_model: Path, tmp_path: Path) -> None:
    file = tmp_path / "fox.png"
    assert (
        main(["generate", "fox", "--model", str(built_model), "--steps", "4", "--deep-every", "2", "-o", str(file)])
        == 0
    )
    assert read_record(file)["deep_every"] == 2
    assert main(["replay", str(file), "--model", str(built_model), "-o", str(tmp_path / "again.png")]) == 0
    assert (tmp_path / "again.png").read_bytes() == file.read_bytes()


def test_engines_of_whole_networks_refuse(pipe: Pipeline) -> None:
    other = Pipeline(pipe.components, engine=Other())
    with pytest.raises(InputError, match=r"deep_every is for engine 'eager', .* got 'other'; use that, or leave"):
        other(**FOX, deep_every=2)
    other(**FOX)
