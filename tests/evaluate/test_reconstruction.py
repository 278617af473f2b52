"""What comes back of an autoencoder: known answers, other implementations, and what is refused."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from latentdiff import Pipeline
from latentdiff.errors import InputError, LatentDiffError
from latentdiff.evaluate import reconstruction
from latentdiff.evaluate.latents import eight_bit
from latentdiff.evaluate.run import measure
from latentdiff.evaluate.sets import blurred
from tests.evaluate.small import Shift, evaluation, images
from tests.models.test_pixels import components as pixel_model
from tests.training.test_lpips import network, weights  # noqa: F401  (fixtures)

NAMES = ("rfid", "psnr", "ssim", "lpips")

pytest.importorskip("skimage")


def test_an_autoencoder_that_changes_nothing(pipe: Pipeline, weights: Path, tmp_path: Path) -> None:  # noqa: F811
    same = replace(pipe.components, autoencoder=Shift())  # type: ignore[arg-type]
    figures = measure(evaluation(tmp_path, same, images(12), lpips_weights=weights), NAMES)
    found = {figure.name: figure for figure in figures}
    assert found["rfid"].estimate.value == pytest.approx(0, abs=1e-9)
    assert found["psnr"].estimate.value == math.inf and found["psnr"].unit == "dB"
    assert found["ssim"].estimate.value == pytest.approx(1, abs=1e-6)
    assert found["lpips"].estimate.value == 0
    for name, worse in (("rfid", 1), ("psnr", -1), ("ssim", -1), ("lpips", 1)):  # blurred pictures
        ceiling = found[name].ceiling
        assert ceiling is not None and worse * (ceiling - found[name].estimate.value) > 1e-5, name
    assert found["psnr"].to_json()["estimate"]["value"] is None


def test_pictures_that_are_lighter_by_known_levels(pipe: Pipeline, tmp_path: Path) -> None:
    pictures = images(6)
    lighter = replace(pipe.components, autoencoder=Shift(5.0))  # type: ignore[arg-type]
    asked = evaluation(tmp_path, lighter, pictures)
    psnr, ssim = measure(asked, ["psnr", "ssim"])
    assert psnr.estimate.value == pytest.approx(20 * math.log10(255 / 5), abs=1e-4)
    assert psnr.estimate.low == pytest.approx(psnr.estimate.high, abs=1e-3)
    assert set(psnr.items) == {f"{number} test {number}" for number in range(6)}
    torchmetrics = pytest.importorskip("torchmetrics.functional.image")
    _, whole = torchmetrics.structural_similarity_index_measure(
        *((pair.double() + 1) * 127.5 for pair in (asked.returned, pictures[asked.chosen])),
        gaussian_kernel=True,
        sigma=ssim.protocol["sigma"],
        kernel_size=ssim.protocol["window"],
        data_range=float(ssim.protocol["data_range"]),
        reduction="none",
        return_full_image=True,
    )
    expected = whole[..., 5:-5, 5:-5].mean(dim=(1, 2, 3)).tolist()
    assert list(ssim.items.values()) == pytest.approx(expected, abs=1e-4)
    assert ssim.protocol["window"] == 11


def test_the_model_s_own_autoencoder_is_measured(pipe: Pipeline, tmp_path: Path) -> None:
    pictures = images(9)
    asked = evaluation(tmp_path, pipe.components, pictures)
    chosen = pictures[asked.chosen]
    expected = pipe.autoencoder.decode(pipe.autoencoder.encode(chosen).mode())
    assert torch.allclose(asked.returned, eight_bit(expected), atol=1 / 127)
    rfid, psnr = measure(asked, ["rfid", "psnr"])
    assert rfid.estimate.low <= rfid.estimate.value <= rfid.estimate.high and rfid.estimate.n == 9
    assert rfid.protocol["features"] == "quarters" and psnr.protocol["data_range"] == 255
    levels = (asked.returned - chosen).mul(127.5).square().mean(dim=(1, 2, 3)).numpy()
    assert list(psnr.items.values()) == pytest.approx(list(10 * np.log10(255**2 / levels)), abs=1e-3)


def test_what_cannot_be_measured_is_said_in_one_line(pipe: Pipeline, tmp_path: Path) -> None:
    broken = replace(pipe.components, autoencoder=Shift(math.nan))  # type: ignore[arg-type]
    small = replace(pipe.components, autoencoder=Shift())  # type: ignore[arg-type]
    cases = [
        (pixel_model(), images(3, side=8), "psnr", "draws pixels and has no autoencoder"),
        (broken, images(3), "psnr", "values that are not finite"),
        (small, images(1), "rfid", "at least 2 test pictures, got 1"),
        (small, images(3, side=15), "psnr", "multiples of 2 pixels wide and high, got 15"),
        (small, images(3, side=10), "ssim", "needs pictures of 11 pixels or more, got 10"),
        (small, images(3), "lpips", r"make them with `python -m latentdiff.training.losses.lpips"),
        (None, images(3), "psnr", "of a model, got a folder of pictures"),
    ]
    for components, pictures, name, message in cases:
        with pytest.raises(InputError, match=message) as caught:
            measure(evaluation(tmp_path, components, pictures), [name])
        assert "\n" not in str(caught.value)
    with pytest.raises(LatentDiffError, match=r"none\.safetensors is none; make it with"):
        measure(evaluation(tmp_path, small, images(3), lpips_weights=tmp_path / "none.safetensors"), ["lpips"])


def test_metrics_without_their_package_name_the_extra(
    pipe: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(reconstruction.importlib, "import_module", absent)
    with pytest.raises(LatentDiffError, match=r"this metric needs scikit-image.*latentdiff\[evaluate\]"):
        measure(evaluation(tmp_path, pipe.components, images(3)), ["ssim"])


def test_blurred_pictures_keep_their_light() -> None:
    grey = torch.full((1, 3, 64, 64), 100 / 127.5 - 1)
    assert torch.allclose(blurred(grey), grey, atol=1e-6)
    pictures = images(3)
    assert 0 < (blurred(pictures) - pictures).abs().max() < 0.2
