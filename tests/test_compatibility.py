"""Pictures and checkpoints of before the rooms, options and config sections there are now: they replay and resume.

tests/fixtures/before was written by commit 9eff77a, the pictures by models of a few thousand random weights.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from latentdiff.cli import main
from latentdiff.images import open_image

BEFORE = Path(__file__).parent / "fixtures/before"
INPUTS = ("in.png", "mask.png")


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = shutil.copytree(BEFORE, tmp_path / "before")
    monkeypatch.chdir(place)
    return place


@pytest.mark.parametrize(
    "name", sorted(path.name for path in (BEFORE / "pictures").glob("*.png") if path.name not in INPUTS)
)
def test_old_pictures_replay(workplace: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(workplace / "pictures")
    assert main(["replay", name, "-o", "again.png"]) == 0
    apart = np.asarray(open_image("again.png"), int) - np.asarray(open_image(name), int)
    assert np.abs(apart).max() <= 2  # of other versions and machines, nothing on the same


def test_old_checkpoints_resume(workplace: Path) -> None:
    assert main(["train", "config.yaml", "--resume"]) == 0
    resumed, unbroken = load_file("run/checkpoints/step-00000004/model.safetensors"), load_file("final.safetensors")
    assert resumed.keys() == unbroken.keys()
    for name, weight in unbroken.items():
        torch.testing.assert_close(resumed[name], weight, rtol=1e-4, atol=1e-5)
