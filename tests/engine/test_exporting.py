"""Exported graphs: another runtime computes what the networks do, for any size and batch."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from latentdiff import Pipeline
from latentdiff.cli import main
from latentdiff.engine.exporting import FORMATS, Graph, decoder_graph, text_graph, unet_graph, write_graph
from latentdiff.engine.openvino_engine import core
from latentdiff.models.clip import CLIPTextConfig, CLIPTextModel
from latentdiff.models.unet import UNet2DConditionModel, UNetConfig
from tests.models.tiny import CLIP, UNETS, randomize, relative_error, unet_inputs


@pytest.mark.parametrize("name", UNETS)
@torch.no_grad()
def test_a_graph_takes_what_the_network_takes(name: str) -> None:
    network = UNet2DConditionModel(UNetConfig.from_dict(UNETS[name])).eval()
    randomize(network)
    graph = unet_graph(network)
    inputs = unet_inputs(network.config)
    named = {"sample": inputs.pop("sample"), "timestep": inputs.pop("timesteps")}
    named |= {"encoder_hidden_states": inputs.pop("context"), **inputs.pop("added", {}), **inputs}
    assert named.keys() == graph.inputs.keys() == graph.dynamic.keys()
    for key, value in graph.inputs.items():
        assert [length for axis, length in enumerate(value.shape) if axis not in graph.dynamic[key]] == [
            length for axis, length in enumerate(named[key].shape) if axis not in graph.dynamic[key]
        ]
    expected = network(**unet_inputs(network.config))
    assert torch.equal(graph.network(*(named[key] for key in graph.inputs)), expected)


@torch.no_grad()
def test_text_of_both_kinds_of_clip() -> None:
    encoder = CLIPTextModel(CLIPTextConfig.from_dict({**CLIP, "architectures": ["CLIPTextModelWithProjection"]}))
    last, both = (text_graph(encoder.eval(), 12, 59, penultimate=penultimate) for penultimate in (False, True))
    assert last.outputs == ("last_hidden_state",)
    ids = last.inputs["input_ids"]
    encoded = encoder(ids, end_token_id=59)
    assert torch.equal(last.network(ids)[0], encoded.last_hidden_state)
    assert torch.equal(both.network(ids)[0], encoded.hidden_states[-2])


@pytest.fixture(scope="module")
def graphs(pipe: Pipeline) -> dict[str, Graph]:
    return {"vae_decoder": decoder_graph(pipe.autoencoder), "unet": unet_graph(pipe.unet)}


@torch.no_grad()
def test_onnxruntime_runs_the_decoder(graphs: dict[str, Graph], tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    graph = graphs["vae_decoder"]
    assert write_graph(graph, tmp_path / "vae", "onnx") < 1e-4
    session = onnxruntime.InferenceSession(str(tmp_path / "vae/model.onnx"), providers=["CPUExecutionProvider"])
    for shape in ((1, 4, 8, 8), (3, 4, 5, 9)):
        latents = torch.randn(shape)
        (drawn,) = session.run(None, {"latent_sample": latents.numpy()})
        assert relative_error(torch.from_numpy(drawn), graph.network(latents)) < 1e-4


@pytest.mark.long
@pytest.mark.parametrize("kind", FORMATS)
@torch.no_grad()
def test_a_model_is_exported_by_the_command(
    kind: str, built_model: Path, pipe: Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["export", str(built_model), str(out), "--format", kind, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert set(told["graphs"]) == {"text_encoder", "vae_decoder", "unet"}
    assert told["model_hash"] == pipe.components.model_hash
    assert all(graph["difference"] < 1e-4 for graph in told["graphs"].values())
    assert json.loads((out / "graphs.json").read_text()) == told
    inputs = {"sample": torch.randn(3, 4, 6, 10), "timestep": torch.tensor([1.0, 50.0, 999.0])}
    inputs["encoder_hidden_states"] = torch.randn(3, 16, 16)
    expected = pipe.unet(inputs["sample"], inputs["timestep"], inputs["encoder_hidden_states"])
    if kind == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(str(out / "unet/model.onnx"), providers=["CPUExecutionProvider"])
        (drawn,) = session.run(["out_sample"], {name: value.numpy() for name, value in inputs.items()})
    else:
        exact = {"INFERENCE_PRECISION_HINT": "f32"}  # where a processor has bfloat16, that is the default
        ready = core().compile_model(out / "unet/openvino_model.xml", "CPU", exact)
        drawn = ready({name: value.numpy() for name, value in inputs.items()})["out_sample"]
    assert relative_error(torch.from_numpy(np.array(drawn)), expected) < 1e-4


def test_what_cannot_be_exported_is_refused(
    built_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(built_model)
    assert main(["export", model, str(tmp_path / "a"), "--format", "onyx"]) == 2
    assert "'onyx' is unknown; did you mean 'onnx'" in capsys.readouterr().err
    (tmp_path / "mine").write_text("")
    assert main(["export", model, str(tmp_path)]) == 2
    assert "choose another folder" in capsys.readouterr().err
    assert main(["export", model, str(tmp_path / "mine")]) in (2, 4)
    assert (tmp_path / "mine").read_text() == ""
    (tmp_path / "graphs.json").write_text('{"format": "onnx"}')
    assert main(["export", model, str(tmp_path)]) == 2
    assert "new or an export to openvino, got one to 'onnx'" in capsys.readouterr().err
