"""The scripts that evaluate inpainting and super-resolution, on tiny models of random weights and made-up drawings."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from latentdiff.checkpoints import load_pipeline, save_pipeline
from latentdiff.diffusion import NoiseSchedule
from latentdiff.models.unet import UNet2DConditionModel
from tests.models.tiny import randomize

SCRIPTS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def drawings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set as `latentdiff data emoji` makes it, three pictures of 64 px in each split."""
    folder = tmp_path_factory.mktemp("drawings")
    for number, split in enumerate(("train", "validation", "test")):
        (folder / split).mkdir()
        lines = []
        for name in ("fox", "cat", "red"):
            rgba = np.random.default_rng([number, len(lines)]).integers(0, 256, (8, 8, 4), dtype=np.uint8)
            Image.fromarray(rgba).resize((64, 64)).save(folder / split / f"{name}.png")
            lines.append(json.dumps({"file_name": f"{name}.png", "captions": [f"a {name}"], "concept": name}))
        (folder / split / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture
def variant(built_model: Path, tmp_path: Path) -> Callable[..., Path]:
    """Save the tiny model with another U-Net, and what else is changed."""

    def save(config: dict[str, Any], **changes: Any) -> Path:
        components = load_pipeline(built_model)
        assert components.unet is not None
        unet = UNet2DConditionModel(replace(components.unet.config, **config))
        randomize(unet)
        save_pipeline(replace(components, unet=unet, **changes), tmp_path / "model", dtype=None)
        return tmp_path / "model"

    return save


def figures_of(script: str, *arguments: object) -> dict[str, Any]:
    command = [sys.executable, str(SCRIPTS / script), *map(str, arguments)]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout.splitlines()[-1])


def test_inpainting(drawings: Path, variant: Callable[..., Path], tmp_path: Path) -> None:
    model, grid = variant({"in_channels": 9}), tmp_path / "grid.png"
    options = ["--data", drawings, "--steps", 1, "--images", 2, "--out", grid]
    figures = figures_of("inpainting.py", "--trained", model, *options)
    assert figures["images"] == figures["blend"]["kept"] == figures["trained"]["kept"] == 2
    gain = figures["trained"]["psnr"][0] - figures["blend"]["psnr"][0]
    assert figures["gain"]["psnr"][0] == pytest.approx(gain)
    with Image.open(grid) as image:
        assert image.size == (4 * 130 - 2, 2 * 130 - 2)


def test_upscaling(drawings: Path, variant: Callable[..., Path], tmp_path: Path) -> None:
    schedule = NoiseSchedule(beta_schedule="scaled_linear", class_name="DDPMScheduler")
    model = variant({"in_channels": 7, "num_class_embeds": 400}, low_res_schedule=schedule)
    options = ["--data", drawings, "--size", 64, "--steps", 1, "--images", 2, "--out", tmp_path / "grid.png"]
    figures = figures_of("upscaling.py", "--model", model, *options)
    assert figures["images"] == 2 and figures["factor"] == 4
    # Squares of 8 px with soft edges: Lanczos brings them back, unless they are damaged, and random weights do not.
    assert figures["clean"]["lanczos"]["psnr"][0] > figures["degraded"]["lanczos"]["psnr"][0] + 1
    for kind in ("clean", "degraded"):
        gain = figures[kind]["model"]["ssim"][0] - figures[kind]["lanczos"]["ssim"][0]
        assert gain < 0 and figures[kind]["gain"]["ssim"][0] == pytest.approx(gain, abs=1e-6)
    with Image.open(tmp_path / "grid.png") as image:
        assert image.size == (4 * 66 - 2, 4 * 66 - 2)
