"""Run networks as torch.compile translates them: kernels for the machine, made when a shape is first called."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable
from threading import RLock
from typing import Any

import torch
from torch import Tensor

from latentdiff.engine.engines import GraphEngine
from latentdiff.engine.graphs import graph_of
from latentdiff.errors import MissingDependencyError
from latentdiff.models.autoencoder import AutoencoderKL
from latentdiff.models.unet import UNet2DConditionModel

__all__ = ["Compiled"]

SHAPES = 64  # that a network is translated for; torch's own limit is lower, and beyond it nothing is translated


class Compiled(GraphEngine):
    """torch.compile, with a translation of its own for each shape.

    One for all shapes would be made when a second one comes, and a picture would depend on those that were drawn
    before it in the same process.

    Raises:
        MissingDependencyError: on a CPU, there is no C++ compiler.
    """

    name = "compile"

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        compiler = os.environ.get("CXX", "")
        if device.type == "cpu" and not any(shutil.which(name) for name in (compiler, "g++", "clang++", "cl") if name):
            raise MissingDependencyError(
                "engine 'compile' needs a C++ compiler on a CPU, got none; install g++, or leave the engine out"
            )
        # Weights that are part of the translation can be laid out for it.
        self._options: dict[str, Any] = {"freezing": True} if device.type == "cpu" else {}
        self._lock = RLock()

    def _runner(self, network: UNet2DConditionModel | AutoencoderKL) -> Callable[..., Tensor]:
        translated = torch.compile(graph_of(network), dynamic=False, options=self._options)
        shapes = set[tuple[Any, ...]]()

        @torch.no_grad()
        def run(*inputs: Tensor) -> Tensor:
            inputs = tuple(tensor.contiguous() for tensor in inputs)
            shape = tuple(tensor.shape for tensor in inputs)
            if shape in shapes:
                return translated(*inputs)
            with self._lock, torch._dynamo.config.patch(cache_size_limit=SHAPES):
                if shape not in shapes:
                    size = "x".join(map(str, inputs[0].shape))
                    warnings.warn(f"compiling a network for inputs of {size}; this takes a while", stacklevel=2)
                output = translated(*inputs)
                shapes.add(shape)
            return output

        return run
