"""The examples do what they say: small programs from public pieces."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from latentdiff import Pipeline
from latentdiff.images import open_image, open_stored
from latentdiff.marks import GENERATED, source_type_of

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name: str, *arguments: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_text_to_image_on_one_screen_is_the_picture_of_the_pipeline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("text_to_image.py", "a red fox", str(tmp_path / "fox.png"), monkeypatch=monkeypatch)
    assert source_type_of(open_stored(tmp_path / "fox.png")) == GENERATED
    expected = np.asarray(Pipeline.from_pretrained(device="cpu")("a red fox").images[0]).astype(int)
    assert abs(np.asarray(open_image(tmp_path / "fox.png")) - expected).max() <= 1  # rounding of tabulated times
    assert len((EXAMPLES / "text_to_image.py").read_text().splitlines()) <= 60


@pytest.mark.long
def test_unconditional_diffusion_on_a_folder_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = EXAMPLES.parent / "assets/sample"
    torch.manual_seed(0)
    run("train_ddpm.py", str(sample), str(tmp_path / "a.png"), "--size", "8", "--steps", "160", monkeypatch=monkeypatch)
    assert source_type_of(open_stored(tmp_path / "a.png")) == GENERATED
    pixels = np.asarray(open_image(tmp_path / "a.png"))
    assert pixels.shape == (32, 32, 3)
    assert pixels.mean() > 150  # emoji on white, where noise would be grey
