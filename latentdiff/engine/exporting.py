"""Write the networks of a model as graphs that other runtimes run: OpenVINO's, or ONNX.

A graph takes what the network takes (timesteps, text states), not what an engine of ours makes of that beforehand, for
any batch and size. Each is run after it is written, and compared with the network.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from latentdiff.engine import openvino_engine
from latentdiff.engine.graphs import HEIGHT, MAP, ROWS, WIDTH, DecoderGraph, in_float32
from latentdiff.errors import MissingDependencyError
from latentdiff.models.autoencoder import AutoencoderKL
from latentdiff.models.encoding import TokenEncoder
from latentdiff.models.unet import UNet2DConditionModel

__all__ = ["FORMATS", "Graph", "decoder_graph", "text_graph", "unet_graph", "write_graph"]

TOKENS = 7  # unlike all other lengths, as axes of one length would be taken for one and the same
INSTALL = 'pip install "latentdiff[onnx]"'


@dataclass(frozen=True)
class Graph:
    """A network to be written, with named inputs and outputs.

    Attributes:
        network: in float32; takes the inputs in this order.
        inputs: examples, by name.
        dynamic: for each input the axes that may have other lengths, by what they are called.
        outputs: names.
    """

    network: nn.Module
    inputs: dict[str, Tensor]
    dynamic: dict[str, dict[int, str]]
    outputs: tuple[str, ...] = field(default=("sample",))

    def describe(self) -> dict[str, Any]:
        """Return names, types and axes of the inputs, JSON-ready."""
        inputs = {
            name: {
                "dtype": str(tensor.dtype).removeprefix("torch."),
                "shape": [self.dynamic[name].get(axis, length) for axis, length in enumerate(tensor.shape)],
            }
            for name, tensor in self.inputs.items()
        }
        return {"inputs": inputs, "outputs": list(self.outputs)}


def unet_graph(unet: UNet2DConditionModel) -> Graph:
    """Return a U-Net as a graph of sample, timestep and text states, and of what else its config asks for."""
    config, rows = unet.config, {0: "batch"}
    width = config.cross_attention_dim if isinstance(config.cross_attention_dim, int) else config.cross_attention_dim[0]
    inputs = {
        "sample": torch.randn(ROWS, config.in_channels, HEIGHT, WIDTH),
        "timestep": torch.tensor([801.0, 7.0]),
        "encoder_hidden_states": torch.randn(ROWS, TOKENS, width),
    }
    dynamic = {"sample": MAP, "timestep": rows, "encoder_hidden_states": {0: "batch", 1: "tokens"}}
    if config.class_embed_type == "projection":
        inputs["class_labels"] = torch.randn(ROWS, config.projection_class_embeddings_input_dim or 0)
    elif config.class_embed_type is not None or config.num_class_embeds is not None:
        inputs["class_labels"] = torch.tensor([0, 1])
    if config.expects_sizes:
        sizes = config.addition_time_embed_dim or 0
        pooled = (config.projection_class_embeddings_input_dim or 0) - 6 * sizes
        inputs |= {"text_embeds": torch.randn(ROWS, pooled), "time_ids": torch.rand(ROWS, 6) * 1024}
    if config.time_cond_proj_dim is not None:
        inputs["timestep_cond"] = torch.randn(ROWS, config.time_cond_proj_dim)
    dynamic |= {name: rows for name in inputs if name not in dynamic}
    return Graph(_WholeUNet(in_float32(unet), tuple(inputs)[3:]).eval(), inputs, dynamic, ("out_sample",))


def decoder_graph(autoencoder: AutoencoderKL) -> Graph:
    """Return an autoencoder's decoder as a graph of unscaled latents."""
    latents = torch.randn(ROWS, autoencoder.config.latent_channels, HEIGHT, WIDTH)
    return Graph(DecoderGraph(in_float32(autoencoder)).eval(), {"latent_sample": latents}, {"latent_sample": MAP})


def text_graph(encoder: TokenEncoder, window: int, end_token_id: int | None, *, penultimate: bool) -> Graph:
    """Return a text encoder as a graph of token numbers, and of the mask of padding where its config asks for that.

    Args:
        encoder: CLIP, BERT or T5.
        window: tokens in a row.
        end_token_id: of a CLIP tokenizer.
        penultimate: take the states after the last layer but one, and the pooled vector besides.
    """
    ids = torch.randint(0, encoder.config.vocab_size, (ROWS, window))
    inputs = {"input_ids": ids}
    if encoder.config.use_attention_mask:
        inputs["attention_mask"] = (torch.arange(window)[None] < torch.tensor([[window], [2]])).long()
    network = _Text(in_float32(encoder), end_token_id, penultimate).eval()
    with torch.no_grad():
        outputs = ("last_hidden_state", "pooled")[: len(network(*inputs.values()))]
    return Graph(network, inputs, {name: {0: "batch"} for name in inputs}, outputs)


def write_graph(graph: Graph, folder: Path, kind: str) -> float:
    """Write a graph into a new folder and run it.

    Args:
        graph: to be written.
        folder: is made.
        kind: one of `FORMATS`.

    Returns:
        The largest difference of an output from what the network computes, relative to its largest value.

    Raises:
        MissingDependencyError: a package is missing.
    """
    folder.mkdir(parents=True)
    outputs = FORMATS[kind](graph, folder)
    with torch.no_grad():
        expected = graph.network(*graph.inputs.values())
    pairs = zip(outputs, expected if isinstance(expected, tuple) else (expected,))
    return max(float(np.abs(ours - theirs.numpy()).max() / theirs.abs().max().item()) for ours, theirs in pairs)


def _to_openvino(graph: Graph, folder: Path) -> Sequence[np.ndarray]:
    axes = tuple(dict.fromkeys(graph.dynamic[name], torch.export.Dim.AUTO) for name in graph.inputs)
    converted = openvino_engine.converted(graph.network, tuple(graph.inputs.values()), tuple(graph.inputs), axes)
    for port, name in zip(converted.outputs, graph.outputs):
        port.get_tensor().set_names({name})
    path = folder / "openvino_model.xml"
    openvino_engine.write(converted, path)
    core = openvino_engine.core()
    ready = core.compile_model(core.read_model(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    results = ready([tensor.numpy() for tensor in graph.inputs.values()])
    return [results[number] for number in range(len(graph.outputs))]


def _to_onnx(graph: Graph, folder: Path) -> Sequence[np.ndarray]:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  # which torch writes ONNX with
    except ImportError as error:
        raise MissingDependencyError(
            f"ONNX needs the package {error.name}, got none; install it with `{INSTALL}`"
        ) from error
    path, dimensions = folder / "model.onnx", dict[str, Any]()
    axes = tuple(
        {axis: dimensions.setdefault(called, torch.export.Dim(called)) for axis, called in graph.dynamic[name].items()}
        for name in graph.inputs
    )
    with _quiet_torch(), torch.no_grad():
        torch.onnx.export(
            graph.network,
            tuple(graph.inputs.values()),
            str(path),
            input_names=list(graph.inputs),
            output_names=list(graph.outputs),
            dynamic_shapes=axes,
            dynamo=True,
            verbose=False,
        )
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {name: tensor.numpy() for name, tensor in graph.inputs.items()})


@contextmanager
def _quiet_torch() -> Iterator[None]:
    """Leave out in a `with` block what torch's exporter says about itself."""
    log = logging.getLogger("torch.onnx")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(before)


FORMATS: dict[str, Callable[[Graph, Path], Sequence[np.ndarray]]] = {"openvino": _to_openvino, "onnx": _to_onnx}


class _WholeUNet(nn.Module):
    def __init__(self, unet: UNet2DConditionModel, more: tuple[str, ...]) -> None:
        super().__init__()
        self.unet, self.more = unet, more

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, *more: Tensor) -> Tensor:
        added = dict(zip(self.more, more))
        labels = added.pop("class_labels", None)
        return self.unet(sample, timestep, encoder_hidden_states, class_labels=labels, added=added)


class _Text(nn.Module):
    def __init__(self, encoder: TokenEncoder, end_token_id: int | None, penultimate: bool) -> None:
        super().__init__()
        self.encoder, self.penultimate = encoder, penultimate
        self.options = {} if end_token_id is None else {"end_token_id": end_token_id}

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, ...]:
        encoded = self.encoder(input_ids, attention_mask, **self.options)
        states = encoded.hidden_states[-2] if self.penultimate else encoded.last_hidden_state
        return (states, encoded.pooled) if self.penultimate and encoded.pooled is not None else (states,)
