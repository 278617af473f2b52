"""What runs the U-Net and the decoder: PyTorch as it is, PyTorch compiled, or OpenVINO.

The networks stay plain PyTorch; an engine is applied from outside, to what of them is called again and again. The
encoder of pictures and tiled decoding are always run by PyTorch as it is, and text encoders by all engines but one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable
from threading import RLock
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from latentdiff.engine.graphs import flat_texts
from latentdiff.errors import InputError
from latentdiff.models.autoencoder import AutoencoderKL
from latentdiff.models.encoding import PromptEncoder
from latentdiff.models.pixels import PixelSpace
from latentdiff.models.unet import Predict, Texts, UNet2DConditionModel

__all__ = ["Decode", "Eager", "Engine", "GraphEngine", "Kept", "Reusing"]

# unscaled latents (B, C, h, w) -> images (B, 3, H, W), about [-1, 1] but not clipped
Decode = Callable[[Tensor], Tensor]
T = TypeVar("T")
KEPT = 8  # networks that an engine has ready, such as those of a model with one LoRA and with another


class Engine(ABC):
    """Runs networks; threads may share one, and so do the pipelines that are made of one another.

    Attributes:
        name: key of `latentdiff.engine.execution.ENGINES`.
        recorded_as: the engine whose pictures it draws, to the bit, where that is another one.
    """

    name: str
    recorded_as: str | None = None

    def record(self) -> dict[str, Any]:
        """Return what a picture records of the engine, JSON-ready."""
        return {"engine": self.recorded_as or self.name}

    @abstractmethod
    def predict(self, unet: UNet2DConditionModel) -> Predict:
        """Return what computes `unet.predict`; the same object for the same network."""

    def require_levels(self) -> None:
        """Raise InputError where the engine runs whole U-Nets only, and not one level of them."""
        raise InputError(
            f"deep_every is for engine 'eager', which alone can run part of a U-Net, got {self.name!r}; use that, or "
            "leave deep_every out"
        )

    @abstractmethod
    def decode(self, autoencoder: AutoencoderKL | PixelSpace) -> Decode:
        """Return what computes `autoencoder.decode`."""

    def texts(self, unet: UNet2DConditionModel) -> Callable[[Tensor], Texts]:
        """Return what computes `unet.texts`."""
        return unet.texts

    def shifts(self, unet: UNet2DConditionModel) -> Callable[[Tensor, Tensor], Tensor]:
        """Return what computes `unet.shifts` without a mask."""
        return unet.shifts

    def encode(self, encoder: PromptEncoder) -> PromptEncoder:
        """Return what encodes prompts as `encoder` does."""
        return encoder


class Eager(Engine):
    """The networks as they are."""

    name = "eager"

    def predict(self, unet: UNet2DConditionModel) -> Predict:
        return unet.predict

    def require_levels(self) -> None:
        pass

    def decode(self, autoencoder: AutoencoderKL | PixelSpace) -> Decode:
        return autoencoder.decode


class Reusing:
    """A U-Net whose coarser levels are called at every n-th call; between, the finest takes what they last gave.

    One for each batch of images, as it keeps a map of theirs.

    Args:
        unet: called.
        every: n; 1 calls all levels always.

    Source: Ma et al. 2023, arXiv 2312.00858, section 3.3, the levels below the finest as the deep ones.
    """

    def __init__(self, unet: UNet2DConditionModel, every: int) -> None:
        self.unet, self.every = unet, every
        self._calls, self._deep = 0, torch.empty(0)

    def __call__(self, sample: Tensor, shifts: Tensor, texts: Texts, mask: Tensor | None = None) -> Tensor:
        """Return the prediction (B, C_out, H, W)."""
        whole = self._calls % self.every == 0
        self._calls += 1
        if not whole:
            return self.unet.predict_finest(sample, shifts, texts, self._deep, mask)
        prediction, self._deep = self.unet.predict_keeping(sample, shifts, texts, mask)
        return prediction


class Kept(Generic[T]):
    """What was made of networks, of the last `KEPT` of them; threads may share one."""

    def __init__(self) -> None:
        self._made: OrderedDict[int, tuple[nn.Module, T]] = OrderedDict()  # holding the network keeps its id its own
        self._lock = RLock()

    def get(self, network: nn.Module, make: Callable[[], T]) -> T:
        """Return what was made of a network, or make it."""
        with self._lock:
            found = self._made.get(id(network))
            if found is None:
                found = self._made[id(network)] = network, make()
                if len(self._made) > KEPT:
                    self._made.popitem(last=False)
            self._made.move_to_end(id(network))
            return found[1]


class GraphEngine(Engine):
    """Runs what it makes of a network's graph, once for each network."""

    def __init__(self) -> None:
        self._kept = Kept[Any]()

    @abstractmethod
    def _runner(self, network: UNet2DConditionModel | AutoencoderKL) -> Callable[..., Tensor]:
        """Return what takes the inputs of `UNetGraph` or `DecoderGraph` and computes the same."""

    def predict(self, unet: UNet2DConditionModel) -> Predict:
        def make() -> Predict:
            run = self._runner(unet)

            def predict(sample: Tensor, shifts: Tensor, texts: Texts, mask: Tensor | None = None) -> Tensor:
                if mask is not None:  # which no pipeline passes
                    return unet.predict(sample, shifts, texts, mask)
                return run(sample, shifts, *flat_texts(texts))

            return predict

        return self._kept.get(unet, make)

    def decode(self, autoencoder: AutoencoderKL | PixelSpace) -> Decode:
        if isinstance(autoencoder, PixelSpace):
            return autoencoder.decode
        return self._kept.get(autoencoder, lambda: self._runner(autoencoder))
