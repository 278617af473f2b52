"""OpenVINO draws what PyTorch draws, and its conversions are kept, checked, and done without where they cannot be."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from latentdiff import Pipeline
from latentdiff.checkpoints.lora import save_lora
from latentdiff.engine import openvino_engine
from latentdiff.engine.conversions import CACHE, CONTENTS, Damaged, cache_folder, load, network_key, store
from latentdiff.engine.openvino_engine import GRAPH, TEXTS, OpenVINO
from latentdiff.errors import StorageError
from latentdiff.models.unet import UNet2DConditionModel, UNetConfig
from tests.checkpoints.test_lora import lora_of
from tests.models.tiny import UNETS, noise_picture, randomize, unet_inputs
from tests.test_imports import OFFLINE

STEPS: dict[str, Any] = {"num_inference_steps": 3, "output_type": "pt"}
CLOSE = 2e-4  # of 1; one step of an 8-bit picture is 4e-3


def near(drawn: torch.Tensor, expected: torch.Tensor) -> bool:
    return drawn.shape == expected.shape and (drawn - expected).abs().max().item() < CLOSE


@pytest.fixture
def fast(pipe: Pipeline, converted: Path) -> Pipeline:
    return Pipeline(pipe.components, engine=OpenVINO(torch.float32))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_images": 3},  # in batches of 4 and 2 rows
        {"height": 48, "width": 40},
        {"height": 32, "width": 40, "guidance_interval": (0.0, 0.5)},
        {"image": noise_picture(32, 32), "strength": 0.7},
        {"hires": 2.0},
    ],
    ids=["one", "three", "other size", "interval", "image", "two passes"],
)
def test_pictures_are_those_of_pytorch(pipe: Pipeline, fast: Pipeline, options: dict[str, Any]) -> None:
    drawn = fast("a red fox", seed=3, **STEPS, **options)
    assert near(drawn.images, pipe("a red fox", seed=3, **STEPS, **options).images)
    assert torch.equal(fast("a red fox", seed=3, **STEPS, **options).images, drawn.images)
    version = drawn.settings["openvino"]
    assert drawn.settings["engine"] == "openvino" and version[:2] == "20" and "-" not in version


def test_another_process_draws_the_same_from_the_conversion(pipe: Pipeline, fast: Pipeline) -> None:
    other = Pipeline(pipe.components, engine=OpenVINO(torch.float32))
    assert torch.equal(other("fox", **STEPS).images, fast("fox", **STEPS).images)
    assert other.with_loras({}).engine is other.engine


def test_noise_is_found_by_the_same_engine(pipe: Pipeline, fast: Pipeline) -> None:
    picture = noise_picture(32, 32)
    expected = pipe.invert(picture, "fox", num_inference_steps=2)
    assert near(fast.invert(picture, "fox", num_inference_steps=2), expected)


@pytest.fixture
def copied(read_at_once: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder for conversions of its own, in use."""
    monkeypatch.setenv(CACHE, str(tmp_path / "own"))
    return tmp_path / "own"


def test_conversions_are_written_once(pipe: Pipeline, copied: Path) -> None:
    with pytest.warns(UserWarning, match="converting"):
        drawn = Pipeline(pipe.components, engine=OpenVINO(torch.float32))("fox", **STEPS).images
    places = sorted(copied.glob("openvino/*"))
    assert len(places) == 3 and not [place for place in places if place.name.startswith(".")]
    names = {f"{name}.{kind}" for name in (GRAPH, TEXTS) for kind in ("xml", "bin")}
    assert {file.name for place in places for file in place.iterdir()} == names | {CONTENTS}
    again = Pipeline(pipe.components, engine=OpenVINO(torch.float32))("fox", **STEPS).images  # and warns of nothing
    assert torch.equal(drawn, again)


def said_in(said: pytest.WarningsRecorder, text: str) -> bool:
    return any(text in str(one.message) for one in said)


def test_a_damaged_conversion_is_made_anew(pipe: Pipeline, copied: Path) -> None:
    with pytest.warns(UserWarning, match="converting"):
        drawn = Pipeline(pipe.components, engine=OpenVINO(torch.float32))("fox", **STEPS).images
    for place in copied.glob("openvino/*"):
        damage(place, "bytes")
    with pytest.warns(UserWarning) as said:
        again = Pipeline(pipe.components, engine=OpenVINO(torch.float32))("fox", **STEPS).images
    assert said_in(said, "is damaged (graph.bin is not what was written); it is made anew")
    assert torch.equal(drawn, again)
    assert torch.equal(Pipeline(pipe.components, engine=OpenVINO(torch.float32))("fox", **STEPS).images, drawn)


def damage(place: Path, how: str) -> None:
    data = bytearray((place / "graph.bin").read_bytes())
    data[len(data) // 2] ^= 1
    match how:
        case "bytes":
            (place / "graph.bin").write_bytes(data)
        case "cut":
            (place / "graph.bin").write_bytes(data[:2])
        case "contents":
            (place / CONTENTS).write_text("[")
        case "nothing":
            (place / CONTENTS).write_text("{}")
        case "missing":
            (place / "graph.bin").unlink()


@pytest.mark.parametrize("how", ["bytes", "cut", "contents", "nothing", "missing"])
def test_what_is_kept_is_checked(tmp_path: Path, how: str) -> None:
    place = tmp_path / "all" / "one"
    store(place, lambda folder: (folder / "graph.bin").write_bytes(b"weights"))
    assert load(place) == place
    damage(place, how)
    with pytest.raises(Damaged):
        load(place)
    store(place, lambda folder: (folder / "graph.bin").write_bytes(b"weights"))
    assert load(place) == place and list(place.parent.iterdir()) == [place]


def test_without_a_place_to_write_it_draws_all_the_same(
    pipe: Pipeline, copied: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(CACHE, str(tmp_path / "file"))
    with pytest.warns(UserWarning) as said:
        drawn = Pipeline(pipe.components, engine=OpenVINO(torch.float32))("fox", **STEPS).images
    assert said_in(said, "cannot write to") and said_in(said, "free space there or set LATENTDIFF_CACHE")
    assert near(drawn, pipe("fox", **STEPS).images)


def test_a_full_disk_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        (folder / "graph.xml").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(StorageError, match="No space left"):
        store(tmp_path / "all" / "one", write)
    assert list((tmp_path / "all").iterdir()) == [] and load(tmp_path / "all" / "one") is None


def test_the_key_is_of_weights_config_and_versions(pipe: Pipeline) -> None:
    key = network_key(pipe.unet, "1")
    styled = pipe.with_loras({lora_of(pipe.components): 0.5})
    assert network_key(styled.unet, "1") != key == network_key(pipe.with_loras({}).unet, "1")
    assert key not in (network_key(pipe.unet, "2"), network_key(pipe.autoencoder, "1"))
    assert network_key(pipe.to(dtype="bfloat16").unet, "1") != key


def test_where_conversions_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(CACHE, raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "latentdiff"
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    assert cache_folder() == tmp_path / "local" / "latentdiff"


def test_nothing_is_reported_to_its_makers() -> None:
    pytest.importorskip("openvino")
    code = (
        "from latentdiff.engine.openvino_engine import load_openvino\n"
        "load_openvino()\n"
        "import openvino.tools.ovc, time\n"
        "time.sleep(0.5)\n"  # it would do so in a thread
        "assert sys.modules.get('openvino_telemetry') is None\n"
    )
    run = subprocess.run([sys.executable, "-c", OFFLINE + code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="there are no signals")
def test_signals_are_heard_when_engines_have_gone() -> None:
    """Each core of OpenVINO brings a stack for signals, which the next signal may find gone."""
    pytest.importorskip("openvino")
    code = (
        "import os, signal\n"
        "from latentdiff.engine.openvino_engine import core\n"
        "signal.signal(signal.SIGUSR1, lambda number, frame: print('heard'))\n"
        "cores = [core(), core()]\n"
        "names = [one.get_property('CPU', 'FULL_DEVICE_NAME') for one in cores]\n"
        "while cores: cores.pop(0)\n"
        "os.kill(os.getpid(), signal.SIGUSR1)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (0, "heard\n"), run.stderr


@pytest.mark.long
def test_loras_are_in_the_conversion(pipe: Pipeline, fast: Pipeline, tmp_path: Path) -> None:
    file = tmp_path / "style.safetensors"
    save_lora(lora_of(pipe.components), file, pipe.components)
    with pytest.warns(UserWarning) as said:
        drawn = fast.with_loras({file: 0.5})("fox", **STEPS).images
    assert said_in(said, "converting the U-Net") and said_in(said, "converting the text encoder")
    expected = pipe.with_loras({file: 0.5})("fox", **STEPS).images
    assert near(drawn, expected) and not near(drawn, pipe("fox", **STEPS).images)
    assert torch.equal(fast.with_loras({file: 0.5}).with_loras({})("fox", **STEPS).images, fast("fox", **STEPS).images)


@pytest.mark.long
@pytest.mark.parametrize("name", ["sd2", "xl", "x4-upscaler", "text-in-time"])
@torch.no_grad()
def test_every_kind_of_network_is_converted(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    monkeypatch.setenv(CACHE, str(tmp_path))
    network = UNet2DConditionModel(UNetConfig.from_dict({**UNETS[name], "layers_per_block": 1}))
    randomize(network)
    inputs = unet_inputs(network.config)
    sample, timesteps = inputs.pop("sample"), inputs.pop("timesteps")
    prepared, engine = network.prepare(timesteps, **inputs), OpenVINO(torch.float32)
    with pytest.warns(UserWarning, match="converting"):
        made = engine.texts(network), engine.shifts(network)
        seen = network.prepare(timesteps, **inputs, texts=made[0], shifts=made[1])
    drawn = seen.run_by(engine.predict(network))(sample, torch.arange(2))
    expected = prepared(sample, torch.arange(2))
    assert (drawn - expected).abs().max() < 1e-5 * expected.abs().max()


def test_bfloat16_is_near(pipe: Pipeline, copied: Path) -> None:
    if not openvino_engine.computes_in(torch.bfloat16):
        pytest.skip("this processor has no bfloat16")
    half = Pipeline(pipe.components, engine=OpenVINO(torch.bfloat16))
    with pytest.warns(UserWarning, match="converting"):
        drawn = half("fox", **STEPS).images
    difference = (drawn - pipe("fox", **STEPS).images).abs()
    assert 0 < difference.mean() < 0.05  # random weights, pictures of noise


def test_records_are_json(fast: Pipeline, tmp_path: Path) -> None:
    one = next(iter(fast.stream("fox", num_inference_steps=1)))
    assert json.loads(json.dumps(one.record)) == one.record
    assert isinstance(one.image, Image.Image) and np.asarray(one.image).shape == (32, 32, 3)
