"""The wheel claims one import name and runs beside anybody's folder called `training`; so does a checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `pip install` unpacks."""
    place = tmp_path_factory.mktemp("wheel")
    (built,) = WheelBuilder(str(ROOT)).build(directory=str(place), versions=["standard"])
    with zipfile.ZipFile(built) as archive:
        archive.extractall(place / "site")
    return place / "site"


@pytest.fixture
def someone_elses_training(tmp_path: Path) -> Path:
    """A working folder with a package `training` in it."""
    (tmp_path / "training").mkdir()
    (tmp_path / "training/__init__.py").write_text("raise SystemExit('not that one')")
    return tmp_path


def run(site: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "latentdiff", *arguments]
    environment = os.environ | {"PYTHONPATH": str(site)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_the_wheel_has_one_top_level_name(wheel: Path) -> None:
    names = sorted(entry.name for entry in wheel.iterdir())
    assert names[0] == "latentdiff" and names[1].startswith("latentdiff-") and len(names) == 2
    assert (wheel / "latentdiff/training/loop/run.py").is_file()
    assert (wheel / "latentdiff/training/configs/emoji-diffusion.yaml").is_file()
    assert (wheel / "latentdiff/_assets/emoji/model_index.json").is_file()
    assert not (wheel / "latentdiff/training.py").exists()  # stands in for the folder in a checkout alone


@pytest.mark.long
@pytest.mark.parametrize("installed", [True, False])
def test_training_is_ours_beside_a_folder_of_that_name(
    wheel: Path, someone_elses_training: Path, installed: bool
) -> None:
    site = wheel if installed else ROOT
    done = run(site, someone_elses_training, "train", "none.yaml")
    assert done.returncode == 2 and "none.yaml" in done.stderr and "Traceback" not in done.stderr
    done = run(site, someone_elses_training, "train", "digits-ddpm.yaml", "--set", "data.foldr=x")
    assert done.returncode == 2 and "did you mean" in done.stderr and done.stderr.count("\n") <= 2


def test_a_checkout_has_the_same_modules(wheel: Path) -> None:
    def modules(site: Path, *, training: Path) -> set[str]:
        own = {path.relative_to(site / "latentdiff") for path in (site / "latentdiff").rglob("*.py")}
        inner = {Path("training") / path.relative_to(training) for path in training.rglob("*.py")}
        return {str(path) for path in own | inner} - {"training.py"}

    assert modules(wheel, training=wheel / "latentdiff/training") == modules(ROOT, training=ROOT / "training")
