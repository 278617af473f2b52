"""The networks of a model by the class that its configuration names, built without memory."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from latentdiff.devices import machine_memory
from latentdiff.errors import ModelConfigError, ModelMismatchError
from latentdiff.models.autoencoder import AutoencoderConfig, AutoencoderKL
from latentdiff.models.autoencoder_tiny import AutoencoderTiny, AutoencoderTinyConfig
from latentdiff.models.bert import BertConfig, BertModel
from latentdiff.models.clip import CLIPTextConfig, CLIPTextModel
from latentdiff.models.config import ModelConfig
from latentdiff.models.image_text import ImageTextConfig, ImageTextModel
from latentdiff.models.pixels import LabelConfig, LabelEncoder, PixelSpace, PixelSpaceConfig
from latentdiff.models.t5 import T5Config, T5EncoderModel
from latentdiff.models.unet import UNet2DConditionModel, UNetConfig

__all__ = ["KINDS", "TEXT_MODEL", "Kind", "build"]

# How many layers a configuration asks for is the product of these keys; each layer has at least one tensor.
COUNT_KEYS = ("layers_per_block", "transformer_layers_per_block", "num_hidden_layers", "num_layers")
# Those with one value for each resolution.
LEVEL_KEYS = (
    *("block_out_channels", "down_block_types", "up_block_types", "layers_per_block", "attention_head_dim"),
    *("transformer_layers_per_block", "only_cross_attention", "cross_attention_dim"),
)
MAX_LEVELS = 16
MAX_NUMBER = 2**24  # of any whole number in a configuration
TEXT_MODEL = "text_model."  # before the names of CLIP's weights, except where newer versions of transformers wrote them


class Kind(NamedTuple):
    """A class that a model folder may name: its configuration, its network, and the stem of its weight files."""

    config: type[ModelConfig]
    network: type[nn.Module]
    stem: str


KINDS: dict[str, Kind] = {
    "UNet2DConditionModel": Kind(UNetConfig, UNet2DConditionModel, "diffusion_pytorch_model"),
    "AutoencoderKL": Kind(AutoencoderConfig, AutoencoderKL, "diffusion_pytorch_model"),
    "AutoencoderTiny": Kind(AutoencoderTinyConfig, AutoencoderTiny, "diffusion_pytorch_model"),
    "BertModel": Kind(BertConfig, BertModel, "model"),
    "CLIPTextModel": Kind(CLIPTextConfig, CLIPTextModel, "model"),
    "CLIPTextModelWithProjection": Kind(CLIPTextConfig, CLIPTextModel, "model"),
    "PixelSpace": Kind(PixelSpaceConfig, PixelSpace, "diffusion_pytorch_model"),
    "LabelEncoder": Kind(LabelConfig, LabelEncoder, "model"),
    "T5EncoderModel": Kind(T5Config, T5EncoderModel, "model"),
    "ImageTextModel": Kind(ImageTextConfig, ImageTextModel, "model"),
}


def build(path: Path, kind: Kind, data: dict[str, Any], tensor_count: int, dtype: torch.dtype) -> nn.Module:
    """Build a network without memory, if its configuration asks for nothing absurd."""
    _check_counts(path, data, tensor_count)
    try:
        with torch.device("meta"), _WithoutInitialisation():
            network = kind.network(kind.config.from_dict(data))
    except ModelConfigError as error:
        raise ModelConfigError(f"{path}: {error}") from error
    except (RuntimeError, OverflowError, ValueError, TypeError) as error:
        raise ModelConfigError(f"{path}: cannot be built ({str(error).splitlines()[0][:120]})") from error
    needed = sum(tensor.numel() for tensor in network.state_dict().values()) * dtype.itemsize
    memory = machine_memory()
    if needed > memory:
        gigabytes = f"{needed / 2**30:.1f} GiB of memory, and this machine has {memory / 2**30:.1f}"
        raise ModelConfigError(f"{path}: implies {gigabytes}; use a smaller model or half precision")
    return network


def _check_counts(path: Path, data: dict[str, Any], tensor_count: int) -> None:
    """Raise where a configuration asks for more layers than there are weights, before any is built.

    Raises:
        ModelConfigError, ModelMismatchError: it does.
    """
    numbers = {key: _numbers(value) for key, value in data.items()}
    if not all(abs(number) <= MAX_NUMBER for found in numbers.values() for number in found):
        raise ModelConfigError(f"{path}: expected no number above {MAX_NUMBER} and none that is not finite")
    levels = max((len(data[key]) for key in LEVEL_KEYS if isinstance(data.get(key), list)), default=1)
    if levels > MAX_LEVELS:
        raise ModelConfigError(f"{path}: has {levels} resolutions, expected at most {MAX_LEVELS}; use another model")
    layers = 1.0
    for key in COUNT_KEYS:
        layers *= max(numbers.get(key) or [1])
    per_level = data.get("layers_per_block", 1)
    counted = levels * per_level if isinstance(per_level, int) else sum(numbers["layers_per_block"])
    for count in (layers, counted):
        if count > tensor_count:
            raise ModelMismatchError(
                f"{path}: implies {count:.0f} layers or more, but the weights are {tensor_count} tensors"
            )


class _WithoutInitialisation(TorchFunctionMode):
    """Leave out the initial values of weights, which are replaced anyway and on "meta" cost a second of imports."""

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Collection[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        if getattr(func, "__module__", None) == nn.init.__name__:
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


def _numbers(value: object) -> list[float]:
    if isinstance(value, list):
        return [number for item in value for number in _numbers(item)]
    return [value] if isinstance(value, (int, float)) and not isinstance(value, bool) else []
