"""What the other files here try on a pretended device, on a real GPU; skipped where there is none.

How near pictures come to the CPU's is stated in `NEAR`. None of this needs the weights that come with the package but
one test, which is skipped without them.

    python -m pytest tests/devices/test_real_gpu.py
    LATENTDIFF_TEST_DEVICE=cpu python -m pytest tests/devices/test_real_gpu.py  # the tests themselves, without a GPU
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from latentdiff.training.check.diffusion import check as look
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from latentdiff import Pipeline
from latentdiff.checkpoints import embedded_model
from latentdiff.checkpoints.lora import save_lora
from latentdiff.cli import main
from latentdiff.diffusion import NoiseSchedule
from latentdiff.engine import recorded
from latentdiff.evaluate import negative_log_likelihood
from latentdiff.training import check, monitor
from tests.checkpoints.test_lora import lora_of
from tests.checkpoints.test_single_file import FAMILIES, components_of, tiny
from tests.devices import test_pipeline, test_training
from tests.devices.test_pipeline import MASK, PICTURE, STEPS, TASKS, numbers
from tests.devices.test_training import CASES, config_of, train

DEVICE = os.environ.get("LATENTDIFF_TEST_DEVICE", "cuda")
ON_GPU = DEVICE == "cuda"
# The most that a value, and the mean of all, may be off the CPU's in float32; pictures go from 0 to 1, and latents
# count in their own deviation. In half precision pictures of random weights differ in places, so only the mean tells:
# on a CPU it is up to half of what is allowed here.
NEAR: dict[str, tuple[float, float]] = {
    "float32": (0.02, 0.002),
    "tf32": (0.2, 0.02),
    "float16": (1.0, 0.04),
    "bfloat16": (1.0, 0.16),
}

pytestmark = pytest.mark.skipif(ON_GPU and not torch.cuda.is_available(), reason="there is no GPU")
only_gpu = pytest.mark.skipif(not ON_GPU, reason="the CPU has no such thing")
models = test_pipeline.models  # pipelines by what they do, on the CPU
trained = test_training.models  # folders to train from


def compute_in_tf32(allowed: bool) -> None:
    """Have convolutions in float32 computed in TF32, as PyTorch does unless it is told otherwise, or in float32."""
    if hasattr(torch.backends.cudnn, "conv"):
        torch.backends.cudnn.conv.fp32_precision = "tf32" if allowed else "ieee"
    else:  # PyTorch before 2.9
        torch.backends.cudnn.allow_tf32 = allowed


@pytest.fixture(autouse=True)
def full_float32() -> Iterator[None]:
    compute_in_tf32(False)
    yield
    compute_in_tf32(True)


@pytest.fixture(scope="module")
def on_cpu(models: dict[str, Pipeline]) -> dict[str, np.ndarray]:
    """What was drawn on the CPU in float32 already, by the name of the task."""
    return {}


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Short samples and looks, and no state of accelerate from before."""
    monkeypatch.setattr(monitor.samples, "Settings", SimpleNamespace(num_inference_steps=2))
    for module in (check.diffusion, check.autoencoder):
        monkeypatch.setattr(module, "OVERFIT_STEPS", 2)
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def assert_near(drawn: Any, expected: np.ndarray, precision: str) -> None:
    """Compare with what the CPU drew, by `NEAR`."""
    found = numbers(drawn)
    pixels = found.dtype == np.uint8
    scale = 255.0 if pixels else max(1.0, float(expected.std()))
    apart = np.abs(found.astype(np.float64) - expected) / scale
    most, mean = NEAR[precision]
    assert np.isfinite(apart).all() and apart.max() <= most and apart.mean() <= mean, (apart.max(), apart.mean())


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_pictures_are_near_those_of_the_cpu(
    models: dict[str, Pipeline], on_cpu: dict[str, np.ndarray], name: str, dtype: str
) -> None:
    model, draw = TASKS[name]
    if name not in on_cpu:
        on_cpu[name] = numbers(draw(models[model]))
    drawn = draw(models[model].to(DEVICE, dtype))
    assert_near(drawn, on_cpu[name], dtype)
    if not isinstance(drawn, Tensor):
        assert drawn.settings["device"] == DEVICE


def test_pictures_in_tf32(models: dict[str, Pipeline]) -> None:
    compute_in_tf32(True)
    assert_near(TASKS["text"][1](models["text"].to(DEVICE)), numbers(TASKS["text"][1](models["text"])), "tf32")


@pytest.mark.parametrize("family", [*FAMILIES, "inpainting"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_family_in_half_precision(family: str, dtype: str) -> None:
    kind, channels = ("Stable Diffusion 1.x", 9) if family == "inpainting" else (family, 4)
    components = components_of(tiny(kind), channels)
    options: dict[str, Any] = {**STEPS, "sampler": "dpmpp_2m", "output_type": "pt"}
    if components.upscales:
        options["image"] = PICTURE.resize((8, 8))
    elif components.inpaints:
        options |= {"image": PICTURE, "mask": MASK}
    else:
        options |= {"height": 32, "width": 32}
    whole = Pipeline(components)
    expected = numbers(whole("a (red fox:1.2)" * 20, **options))
    assert_near(whole.to(DEVICE, dtype)("a (red fox:1.2)" * 20, **options), expected, dtype)


@pytest.mark.parametrize("name", ["text", "image", "self-conditioning", "inpaint"])
def test_noise_is_that_of_the_cpu_to_the_bit(models: dict[str, Pipeline], name: str) -> None:
    """Seen in what the U-Net is first called with."""
    inputs = []
    for place in ("cpu", DEVICE):
        pipe, called = models[TASKS[name][0]].to(place), list[Tensor]()
        hook = pipe.unet.conv_in.register_forward_hook(
            lambda _, given, out, to=called: to.append(given[0].cpu())  # type: ignore[misc]
        )
        try:
            TASKS["text"][1](pipe)
        finally:
            hook.remove()
        inputs.append(called[0][:, :4])
    assert torch.equal(*inputs)


def test_equal_calls_draw_equal_pictures(models: dict[str, Pipeline]) -> None:
    pipe = models["text"].to(DEVICE, "float16")
    first, second = (numbers(TASKS["text"][1](pipe)) for _ in range(2))
    assert np.array_equal(first, second)


@only_gpu
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_graphs_draw_the_same_bits(models: dict[str, Pipeline], dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorded, "GAIN", 0.0)  # however fast they are
    pipe = models["text"].to(DEVICE, dtype)
    graphs = Pipeline(pipe.components, engine=recorded.Recorded())
    for seed in (0, 1):
        plain, drawn = (numbers(one("a fox", num_inference_steps=4, seed=seed)) for one in (pipe, graphs))
        assert np.array_equal(plain, drawn)


@only_gpu
@pytest.mark.parametrize("name", ["text", "known image", "inpaint"])
@pytest.mark.parametrize("sampler", ["dpmpp_2m", "euler_a"])
def test_no_step_waits_for_the_gpu(models: dict[str, Pipeline], name: str, sampler: str) -> None:
    """PyTorch raises at whatever would wait between the first step's end and the last one's."""
    pipe = models[TASKS[name][0]].to(DEVICE)
    options: dict[str, Any] = {} if name == "text" else {"image": PICTURE, "strength": 1.0, "mask": MASK}

    def watch(done: int, total: int, denoised: Tensor) -> None:
        torch.cuda.set_sync_debug_mode("error" if done < total else "default")

    pipe("a fox", num_inference_steps=2, sampler=sampler, **options)  # handles and kernels are made here
    try:
        pipe("a fox", num_inference_steps=6, sampler=sampler, callback=watch, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@only_gpu
def test_offloaded_networks(models: dict[str, Pipeline], built_model: Path) -> None:
    pipe = Pipeline.from_pretrained(built_model, device=DEVICE, offload=True)
    for name in ("hires", "known image"):
        expected = numbers(TASKS[name][1](models["text"].to(DEVICE)))
        assert np.array_equal(numbers(TASKS[name][1](pipe)), expected)
    assert all(weight.device.type == "cpu" for weight in pipe.unet.parameters())


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_tiles_are_the_whole(models: dict[str, Pipeline], dtype: str) -> None:
    pipe = models["text"].to(DEVICE, dtype)
    drawn = Pipeline(pipe.components, tile_size=8)("a fox", height=64, width=64, **STEPS)
    assert_near(drawn, numbers(pipe("a fox", height=64, width=64, **STEPS)), dtype)


@pytest.mark.parametrize("attention", ["sdpa", "xformers"])
def test_attention_is_two_matrix_products(built_model: Path, attention: str) -> None:
    """Whichever kernel computes it."""
    if attention == "xformers" and not (ON_GPU and importlib.util.find_spec("xformers")):
        pytest.skip("there is no xformers")
    pipe = Pipeline.from_pretrained(built_model, device=DEVICE, dtype="float16", attention=attention)
    drawn = TASKS["long and short texts"][1](pipe)
    plain = Pipeline.from_pretrained(built_model, device=DEVICE, dtype="float16")
    with sdpa_kernel(SDPBackend.MATH):
        expected = numbers(TASKS["long and short texts"][1](plain))
    assert_near(drawn, expected, "float16")


@pytest.mark.parametrize("offload", [pytest.param(True, marks=only_gpu), False])
def test_loras(models: dict[str, Pipeline], built_model: Path, tmp_path: Path, offload: bool) -> None:
    pipe, file = models["text"], tmp_path / "a.safetensors"
    save_lora(lora_of(pipe.components), file, pipe.components)
    loaded = Pipeline.from_pretrained(built_model, device=DEVICE, offload=offload)
    assert_near(
        loaded.with_loras({file: 0.1})("a fox", **STEPS),
        numbers(pipe.with_loras({file: 0.1})("a fox", **STEPS)),
        "float32",
    )


def test_replayed_where_it_was_drawn_and_elsewhere(
    built_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(built_model, "model")
    drawing = ["generate", "a fox", "--model", "model", "--steps", "2", "--device", DEVICE]
    assert main([*drawing, "-o", "a.png"]) == 0
    original = np.asarray(Image.open("a.png"))[None]
    assert main(["replay", "a.png", "-o", "here.png"]) == 0
    assert np.array_equal(np.asarray(Image.open("here.png"))[None], original)
    assert main(["replay", "a.png", "-o", "cpu.png", "--device", "cpu"]) == 0
    assert main(["replay", "cpu.png", "-o", "back.png", "--device", DEVICE]) == 0
    for name in ("cpu.png", "back.png"):
        assert_near(SimpleNamespace(images=[Image.open(name)]), original, "float32")


def test_likelihoods(models: dict[str, Pipeline]) -> None:
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    schedule = NoiseSchedule(num_train_timesteps=6, beta_end=0.8)
    components = replace(models["text"].components, schedule=schedule)
    texts = ["a fox", "a cat", "the fox " * 9]
    expected = negative_log_likelihood(components, images, texts, ode_steps=2)
    moved = Pipeline(components).to(DEVICE).components
    found = negative_log_likelihood(moved, images.to(DEVICE), texts, ode_steps=2)
    for name in ("bound", "ode", "autoencoder"):
        for key, figures in expected[name].items():
            assert found[name][key] == pytest.approx(figures, rel=1e-3)


def weights_of(exported: Path) -> dict[str, Tensor]:
    """Return the weights of what a training exported, a file or a folder, by file and name."""
    files = [exported] if exported.is_file() else sorted(exported.rglob("*.safetensors"))
    return {f"{file.name} {name}": value.float() for file in files for name, value in load_file(file).items()}


def apart(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    """Return how far two sets of weights are apart at most."""
    assert first.keys() == second.keys()
    return max((first[name] - second[name]).abs().max().item() for name in first)


@pytest.mark.parametrize("case", CASES)
def test_training_goes_on_where_it_stopped(
    case: str, training: None, tmp_path: Path, trained: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    """To the bit where two unbroken runs are equal to the bit; else as near as those are to each other."""
    runs = []
    for name in ("first", "second"):
        config = config_of(case, tmp_path, trained, out=str(tmp_path / name), steps=4)
        runs.append(weights_of(train(config)))
    shutil.rmtree(tmp_path / "second/checkpoints/step-00000004")
    runs.append(weights_of(train(config, resume=True)))
    assert "could not be drawn" not in capsys.readouterr().err
    assert all(torch.isfinite(weight).all() for run in runs for weight in run.values())
    assert apart(runs[0], runs[2]) <= 4 * apart(runs[0], runs[1])


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16", marks=only_gpu)])
@pytest.mark.parametrize("case", ["scratch", "lora", "autoencoder"])
def test_training_in_half_precision(
    case: str, precision: str, training: None, tmp_path: Path, trained: dict[str, str]
) -> None:
    exported = train(config_of(case, tmp_path, trained, precision=precision))
    assert all(torch.isfinite(weight).all() for weight in weights_of(exported).values())


@only_gpu
@pytest.mark.parametrize("case", ["scratch", "autoencoder"])
def test_training_compiled(case: str, training: None, tmp_path: Path, trained: dict[str, str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the compiler
        exported = train(config_of(case, tmp_path, trained, precision="bf16", compile=True))
    assert all(torch.isfinite(weight).all() for weight in weights_of(exported).values())


@pytest.mark.parametrize("case", ["scratch", "lora", "word", "dreambooth", "inpaint", "upscale", "autoencoder"])
def test_a_run_is_looked_at(
    case: str, training: None, tmp_path: Path, trained: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    look(config_of(case, tmp_path, trained))
    assert "FLOPs of a step" in capsys.readouterr().out


@only_gpu
@pytest.mark.parametrize("case", test_training.WAITS)
def test_a_step_seldom_waits_for_the_gpu(case: str, training: None, tmp_path: Path, trained: dict[str, str]) -> None:
    counts = []
    often = {"log_every": 100, "sample_every": 100, "save_every": 100}
    for steps in (3, 7):
        config = config_of(case, tmp_path, trained, out=str(tmp_path / str(steps)), steps=steps, **often)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                train(config)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        counts.append(sum("synchronizing" in str(warning.message) for warning in caught))
    assert counts[1] - counts[0] <= 4 * test_training.WAITS[case]


@pytest.mark.skipif(
    not (embedded_model() / "unet/diffusion_pytorch_model.safetensors").is_file(), reason="there are no weights"
)
def test_the_embedded_model_draws_what_it_draws_on_the_cpu() -> None:
    options: dict[str, Any] = {"num_inference_steps": 10, "seed": 1}
    expected = numbers(Pipeline.from_pretrained(device="cpu")("a red fox", **options))
    assert_near(Pipeline.from_pretrained(device=DEVICE)("a red fox", **options), expected, "float32")
