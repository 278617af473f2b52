"""Models that draw from a picture: what they are given, what is measured of them, and what they cannot be asked."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from latentdiff import Pipeline
from latentdiff.errors import InputError
from latentdiff.evaluate import Evaluation, Request
from latentdiff.evaluate.compare import compare
from latentdiff.evaluate.features import FeatureNetwork
from latentdiff.evaluate.pictures import Item
from latentdiff.evaluate.restoration import MOST, psnr_inside
from latentdiff.evaluate.run import measure
from latentdiff.evaluate.tasks import spoilt
from latentdiff.images import open_image, to_tensor
from tests.checkpoints.test_single_file import components_of, tiny
from tests.evaluate.small import images, reference
from tests.generation.test_upscaling import upscaler  # noqa: F401  (fixture)

STEPS = {"num_inference_steps": 2}


def asked(pipe: Pipeline, out: Path, count: int = 3, **settings: object) -> Evaluation:
    return Evaluation(Request(out, settings={**STEPS, **settings}), pipe, {"test": reference(images(count), "test")})


def test_what_is_left_of_a_picture_is_a_function_of_the_seed() -> None:
    (image,) = images(1)
    one, same, other = (spoilt("inpaint", image, 4, seed) for seed in ((0, 1), (0, 1), (0, 2)))
    assert one["image"].size == one["mask"].size == (32, 32) and torch.equal(to_tensor([one["image"]])[0], image)
    assert one["mask"].tobytes() == same["mask"].tobytes() != other["mask"].tobytes()
    clean, degraded = (spoilt(task, image, 4, (0, 2))["image"] for task in ("upscale", "upscale_degraded"))
    assert clean.size == degraded.size == (8, 8) and clean.tobytes() != degraded.tobytes()
    with pytest.raises(InputError, match="multiples of 5 pixels wide and high, got 32x32; try another height"):
        spoilt("upscale", image, 5, (0, 1))


def test_the_error_is_that_of_the_hole_alone() -> None:
    real, holes = images(2), torch.zeros(2, 1, 32, 32, dtype=torch.bool)
    holes[:, :, :8, :4] = True
    wrong = real + 0.5 * ~holes  # outside
    assert psnr_inside(wrong, real, holes) == pytest.approx([MOST, MOST])
    wrong = real + 0.2 * holes  # a tenth of the range
    assert psnr_inside(wrong, real, holes) == pytest.approx([20, 20], abs=1e-4)


def test_a_model_of_texts_is_measured_by_what_it_blends_into_holes(pipe: Pipeline, tmp_path: Path) -> None:
    found = {figure.name: figure for figure in measure(asked(pipe, tmp_path), ["inpainting"])}
    psnr, kept = found["inpainting/psnr"], found["inpainting/kept"]
    assert kept.estimate.value == 1 and kept.estimate.n == psnr.estimate.n == 3
    assert psnr.floor is not None and psnr.ceiling is not None and psnr.unit == "dB"
    assert {"seed", "num_inference_steps", "masks"} <= psnr.protocol.keys()
    drawn = [tmp_path / place for place in psnr.pictures.values()]
    assert len(drawn) == len(psnr.items) == 3 and all(place.is_file() for place in drawn)
    assert open_image(tmp_path / "inpainting.png").size == (3 * 32 + 4, 3 * 32 + 4)  # given, made, truth
    times = [place.stat().st_mtime_ns for place in drawn]
    again = measure(asked(pipe, tmp_path), ["inpainting"])
    assert [place.stat().st_mtime_ns for place in drawn] == times and again[0] == psnr


def test_a_model_that_fills_in_is_measured_beside_one_that_blends(pipe: Pipeline, tmp_path: Path) -> None:
    model = Pipeline(components_of(tiny("Stable Diffusion 1.x"), 9))
    assert model.components.inpaints
    evaluation = asked(model, tmp_path / "one", num_inference_steps=1)
    evaluation.network = FeatureNetwork("quarters", "0", "none", lambda x: F.adaptive_avg_pool2d(x, 2).flatten(1))
    assert evaluation.caption_items[0].inputs.keys() == {"image", "mask"}
    ours = measure(evaluation, ["inpainting"])
    assert [path for path, _ in evaluation.drawn] == [  # the same pictures serve other metrics
        evaluation.home / ours[0].pictures[item.name] for item in evaluation.caption_items
    ]
    theirs = measure(asked(pipe, tmp_path / "two", num_inference_steps=1), ["inpainting"])
    (one, other) = compare(theirs, ours, [])
    assert one.paired and not one.refused and not other.refused
    (near,) = measure(evaluation, ["neighbours"])
    assert near.items.keys() == ours[0].items.keys()  # made of remains, too
    assert near.estimate.value == 0  # each label is of one picture alone, which is left out
    with pytest.raises(InputError, match="compose asks for pictures drawn from texts alone, got a model made to inpai"):
        evaluation.draw("compose", [Item("a fox", 0)])


def test_a_model_that_enlarges_is_measured_from_clean_and_degraded_pictures(
    upscaler: Pipeline,  # noqa: F811
    tmp_path: Path,
) -> None:
    evaluation = asked(upscaler, tmp_path, count=2, height=32, width=32)
    found = {figure.name: figure for figure in measure(evaluation, ["upscaling", "speed"])}
    names = ("upscaling/psnr", "upscaling/ssim", "upscaling/degraded_psnr", "upscaling/degraded_ssim")
    assert tuple(found)[:4] == names and "speed/seconds_to_picture" in found
    for name in names:
        assert math.isfinite(found[name].estimate.value) and found[name].floor is not None
    clean, degraded = (found[name].ceiling for name in ("upscaling/psnr", "upscaling/degraded_psnr"))
    assert (tmp_path / "upscaling.png").is_file() and (tmp_path / "upscaling-degraded.png").is_file()
    assert clean is not None and degraded is not None and clean > degraded  # of Lanczos' filter
    assert found["upscaling/psnr"].protocol["height"] == 32
    assert found["upscaling/psnr"].protocol_digest != found["upscaling/degraded_psnr"].protocol_digest
    sizes = {np.asarray(to_tensor([item.inputs["image"]])).shape[-1] for item in evaluation.caption_items}
    assert sizes == {32 // upscaler.autoencoder.config.downsample_factor}


def test_upscaling_is_of_models_that_enlarge(pipe: Pipeline, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="upscaling is of models that enlarge pictures, got one that draws them"):
        measure(asked(pipe, tmp_path), ["upscaling"])
    assert not list(tmp_path.iterdir())
