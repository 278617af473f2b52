"""Run networks on a CPU by OpenVINO: converted once, kept on disk, and laid out for each shape that is called."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from latentdiff.engine import conversions
from latentdiff.engine.engines import GraphEngine, Kept
from latentdiff.engine.graphs import Traced, exported, exported_shifts, exported_texts, nested_texts
from latentdiff.engine.layouts import LaidOut, core, installed, load_openvino
from latentdiff.errors import InputError, MissingDependencyError, StorageError
from latentdiff.models.autoencoder import AutoencoderKL
from latentdiff.models.bert import BertModel
from latentdiff.models.encoding import PromptEncoder, TokenStates
from latentdiff.models.text import TextStates
from latentdiff.models.unet import Texts, UNet2DConditionModel

__all__ = ["OpenVINO", "computes_in", "convert", "converted", "core", "installed", "load_openvino", "write"]

GRAPH, TEXTS, SHIFTS = "graph", "texts", "shifts"  # names of files, .xml, and .bin with the weights
PRECISIONS = {torch.float32: "f32", torch.bfloat16: "bf16"}
Convertible = UNet2DConditionModel | AutoencoderKL | BertModel
NAMES = {UNet2DConditionModel: "the U-Net", AutoencoderKL: "the decoder", BertModel: "the text encoder"}


def computes_in(dtype: torch.dtype) -> bool:
    """Say whether OpenVINO, which must be installed, computes in a dtype on this processor."""
    if dtype != torch.bfloat16:
        return dtype in PRECISIONS
    return "BF16" in core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


class OpenVINO(GraphEngine):
    """OpenVINO on the CPU.

    Args:
        dtype: float32, or bfloat16 where the processor computes in that.

    Raises:
        InputError: a dtype that the processor does not compute in.
        MissingDependencyError: it is not installed, or torch is too old to export a network for any size.
    """

    name = "openvino"

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.openvino = load_openvino()
        if not hasattr(torch.export.Dim, "AUTO"):
            raise MissingDependencyError(
                f"engine 'openvino' needs torch 2.6, got {torch.__version__}; install a newer one"
            )
        self._graphs = Kept[dict[str, LaidOut]]()
        self.version = str(self.openvino.__version__).partition("-")[0]
        if dtype not in PRECISIONS:
            kind = str(dtype).removeprefix("torch.")
            raise InputError(f"engine 'openvino' computes in float32 or bfloat16, got {kind}; choose one of these")
        if not computes_in(dtype):
            raise InputError("this processor has no instructions for bfloat16; use float32 with engine 'openvino'")
        self.precision = PRECISIONS[dtype]

    def record(self) -> dict[str, Any]:
        return {"engine": self.name, "openvino": self.version}

    def texts(self, unet: UNet2DConditionModel) -> Callable[[Tensor], Texts]:
        run, layout = _caller(self.graphs(unet)[TEXTS]), unet.attentions_to_text()
        return lambda context: nested_texts(run(context), layout)

    def shifts(self, unet: UNet2DConditionModel) -> Callable[[Tensor, Tensor], Tensor]:
        if SHIFTS not in self.graphs(unet):
            return unet.shifts
        run = _caller(self.graphs(unet)[SHIFTS])
        return lambda time, context: run(time.expand(len(context), -1, -1), context)[0]

    def encode(self, encoder: PromptEncoder) -> PromptEncoder:
        if not isinstance(encoder, TokenStates) or not isinstance(encoder.encoder, BertModel):
            return encoder
        run, words = _caller(self.graphs(encoder.encoder)[GRAPH]), encoder.encoder.embeddings.word_embeddings

        def states(input_ids: Tensor, attention_mask: Tensor | None = None) -> TextStates:
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            (last,) = run(words(input_ids), mask)
            return TextStates(last, None, (last,))

        return TokenStates(encoder.encoder, encoder.tokenizer, states)

    def graphs(self, network: Convertible) -> dict[str, LaidOut]:
        """Return the graphs of a network, converted now unless they are there.

        They are "graph", of a U-Net "texts" too, and "shifts" where the text is in its time embedding.
        """
        return self._graphs.get(network, lambda: self._converted(network))

    def _runner(self, network: UNet2DConditionModel | AutoencoderKL) -> Callable[..., Tensor]:
        run = _caller(self.graphs(network)[GRAPH])
        return lambda *inputs: run(*inputs)[0]

    def _converted(self, network: Convertible) -> dict[str, LaidOut]:
        """Return the graphs of a network, from disk where they are there."""
        key = conversions.network_key(network, "openvino, graphs of one batch", str(self.openvino.__version__))
        place = conversions.cache_folder() / "openvino" / key
        making: dict[str, Callable[[Any], Traced]] = {GRAPH: exported}
        if isinstance(network, UNet2DConditionModel):
            making[TEXTS] = exported_texts
            if network.config.addition_embed_type == "text":
                making[SHIFTS] = exported_shifts
        names = tuple(making)
        files = {name: place / f"{name}.xml" for name in names}
        try:
            if conversions.load(place) is not None:
                read = core().read_model
                return {name: LaidOut(partial(read, file), self.precision, file) for name, file in files.items()}
        except conversions.Damaged as error:
            warnings.warn(f"the conversion in {place} is damaged ({error}); it is made anew", stacklevel=2)
        warnings.warn(f"converting {NAMES[type(network)]} for OpenVINO, once; this takes a while", stacklevel=2)
        made = {name: convert(make(network)) for name, make in making.items()}
        kept: dict[str, Path | None] = {**files}
        try:
            conversions.store(place, partial(_write_all, made))
        except StorageError as error:
            warnings.warn(f"{error}; it is converted anew each time until then", stacklevel=2)
            kept = dict.fromkeys(names)
        return {name: LaidOut(partial(_itself, made[name]), self.precision, kept[name]) for name in names}


def _itself(graph: Any) -> Any:
    return graph


def _write_all(graphs: dict[str, Any], folder: Path) -> None:
    for name, graph in graphs.items():
        write(graph, folder / f"{name}.xml")


def _caller(graph: LaidOut) -> Callable[..., list[Tensor]]:
    """Return what runs a graph on tensors of any precision."""

    def run(*inputs: Tensor) -> list[Tensor]:
        held = (tensor.detach() for tensor in inputs)
        arrays = [(one.float() if one.is_floating_point() else one).contiguous().numpy() for one in held]
        return [torch.from_numpy(output) for output in graph(arrays, torch.get_num_threads())]

    return run


def convert(traced: Traced) -> Any:
    """Return a network as a graph of OpenVINO, for any batch, size and length of text."""
    axes = traced.axes(lambda name: torch.export.Dim.AUTO)
    return converted(traced.network, traced.inputs, traced.names, axes)


def converted(network: nn.Module, inputs: tuple[Tensor, ...], names: Sequence[str], axes: tuple[Any, ...]) -> Any:
    """Return a network as a graph of OpenVINO.

    Args:
        network: in evaluation mode.
        inputs: examples.
        names: of them.
        axes: see `torch.export.export`, which takes them as `dynamic_shapes`.
    """
    openvino = load_openvino()
    with warnings.catch_warnings(), torch.no_grad():  # in-place activations are not recorded with gradients
        warnings.simplefilter("ignore")  # of torch about itself
        program = torch.export.export(network, inputs, dynamic_shapes=axes, strict=False)
        graph = openvino.convert_model(program)
    for port, name in zip(graph.inputs, names):
        port.get_tensor().set_names({name})
    return graph


def write(graph: Any, path: Path) -> None:
    """Write a graph of OpenVINO, its weights as they are."""
    load_openvino().save_model(graph, str(path), compress_to_fp16=False)
