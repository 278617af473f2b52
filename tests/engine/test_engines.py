"""Engines: which are refused and what is said, and that each one computes what the networks do."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from latentdiff import Pipeline
from latentdiff.cli import main
from latentdiff.engine import compiled, execution, openvino_engine
from latentdiff.engine.compiled import Compiled
from latentdiff.engine.engines import KEPT, Eager, Kept
from latentdiff.engine.execution import find_engine, settle
from latentdiff.engine.graphs import UNetGraph, exported, flat_texts
from latentdiff.engine.joined_calls import JoinedUNet
from latentdiff.errors import InputError, MissingDependencyError
from latentdiff.models.autoencoder import AutoencoderConfig, AutoencoderKL
from latentdiff.models.unet import Texts, UNet2DConditionModel, UNetConfig
from tests.models.tiny import AUTOENCODERS, UNETS, randomize, unet_inputs

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
DRAWN: dict[str, Any] = {"num_inference_steps": 2, "output_type": "pt"}


def unet(name: str = "sd1") -> UNet2DConditionModel:
    network = UNet2DConditionModel(UNetConfig.from_dict(UNETS[name]))
    randomize(network)
    return network.eval()


@pytest.mark.parametrize(
    ("name", "device", "dtype", "offload", "message"),
    [
        ("eagre", CPU, torch.float32, False, "'eagre' is unknown"),
        (3, CPU, torch.float32, False, "engine 3 is unknown"),
        ("compile", CUDA, torch.float32, True, "'compile' keeps networks where they run, got offload"),
        ("graphs", CPU, torch.float32, False, "'graphs' is for NVIDIA GPUs, got cpu"),
        ("openvino", CUDA, torch.float32, False, "runs on a CPU, got cuda"),
        ("openvino", CPU, torch.float16, False, "computes in float32 or bfloat16, got float16"),
    ],
)
def test_what_does_not_go_together_is_refused(
    name: Any, device: torch.device, dtype: torch.dtype, offload: bool, message: str
) -> None:
    if name == "openvino":
        pytest.importorskip("openvino")
    with pytest.raises(InputError, match=message):
        find_engine(name, device, dtype, offload=offload)


def test_bfloat16_needs_a_processor_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openvino")
    monkeypatch.setattr(openvino_engine, "computes_in", lambda dtype: False)
    with pytest.raises(InputError, match="no instructions for bfloat16"):
        find_engine("openvino", CPU, torch.bfloat16)


def test_an_engine_that_is_not_installed_says_how(
    built_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    options = ["--engine", "openvino", "--device", "cpu", "-o", str(tmp_path / "a.png")]
    assert main(["generate", "fox", "--model", str(built_model), *options]) == 2
    said = capsys.readouterr().err
    assert 'pip install "latentdiff[openvino]"' in said and said.count("\n") == 1
    monkeypatch.setattr(compiled.shutil, "which", lambda name: None)
    with pytest.raises(MissingDependencyError, match="needs a C\\+\\+ compiler"):
        settle("cpu", None, "compile")


def test_auto_is_openvino_where_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[torch.dtype] = []

    def stand_in(dtype: torch.dtype) -> Eager:
        made.append(dtype)
        return Eager()

    monkeypatch.setattr(execution, "installed", lambda: True)
    monkeypatch.setattr(execution, "computes_in", lambda dtype: dtype == torch.float32)
    monkeypatch.setattr(execution, "OpenVINO", stand_in)
    find_engine("auto", CPU, torch.float32)
    assert made == [torch.float32]
    for device, dtype, offload in ((CPU, torch.bfloat16, False), (CUDA, torch.float32, False), (CPU, torch.float32, 1)):
        assert find_engine("auto", device, dtype, offload=bool(offload)).name == "eager"
    monkeypatch.setattr(execution, "installed", lambda: False)
    assert find_engine("auto", CPU, torch.float32).name == "eager"
    assert made == [torch.float32]


@pytest.mark.parametrize("name", UNETS)
@torch.no_grad()
def test_the_graph_equals_the_prepared_network(name: str) -> None:
    network = unet(name)
    inputs = unet_inputs(network.config)
    sample, timesteps = inputs.pop("sample"), inputs.pop("timesteps")
    prepared = network.prepare(timesteps, **inputs)
    shifts = prepared.shifts[
        torch.arange(2) if len(prepared.shifts) > 1 else torch.zeros(2, dtype=int), torch.arange(2)
    ]
    drawn = UNetGraph(network)(sample, shifts, *flat_texts(prepared.texts))
    assert torch.equal(drawn, prepared(sample, torch.arange(2)))
    traced = exported(network)
    assert [one.shape[1:] for one in traced.inputs[1:2]] == [shifts.shape[1:]]
    assert len(traced.inputs) == len(traced.names) == len(traced.dynamic) == 2 + len(flat_texts(prepared.texts))
    assert traced.network(*traced.inputs).shape == (2, network.config.out_channels, 16, 24)


def test_half_precision_is_traced_in_float32() -> None:
    network = unet().bfloat16()
    traced = exported(network)
    assert {weight.dtype for weight in traced.network.parameters()} == {torch.float32}
    assert network.conv_in.weight.dtype == torch.bfloat16


@torch.no_grad()
def test_rows_and_joined_calls_are_run_by_the_engine() -> None:
    network, calls = unet(), list[int]()

    def predict(sample: Tensor, shifts: Tensor, texts: Texts, mask: Tensor | None = None) -> Tensor:
        calls.append(len(sample))
        return network.predict(sample, shifts, texts, mask)

    inputs = unet_inputs(network.config)
    sample, timesteps = inputs.pop("sample"), inputs.pop("timesteps")
    plain = network.prepare(timesteps, **inputs)
    prepared = plain.run_by(predict)
    steps = torch.tensor([1, 0])
    assert torch.equal(prepared(sample, steps), plain(sample, steps))
    prepared.rows(slice(1, 2))(sample[1:], steps[1:])
    JoinedUNet([prepared, prepared])([sample, sample], [steps, steps])
    assert calls == [2, 1, 4]


def test_of_many_networks_the_last_are_kept() -> None:
    kept, networks = Kept[object](), [torch.nn.Identity() for _ in range(KEPT + 1)]
    made = [kept.get(network, object) for network in networks]
    assert kept.get(networks[-1], object) is made[-1]
    assert kept.get(networks[0], object) is not made[0]


def test_compiled_networks_compute_the_same_and_say_when_a_shape_is_new(
    pipe: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []

    def translate(network: Any, **how: Any) -> Any:
        asked.append(how)
        return network

    monkeypatch.setattr(torch, "compile", translate)
    other = Pipeline(pipe.components, engine=Compiled(CPU))
    with pytest.warns(UserWarning, match="compiling a network for inputs of") as said:
        drawn = other("fox", **DRAWN)
    assert [str(one.message).split(" of ")[1].split(";")[0] for one in said] == ["2x4x8x8", "1x4x8x8"]
    assert torch.equal(drawn.images, pipe("fox", **DRAWN).images)
    assert torch.equal(other("fox", **DRAWN).images, drawn.images)  # and warns of nothing, which would be an error
    assert asked == [{"dynamic": False, "options": {"freezing": True}}] * 2
    assert drawn.settings["engine"] == "compile" and pipe("fox", **DRAWN).settings["engine"] == "eager"


@pytest.mark.long
def test_torch_compile_draws_the_same(pipe: Pipeline) -> None:
    with pytest.warns(UserWarning):
        drawn = Pipeline(pipe.components, engine=Compiled(CPU))("fox", **DRAWN).images
    torch.testing.assert_close(drawn, pipe("fox", **DRAWN).images, rtol=0, atol=1e-3)


def test_a_decoder_in_pixels_stays_as_it_is(pipe: Pipeline) -> None:
    network = AutoencoderKL(AutoencoderConfig.from_dict(AUTOENCODERS["no-attention"]))
    assert Eager().decode(network) == network.decode
    assert Pipeline(pipe.components).to(dtype="bfloat16").engine.name == "eager"


def test_replay_uses_the_recorded_engine(
    built_model: Path,
    tmp_path: Path,
    converted: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    place, again = str(tmp_path / "a.png"), str(tmp_path / "b.png")
    model = ["--model", str(built_model)]
    given = ["fox", *model, "--steps", "2", "--device", "cpu", "--engine", "openvino", "-o", place]
    assert main(["generate", *given]) == 0
    assert main(["replay", place, *model, "-o", again]) == 0
    said = capsys.readouterr().err
    assert said == ""  # nothing was converted, no pixel differs
    assert Path(place).read_bytes() == Path(again).read_bytes()
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert main(["replay", place, *model, "-o", again]) == 2
    assert "or draw the picture nearly as it was by --engine eager" in capsys.readouterr().err
    assert main(["replay", place, *model, "-o", again, "--engine", "eager"]) == 0
