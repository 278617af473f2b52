"""Run networks on a CPU by OpenVINO: converted once, kept on disk, and laid out for each shape that is called."""

from __future__ import annotations

import sys
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from threading import RLock
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from latentdiff.engine import conversions
from latentdiff.engine.engines import GraphEngine
from latentdiff.engine.graphs import Traced, exported
from latentdiff.errors import InputError, MissingDependencyError, StorageError
from latentdiff.models.autoencoder import AutoencoderKL
from latentdiff.models.unet import UNet2DConditionModel

__all__ = ["OpenVINO", "computes_in", "convert", "converted", "core", "installed", "load_openvino", "write"]

INSTALL = 'pip install "latentdiff[openvino]"'
SHAPES = 8  # that a network is laid out for at a time, each with its weights
GRAPH = "graph.xml"  # beside graph.bin, its weights
PRECISIONS = {torch.float32: "f32", torch.bfloat16: "bf16"}


def installed() -> bool:
    """Say whether OpenVINO is there, without loading it."""
    return find_spec("openvino") is not None


def load_openvino() -> Any:
    """Return the module openvino, kept from reporting to its makers that it was imported, which it does unasked.

    Raises:
        MissingDependencyError: it is not installed, or torch is too old to export a network for any size.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # as if it were not installed
    try:
        import openvino
    except ImportError as error:
        raise MissingDependencyError(
            f"engine 'openvino' needs the package openvino, got none; install it with `{INSTALL}`"
        ) from error
    if not hasattr(torch.export.Dim, "AUTO"):
        raise MissingDependencyError(f"engine 'openvino' needs torch 2.6, got {torch.__version__}; install a newer one")
    return openvino


@cache
def core() -> Any:
    """Return what loads and compiles graphs, one for the process and as long as it lives.

    Each `openvino.Core` gives the thread that uses it first a stack of its own for signals. Of two, the one that goes
    first takes its stack along and the other leaves the thread with that, so that the next signal ends the process.

    Raises:
        MissingDependencyError: see `load_openvino`.
    """
    return load_openvino().Core()


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
        MissingDependencyError: see `load_openvino`.
    """

    name = "openvino"

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.openvino = load_openvino()
        self.version = str(self.openvino.__version__).partition("-")[0]
        if dtype not in PRECISIONS:
            kind = str(dtype).removeprefix("torch.")
            raise InputError(f"engine 'openvino' computes in float32 or bfloat16, got {kind}; choose one of these")
        if not computes_in(dtype):
            raise InputError("this processor has no instructions for bfloat16; use float32 with engine 'openvino'")
        self.precision = PRECISIONS[dtype]

    def record(self) -> dict[str, Any]:
        return {"engine": self.name, "openvino": self.version}

    def _runner(self, network: UNet2DConditionModel | AutoencoderKL) -> _Runner:
        return _Runner(self._converted(network), self.precision)

    def _converted(self, network: UNet2DConditionModel | AutoencoderKL) -> Any:
        """Return the graph of a network, from disk where it is there."""
        key = conversions.network_key(network, "openvino", str(self.openvino.__version__))
        place = conversions.cache_folder() / "openvino" / key
        try:
            if (found := conversions.load(place)) is not None:
                return core().read_model(found / GRAPH)
        except (conversions.Damaged, RuntimeError) as error:
            warnings.warn(f"the conversion in {place} is damaged ({error}); it is made anew", stacklevel=2)
        what = "the decoder" if isinstance(network, AutoencoderKL) else "the U-Net"
        warnings.warn(f"converting {what} for OpenVINO, once; this takes a while", stacklevel=2)
        graph = convert(exported(network))
        try:
            conversions.store(place, lambda folder: write(graph, folder / GRAPH))
        except StorageError as error:
            warnings.warn(f"{error}; it is converted anew each time until then", stacklevel=2)
        return graph


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


class _Runner:
    """A converted network, called as the network is."""

    def __init__(self, graph: Any, precision: str) -> None:
        self._graph, self._precision = graph, precision
        self._requests = OrderedDict[Any, Any]()  # by shapes and threads
        self._lock = RLock()

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Return the output, float32, for inputs (B, ...) in any precision.

        A batch is split into such of 1, 2, 4, ... rows, as each size that is called is laid out for first.
        """
        arrays = [tensor.detach().float().contiguous().numpy() for tensor in inputs]
        outputs, done, rows = [], 0, len(arrays[0])
        while done < rows:
            count = 1 << ((rows - done).bit_length() - 1)
            outputs.append(self._run([array[done : done + count] for array in arrays]))
            done += count
        return torch.from_numpy(outputs[0] if len(outputs) == 1 else np.concatenate(outputs))

    def _run(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        with self._lock:
            request = self._request(tuple(array.shape for array in arrays))
            return request.infer(list(arrays), share_inputs=True, share_outputs=True)[0].copy()

    def _request(self, shapes: tuple[tuple[int, ...], ...]) -> Any:
        """Return what runs the graph for inputs of these shapes: laid out for them alone it is faster by a third."""
        threads = torch.get_num_threads()
        key = shapes, threads
        if key not in self._requests:
            graph = self._graph.clone()
            graph.reshape({port: list(shape) for port, shape in zip(graph.inputs, shapes)})
            options = {
                "INFERENCE_PRECISION_HINT": self._precision,
                "PERFORMANCE_HINT": "LATENCY",
                "NUM_STREAMS": 1,
                "INFERENCE_NUM_THREADS": threads,
                "ENABLE_CPU_PINNING": False,  # other processes may be busy on the cores it would choose
            }
            self._requests[key] = core().compile_model(graph, "CPU", options).create_infer_request()
            if len(self._requests) > SHAPES:
                self._requests.popitem(last=False)
        self._requests.move_to_end(key)
        return self._requests[key]
