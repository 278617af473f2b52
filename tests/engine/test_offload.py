"""Offloading: each network is on the device while it runs, alone, and off it afterwards, also after an error.

There is no device here but the CPU, so "cpu:0" stands for one: torch computes on it and tells it from "cpu".
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from latentdiff import Pipeline
from latentdiff.checkpoints.lora import save_lora
from latentdiff.cli import main
from latentdiff.engine.offload import Offload
from latentdiff.errors import InputError
from tests.checkpoints.test_lora import lora_of
from tests.fake_device import FakeDevice

STEPS = {"num_inference_steps": 2, "output_type": "latent"}
DEVICE = torch.device("cpu", 0)


def offload() -> Offload:
    offload = Offload(torch.device("cuda"))
    offload.device = DEVICE
    return offload


class Watch:
    """Notes which networks are on the device, and in which order they run there."""

    def __init__(self, pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names = {pipe.text_encoder: "text encoder", pipe.unet: "unet", pipe.autoencoder: "autoencoder"}
        self.at_home = {network: _place(network) for network in self.names}
        self.ran: list[str] = []
        move = nn.Module.to

        def moved(network: nn.Module, place: Any, *rest: Any) -> nn.Module:
            for tensor in network.parameters():  # which torch leaves where they are on the way from "cpu" to "cpu:0"
                tensor.data = tensor.data.clone()
            return move(network, place, *rest)

        monkeypatch.setattr(nn.Module, "to", moved)
        for network, name in self.names.items():
            for module in network.modules():
                module.register_forward_pre_hook(self._on_run(name))

    @property
    def there(self) -> set[str]:
        """The networks that are not in the memory they were in at first."""
        return {self.names[network] for network, home in self.at_home.items() if _place(network) != home}

    def _on_run(self, name: str) -> Callable[..., None]:
        def note(module: nn.Module, inputs: Any) -> None:
            assert self.there == {name}, f"{name} runs with {self.there} on the device"
            if self.ran[-1:] != [name]:
                self.ran.append(name)

        return note


def _place(network: nn.Module) -> int:
    return next(network.parameters()).data_ptr()


@pytest.fixture
def offloading(built_model: Path) -> Pipeline:
    return Pipeline(Pipeline.from_pretrained(built_model, device="cpu").components, offload=offload())


def test_one_network_at_a_time(offloading: Pipeline, pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Watch(offloading, monkeypatch)
    options = {**STEPS, "output_type": "pt", "num_images": 2, "batch_size": 1}
    assert torch.equal(offloading("cat", **options).images, pipe("cat", **options).images)
    assert watch.ran == ["text encoder", "unet", "autoencoder", "unet", "autoencoder"]
    assert not watch.there
    picture = Image.new("RGB", (32, 32), "red")
    assert torch.equal(offloading("cat", image=picture, **STEPS).images, pipe("cat", image=picture, **STEPS).images)
    assert watch.ran[5:] == ["text encoder", "autoencoder", "unet"]
    assert torch.equal(offloading.invert(picture, "cat"), pipe.invert(picture, "cat"))
    assert not watch.there


def test_nothing_stays_on_the_device_after_an_error(offloading: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Watch(offloading, monkeypatch)

    def stop(done: int, total: int, denoised: Tensor) -> None:
        assert watch.there == {"unet"}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        offloading("cat", callback=stop, **STEPS)
    assert not watch.there
    with torch.no_grad():
        offloading.autoencoder.decoder.conv_out.bias.fill_(torch.nan)  # type: ignore[union-attr]
    with pytest.raises(InputError, match="overflowed even in float32"):
        offloading("cat", num_inference_steps=2)
    assert not watch.there


def test_threads_wait_for_each_other(offloading: Pipeline, pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Watch(offloading, monkeypatch)
    with ThreadPoolExecutor(3) as pool:
        drawn = list(pool.map(lambda seed: offloading("cat", seed=seed, **STEPS).images, range(3)))
    for seed in range(3):
        assert torch.equal(drawn[seed], pipe("cat", seed=seed, **STEPS).images)
    assert not watch.there


def test_a_callback_may_draw_too(offloading: Pipeline) -> None:
    drawn = []

    def draw(done: int, total: int, denoised: Tensor) -> None:
        drawn.append(offloading("cat", **STEPS).images)

    assert torch.equal(offloading("cat", callback=draw, **STEPS).images, drawn[0])


def test_what_cannot_be_offloaded(built_model: Path, offloading: Pipeline) -> None:
    with pytest.raises(InputError, match="needs a device apart from the CPU, got cpu; leave it out"):
        Pipeline.from_pretrained(built_model, device="cpu", offload=True)
    with pytest.raises(InputError, match="keeps its networks in CPU memory, got 'cpu'; load without offload"):
        offloading.to("cpu")
    assert offloading.to(dtype="bfloat16").dtype == torch.bfloat16
    assert offloading.device == DEVICE


def test_the_command_line_says_when_there_is_nothing_to_offload_from(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "cat", "--device", "cpu", "--offload", "-o", "unwritten.png"]) == 2
    assert capsys.readouterr().err.startswith("latentdiff: offload needs a device apart from the CPU, got cpu")


def test_networks_are_loaded_into_cpu_memory(built_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("latentdiff.engine.execution.resolve_device", lambda device: torch.device("cuda"))
    loaded = Pipeline.from_pretrained(built_model, offload=True)
    assert loaded.device == torch.device("cuda")
    assert {parameter.device.type for parameter in loaded.unet.parameters()} == {"cpu"}


def test_weights_stay_shared_and_are_not_copied_back(built_model: Path, tmp_path: Path) -> None:
    with FakeDevice("cuda") as device:
        pipe = Pipeline.from_pretrained(built_model, offload=True)
        save_lora(lora_of(pipe.components), tmp_path / "a.safetensors", pipe.components)
        styled = pipe.with_loras({tmp_path / "a.safetensors": 0.1})
        decoder = [weight.data_ptr() for weight in pipe.autoencoder.parameters()]
        device.forget()
        for one in (pipe, styled):
            one("cat", num_inference_steps=1)
        assert device.copies and not any("offload" in line for line in device.syncs)
        for one in (pipe, styled):
            assert [weight.data_ptr() for weight in one.autoencoder.parameters()] == decoder
