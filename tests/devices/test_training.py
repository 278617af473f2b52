"""Every kind of training, and the look at it beforehand, on a pretended device (`tests/fake_device.py`)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from latentdiff.training.check.diffusion import check as look
from latentdiff.training.config import AutoencoderTraining, parse_config
from latentdiff.training.monitor.reconstructions import fold_statistics
from PIL import Image

from latentdiff.checkpoints import load_pipeline, save_pipeline
from latentdiff.diffusion import NoiseSchedule
from latentdiff.images import to_tensor
from latentdiff.models.autoencoder import AutoencoderKL
from latentdiff.models.unet import UNet2DConditionModel, UNetConfig
from latentdiff.training import check, monitor, train_autoencoder, train_diffusion
from tests.conftest import UNET
from tests.fake_device import FakeDevice
from tests.training.test_stages import pictures

SIZE = 32
SHAPE = {name: value for name, value in UNET.items() if name != "sample_size"}
SCHEDULE = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}
LEARNED = {"beta_schedule": "linear", "num_train_timesteps": 10, "beta_end": 0.4, "variance_type": "learned_range"}
AUTOENCODER = {"block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 4}
NEW: dict[str, Any] = {"autoencoder": "MODEL", "text_encoder": "MODEL", "model": SHAPE, "schedule": SCHEDULE}
PIXELS: dict[str, Any] = {"text_encoder": "labels", "model": {**SHAPE, "cross_attention_dim": 6}, "schedule": LEARNED}
BASE: dict[str, Any] = {"start_from": "MODEL"}
WORD = {"word": "zyx", "initializer": "a", "vectors": 2}

CASES: dict[str, dict[str, Any]] = {
    "scratch": NEW,
    "parts of a batch": {**NEW, "run": {"accumulation": 2, "gradient_checkpointing": True, "ema_snapshots": 1}},
    "held out": {**NEW, "data": {"held_out": 0.3}},
    "noises": {**NEW, "self_conditioning": True, "offset_noise": 0.1, "input_perturbation": 0.1},
    "pixels": {**PIXELS, "loss": "hybrid"},
    "bound": {**PIXELS, "loss": "vlb", "timesteps": "importance"},
    "lora": {**BASE, "lora": {"rank": 2, "dropout": 0.2}},
    "full": BASE,
    "word": {**BASE, "textual_inversion": WORD, "prompts": ["a zyx"], "data": {"captions": ["a zyx"]}},
    "text encoder": {**BASE, "train_text_encoder": True},
    "dreambooth": {**BASE, "prior": {"prompt": "b", "pictures": 1}},
    "inpaint": {**BASE, "task": "inpaint"},
    "upscale": {"start_from": "UPSCALER", "task": "upscale", "max_noise_level": 10, "data": {"held_out": 0.3}},
    "autoencoder": {
        "stage": "autoencoder",
        "model": AUTOENCODER,
        "loss": {"adversarial": 0.1, "adversarial_start": 0, "r1": 0.1},
    },
}
# How often a step waits for the device, besides the log's lines, samples and checkpoints.
WAITS = {"scratch": 1, "lora": 1, "autoencoder": 1}


@pytest.fixture(params=["cuda", pytest.param("mps", marks=pytest.mark.long)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDevice]:
    """A device, with no time spent on measuring how fast it is, and little on samples."""
    monkeypatch.setattr(monitor.samples, "Settings", SimpleNamespace(num_inference_steps=2))
    for module in (check.table, monitor.instruments):
        monkeypatch.setattr(module, "matrix_product_rate", lambda accelerator: 1e12)
    AcceleratorState._reset_state(reset_partial_state=True)
    with FakeDevice(request.param) as device:
        yield device
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def models(built_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Models of random weights by their name in `CASES`: one whose latents of the pictures are as they should be, and
    one that enlarges four times."""
    place, components = tmp_path_factory.mktemp("models"), load_pipeline(built_model)
    autoencoder = components.autoencoder
    assert isinstance(autoencoder, AutoencoderKL)
    drawn = [Image.open(file).convert("RGB") for file in sorted(pictures(place / "pictures", 6).glob("*.png"))]
    with torch.no_grad():
        latents = autoencoder.encode(to_tensor([image.resize((SIZE, SIZE)) for image in drawn])).mode()
        fold_statistics(autoencoder, latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3)))
    autoencoder.config = replace(autoencoder.config, scaling_factor=1.0)
    save_pipeline(components, place / "model", dtype=None)
    unet = UNet2DConditionModel(UNetConfig.from_dict({**UNET, "in_channels": 7, "num_class_embeds": 20}))
    low = NoiseSchedule(class_name="DDPMScheduler")
    save_pipeline(replace(components, unet=unet, low_res_schedule=low), place / "upscaler", dtype=None)
    return {"MODEL": str(place / "model"), "UPSCALER": str(place / "upscaler")}


def config_of(case: str, place: Path, models: dict[str, str], **run: Any) -> Any:
    """Return the config of a case of one step, with samples after it."""
    given = {name: models.get(value, value) if isinstance(value, str) else value for name, value in CASES[case].items()}
    if not (place / "pictures").exists():
        pictures(place / "pictures", 6)
    tree = {"stage": "diffusion", "prompts": ["a"], **given}
    if tree["stage"] == "autoencoder":
        del tree["prompts"]
    if "lora" in tree or "start_from" in tree:
        tree["optimizer"] = {"learning_rate": 1e-4}
    tree["data"] = {"folder": str(place / "pictures"), "size": SIZE, **given.get("data", {})}
    often = {"steps": 1, "batch_size": 2, "log_every": 1, "sample_every": 1, "save_every": 1, "trackers": []}
    tree["run"] = {**often, "out": str(place / "run"), "precision": "no", **given.get("run", {}), **run}
    return parse_config(tree)


def train(config: Any, resume: bool = False) -> Path:
    AcceleratorState._reset_state(reset_partial_state=True)
    if isinstance(config, AutoencoderTraining):
        return train_autoencoder.train_autoencoder(config, resume)
    return train_diffusion.train_diffusion(config, resume)


@pytest.mark.parametrize("case", CASES)
def test_training_runs_where_the_accelerator_says_and_goes_on(
    case: str,
    device: FakeDevice,
    tmp_path: Path,
    models: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if case != "scratch":  # where speed and activations are worked out for all
        monkeypatch.setattr(train_diffusion, "measure_speed", lambda *_, **__: monitor.instruments.Speed(1e9, 1e12))
        for stage in (train_autoencoder, train_diffusion):
            monkeypatch.setattr(stage, "kept_by_step", lambda *_, **__: 0)
    train(config_of(case, tmp_path, models))
    device.forget()
    exported = train(config_of(case, tmp_path, models, steps=2), resume=True)
    assert exported.exists() and (tmp_path / "run/samples/00000002.png").is_file()
    assert "could not be drawn" not in capsys.readouterr().err
    assert device.copies  # it was used


@pytest.mark.long
@pytest.mark.parametrize("case", ["scratch", "lora", "word", "dreambooth", "inpaint", "upscale", "autoencoder"])
def test_a_run_is_looked_at_on_the_device(
    case: str,
    device: FakeDevice,
    tmp_path: Path,
    models: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for module in (check.diffusion, check.autoencoder):
        monkeypatch.setattr(module, "OVERFIT_STEPS", 2)
    monkeypatch.setattr(check.diffusion, "MEASURED", 4)
    look(config_of(case, tmp_path, models))
    assert "FLOPs of a step" in capsys.readouterr().out


@pytest.mark.parametrize("device", ["cuda"], indirect=True)
@pytest.mark.parametrize("case", WAITS)
def test_a_step_seldom_waits_for_the_device(
    case: str, device: FakeDevice, tmp_path: Path, models: dict[str, str]
) -> None:
    counts = []
    for steps in (1, 4):
        device.forget()
        often = {"steps": steps, "log_every": 100, "sample_every": 100, "save_every": 100}
        train(config_of(case, tmp_path, models, out=str(tmp_path / str(steps)), **often))
        counts.append(sum(device.syncs.values()))
    assert counts[1] - counts[0] == 3 * WAITS[case]


def test_the_environment_may_keep_a_run_off_the_device(
    device: FakeDevice, tmp_path: Path, models: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    train(config_of("full", tmp_path, models))
    assert not device.copies


def test_pictures_of_several_processes_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time that NCCL waits by itself, ten minutes, is too short for one process to encode what all train on."""
    given: dict[str, Any] = {}

    class State:
        device = torch.device("cpu")

        def __init__(self, **options: Any) -> None:
            given.update(options)

    from latentdiff.training.config import RunConfig
    from latentdiff.training.loop import distributed

    monkeypatch.setattr(distributed, "PartialState", State)
    distributed.start_accelerator(RunConfig(out="run", steps=1, batch_size=1, precision="no"))
    assert given["timeout"] >= distributed.LONGEST_WAIT
