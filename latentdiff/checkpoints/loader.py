"""Load models from folders in diffusers' layout. Neither diffusers nor transformers is imported.

A network is built without memory (on the "meta" device), its configuration and the headers of its files are compared,
and only then are the tensors read, cast, checked to be finite and put in.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from latentdiff.checkpoints.components import Components, ModelSource, TextEncoder, check_fit
from latentdiff.checkpoints.find import find_model
from latentdiff.checkpoints.folder import (
    INDEX,
    NETWORKS,
    Layout,
    child,
    home,
    read_json,
    read_layout,
    tokenizer_files,
    weight_files,
)
from latentdiff.checkpoints.header import TensorInfo, read_header
from latentdiff.checkpoints.weights import FLOATS, read_weights
from latentdiff.diffusion.schedule import NoiseSchedule
from latentdiff.engine.place import machine_memory
from latentdiff.errors import ModelConfigError, ModelMismatchError
from latentdiff.models.autoencoder import AutoencoderConfig, AutoencoderKL
from latentdiff.models.bert import BertConfig, BertModel
from latentdiff.models.clip import CLIPTextConfig, CLIPTextModel
from latentdiff.models.config import ModelConfig
from latentdiff.models.pixels import LabelConfig, LabelEncoder, PixelSpace, PixelSpaceConfig
from latentdiff.models.t5 import T5Config, T5EncoderModel
from latentdiff.models.tokenizer import Tokenizer
from latentdiff.models.unet import UNet2DConditionModel, UNetConfig

__all__ = ["KINDS", "Kind", "load_autoencoder", "load_pipeline", "load_text_encoder"]

# How many layers a configuration asks for is the product of these keys; each layer has at least one tensor.
COUNT_KEYS = ("layers_per_block", "transformer_layers_per_block", "num_hidden_layers", "num_layers")
MAX_NUMBER = 2**24  # of any whole number in a configuration
# Tables that older files carry and no network needs, and weights that stand there twice.
IGNORED_TENSORS = ("embeddings.position_ids", "text_model.embeddings.position_ids", "encoder.embed_tokens.weight")
# Pipelines of diffusers that set steps_offset to 1, whatever scheduler_config.json says; leading spacing alone has one.
OFFSET_BY_ONE = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline")
TEXT_MODEL = "text_model."  # before the names of CLIP's weights, except where newer versions of transformers wrote them
# Names of the attention layer in autoencoders published before 2023.
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


class Kind(NamedTuple):
    """A class that a model folder may name: its configuration, its network, and the stem of its weight files."""

    config: type[ModelConfig]
    network: Any
    stem: str


KINDS: dict[str, Kind] = {
    "UNet2DConditionModel": Kind(UNetConfig, UNet2DConditionModel, "diffusion_pytorch_model"),
    "AutoencoderKL": Kind(AutoencoderConfig, AutoencoderKL, "diffusion_pytorch_model"),
    "BertModel": Kind(BertConfig, BertModel, "model"),
    "CLIPTextModel": Kind(CLIPTextConfig, CLIPTextModel, "model"),
    "CLIPTextModelWithProjection": Kind(CLIPTextConfig, CLIPTextModel, "model"),
    "PixelSpace": Kind(PixelSpaceConfig, PixelSpace, "diffusion_pytorch_model"),
    "LabelEncoder": Kind(LabelConfig, LabelEncoder, "model"),
    "T5EncoderModel": Kind(T5Config, T5EncoderModel, "model"),
}


def load_pipeline(
    model: str | os.PathLike[str] | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    prediction_type: str | None = None,
) -> Components:
    """Load all components of a text-to-image model.

    Args:
        model: folder in diffusers' layout, or a safetensors file of the original one; None or "embedded" for the model
            that comes with the package.
        dtype: of the weights in memory, whatever it is in the files.
        device: where the weights go.
        prediction_type: what the U-Net predicts (see `diffusion.prediction.PREDICTIONS`), where the files say it
            wrongly or, as single files of Stable Diffusion 2.x, not at all; None for what they say.

    Raises:
        InputError: there is no such folder or prediction type.
        ModelLoadError: the model was refused; the subclass says why.
    """
    if model is not None and Path(model).is_file():
        from latentdiff.checkpoints.single_file import load_single_file  # which needs this module

        return load_single_file(Path(model), dtype, device, prediction_type)
    folder, name = find_model(model)
    layout = read_layout(folder)
    classes, homes = layout.classes, layout.homes
    networks = {
        component: _load_component(layout, component, dtype, device) for component in NETWORKS if component in classes
    }
    tokenizers = [_load_tokenizer(homes[name], name) for name in ("tokenizer", "tokenizer_2") if name in classes]
    encoders = [networks[name] for name in ("text_encoder", "text_encoder_2") if name in networks]
    schedule = load_schedule(folder)
    if prediction_type is not None:
        schedule = replace(schedule, prediction_type=prediction_type)
    components = Components(
        unet=networks["unet"],
        autoencoder=networks["vae"],
        text_encoder=encoders[0],
        tokenizer=tokenizers[0] if tokenizers else None,
        schedule=schedule,
        low_res_schedule=load_schedule(folder, "low_res_scheduler") if "low_res_scheduler" in classes else None,
        text_encoder_2=encoders[1] if len(encoders) > 1 else None,
        tokenizer_2=tokenizers[1] if len(tokenizers) > 1 else None,
        force_zeros=layout.index.get("force_zeros_for_empty_prompt") is True,
        name=name,
        source=ModelSource(folder),
    )
    check_fit(folder, components)
    return components


def load_autoencoder(
    path: str | os.PathLike[str], dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> AutoencoderKL:
    """Load an autoencoder: the folder with its config.json, or one with that folder inside as `vae`.

    Raises:
        ModelLoadError: see `load_pipeline`.
    """
    folder = Path(path)
    if not (folder / "config.json").exists():
        folder = home(folder, "vae") / "vae"
    return _load(folder.parent, folder.name, ("AutoencoderKL",), dtype, device)


def load_text_encoder(
    path: str | os.PathLike[str], dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> tuple[TextEncoder, Tokenizer]:
    """Load the text encoder and the tokenizer of a model folder, which may lack the rest, or of a folder of OpenCLIP's.

    Raises:
        ModelLoadError: see `load_pipeline`.
    """
    from latentdiff.checkpoints.openclip import CONFIG, load_open_clip  # which needs this module

    folder, kinds = Path(path), ("BertModel", "CLIPTextModel", "T5EncoderModel")
    if (folder / CONFIG).is_file():
        return load_open_clip(folder, None, dtype, device)
    places = [home(folder, component) for component in ("text_encoder", "tokenizer")]
    return _load(places[0], "text_encoder", kinds, dtype, device), _load_tokenizer(places[1])


def _load_component(layout: Layout, component: str, dtype: torch.dtype, device: str | torch.device) -> Any:
    """Load a network of a model, which may be in the folder of its base, or differ from one that is."""
    root, classes = layout.homes[component], (layout.classes[component],)
    if component != "unet" or layout.difference is None or layout.base is None:
        return _load(root, component, classes, dtype, device)
    from latentdiff.checkpoints.variant import apply_difference  # which needs this module

    base = _load(layout.base, component, classes, dtype, device)
    path, data, named = _read_config(root, component, classes)
    changes = read_header(layout.difference).tensors
    network = build(path, KINDS[named], data, len(base.state_dict()) + len(changes), dtype)
    return apply_difference(layout.difference, changes, base, network).requires_grad_(False).eval()


def _read_config(root: Path, component: str, classes: tuple[str, ...]) -> tuple[Path, dict[str, Any], str]:
    """Return the configuration of a network, with its path and the class that it names, one of `classes`."""
    path = child(root, component, "config.json")
    data = read_json(path)
    architectures = data.get("architectures")
    named = data.get("_class_name") or (architectures[0] if isinstance(architectures, list) and architectures else None)
    if named not in classes:
        raise ModelConfigError(f"{path}: expected class {' or '.join(classes)}, got {str(named)[:80]!r}")
    return path, data, named


def _load(root: Path, component: str, classes: tuple[str, ...], dtype: torch.dtype, device: str | torch.device) -> Any:
    path, data, named = _read_config(root, component, classes)
    files = weight_files(root, component)
    headers = {file: read_header(file).tensors for file in files}
    for file, placed in files.items():
        if placed is not None and placed != headers[file].keys():
            raise ModelMismatchError(f"{file}: {_differences(placed, headers[file].keys())} by the index")
    tensors = {name: info for header in headers.values() for name, info in header.items()}
    network = build(path, KINDS[named], data, len(tensors), dtype)
    names = {_current_name(name, named): name for name in tensors if name not in IGNORED_TENSORS}
    _check_tensors(root / component, network.state_dict(), {new: tensors[old] for new, old in names.items()})
    weights: dict[str, Tensor] = {}
    for file, header in headers.items():
        wanted = {name: info for name, info in header.items() if name not in IGNORED_TENSORS}
        weights |= read_weights(file, wanted, dtype, device)
    network.load_state_dict({new: weights[old] for new, old in names.items()}, strict=True, assign=True)
    return network.requires_grad_(False).eval()


def build(path: Path, kind: Kind, data: dict[str, Any], tensor_count: int, dtype: torch.dtype) -> nn.Module:
    """Build a network without memory, if its configuration asks for nothing absurd."""
    numbers = {key: _numbers(value) for key, value in data.items()}
    if not all(abs(number) <= MAX_NUMBER for found in numbers.values() for number in found):
        raise ModelConfigError(f"{path}: expected no number above {MAX_NUMBER} and none that is not finite")
    layers = 1.0
    for key in COUNT_KEYS:
        layers *= max(numbers.get(key) or [1])
    if layers > tensor_count:
        raise ModelMismatchError(
            f"{path}: implies {layers:.0f} layers or more, but the weights are {tensor_count} tensors"
        )
    try:
        with torch.device("meta"), _WithoutInitialisation():
            network: nn.Module = kind.network(kind.config.from_dict(data))
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


class _WithoutInitialisation(TorchFunctionMode):
    """Leave out the initial values of weights, which are replaced anyway and on "meta" cost a second of imports."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == nn.init.__name__:
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


def _numbers(value: Any) -> list[float]:
    if isinstance(value, list):
        return [number for item in value for number in _numbers(item)]
    return [value] if isinstance(value, (int, float)) and not isinstance(value, bool) else []


def _current_name(name: str, class_name: str) -> str:
    if class_name.startswith("CLIPText") and not name.startswith((TEXT_MODEL, "text_projection.")):
        return TEXT_MODEL + name
    if class_name != "AutoencoderKL" or ".attentions." not in name:
        return name
    stem, layer, leaf = name.rsplit(".", 2)
    return f"{stem}.{OLD_ATTENTION.get(layer, layer)}.{leaf}"


def _check_tensors(folder: Path, expected: Mapping[str, Tensor], found: Mapping[str, TensorInfo]) -> None:
    if expected.keys() != found.keys():
        raise ModelMismatchError(f"{folder}: {_differences(expected.keys(), found.keys())} by config.json")
    wrong = []
    for name, tensor in expected.items():
        shape, dtype = found[name].shape, found[name].dtype
        if shape != tuple(tensor.shape) or dtype not in FLOATS:
            wrong.append(f"{name} is {dtype} {list(shape)} instead of {list(tensor.shape)}")
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ModelMismatchError(f"{folder}: weights do not fit config.json: {'; '.join(wrong[:5])}{more}")


def _differences(expected: Any, found: Any) -> str:
    """Name up to five tensors that are missing or too many."""
    rows = [f"{name} is missing" for name in sorted(expected - found)]
    rows += [f"{name[:100]} is not expected" for name in sorted(found - expected)]
    more = f" and {len(rows) - 5} more" if len(rows) > 5 else ""
    return f"{'; '.join(rows[:5])}{more}"


def _load_tokenizer(root: Path, component: str = "tokenizer") -> Tokenizer:
    files = {path.name: path.read_bytes() for path in tokenizer_files(root, component)}
    return Tokenizer(files, str(root / component))


def load_schedule(root: Path, component: str = "scheduler") -> NoiseSchedule:
    """Load the noise schedule of a model folder.

    Raises:
        ModelLoadError: see `load_pipeline`.
    """
    path = child(home(root, component), component, "scheduler_config.json")
    try:
        schedule = NoiseSchedule.from_dict({"_class_name": "", **read_json(path)})
    except ModelConfigError as error:
        raise ModelConfigError(f"{path}: {error}") from error
    leading = component == "scheduler" and schedule.timestep_spacing in (None, "leading")
    if leading and (root / INDEX).exists() and read_layout(root).classes["pipeline"] in OFFSET_BY_ONE:
        return replace(schedule, steps_offset=min(1, schedule.num_train_timesteps - 1))
    return schedule
