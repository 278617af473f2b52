"""Who asks which device there is, what is sent to it once, and pictures replayed on another one."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from latentdiff import Pipeline
from latentdiff.checkpoints import load_pipeline
from latentdiff.checkpoints.variant import save_variant
from latentdiff.cli import main
from latentdiff.diffusion import NoiseSchedule
from latentdiff.diffusion.guidance import adaptive_projected
from latentdiff.diffusion.loop import slerp
from latentdiff.engine.tiled_denoising import make_windows
from tests.checkpoints.small_models import build_folders, weights_of
from tests.engine.test_joint import tiled
from tests.fake_device import FakeDevice

ROOT = Path(__file__).parents[2]
ASKED = re.compile(r"""torch\.(cuda|mps|accelerator|backends\.(mps|cuda))\b|== ["'](cuda|mps)["']""")


def test_one_module_asks_which_device_there_is() -> None:
    files = (ROOT / "latentdiff").rglob("*.py")
    assert [path.name for path in files if ASKED.search(path.read_text(encoding="utf-8"))] == ["devices.py"]


@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_tables_are_sent_once(kind: str) -> None:
    with FakeDevice(kind) as device:
        schedule = NoiseSchedule(num_train_timesteps=10)
        x, timesteps = torch.zeros(2, 1, 4, 4, device=kind), torch.tensor([1, 7], device=kind)
        network = tiled(lambda inputs, rows: inputs, make_windows(20, 9, (8, 8), 1))
        wide = torch.zeros(1, 2, 20, 9, device=kind)
        device.forget()
        for _ in range(3):
            schedule.add_noise(x, x, timesteps), schedule.target(x, x, timesteps), schedule.snr(timesteps)
            schedule.posterior(x, x, timesteps)
            network(wide, timesteps)
        assert sum(device.copies.values()) == 4 and not device.syncs


def test_float32_is_exact_enough_where_there_is_no_other() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 2, 4, 16, 16, generator=generator)
    drawn = {
        "turned": lambda x, y: slerp(x, y, 0.3),
        "turned from itself": lambda x, y: slerp(x, x, 0.3),
        "guided": lambda x, y: adaptive_projected(x, y, 5.0, parallel=0.1, limit=3.0),
    }
    for name, draw in drawn.items():
        expected = draw(first, second)
        with FakeDevice("mps") as device:
            found = draw(first.to(device.device), second.to(device.device))
            assert device.holds(found)
            torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-4, msg=name)


def _draw_of_a_picture(model: Path, kind: str) -> None:
    """Write b.png, drawn of another picture, both on a device."""
    with FakeDevice(kind):
        pipe = Pipeline.from_pretrained(model)
        first = pipe("a fox", num_inference_steps=2)
        pipe("a cat", image=first.images[0], strength=0.5, num_inference_steps=2).save("b.png")


def test_a_picture_of_a_picture_is_replayed_elsewhere(
    built_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Device, model and dtype that are asked for hold for the picture it was drawn of too."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(built_model, "there")
    _draw_of_a_picture(Path("there"), "cuda")
    shutil.move("there", "here")
    assert main(["replay", "b.png", "--device", "cpu"]) == 2
    capsys.readouterr()
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert main(["replay", "b.png", "--device", "cpu", "--model", "here", "-o", "c.png"]) == 0
        assert torch.get_num_threads() == 2  # those of the record were used, and taken back
    finally:
        torch.set_num_threads(threads)
    assert np.array_equal(np.asarray(Image.open("b.png")), np.asarray(Image.open("c.png")))


@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_variants_are_saved_from_a_device_and_loaded_to_it(kind: str, tmp_path: Path) -> None:
    build_folders(tmp_path)
    expected = weights_of(load_pipeline(tmp_path / "difference"))
    with FakeDevice(kind) as device:
        moved = Pipeline.from_pretrained(tmp_path / "difference").components
        save_variant(moved, tmp_path / "again", tmp_path / "bert", dtype=None, rank=1)
        found = weights_of(Pipeline.from_pretrained(tmp_path / "again").components)
        assert all(device.holds(weight) for weight in found.values())
        for name, weight in expected.items():
            torch.testing.assert_close(found[name].cpu(), weight, rtol=0, atol=1e-4, msg=name)
