"""Load models from folders in diffusers' layout. Neither diffusers nor transformers is imported.

A network is built without memory (on the "meta" device), its configuration and the headers of its files are compared,
and only then are the tensors read, cast, checked to be finite and put in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentdiff.checkpoints.build import KINDS, TEXT_MODEL, build
from latentdiff.checkpoints.components import Components, ModelSource, check_fit
from latentdiff.checkpoints.compvis_keys import OLD_ATTENTION
from latentdiff.checkpoints.difference import apply_difference
from latentdiff.checkpoints.folder import (
    INDEX,
    NETWORKS,
    TINY_DECODER,
    Layout,
    as_diffusers_reads,
    child,
    home,
    read_json,
    read_layout,
    tokenizer_files,
    weight_files,
)
from latentdiff.checkpoints.generation_config import read_defaults
from latentdiff.checkpoints.header import TensorInfo, read_header
from latentdiff.checkpoints.tuned_sampler import read_tuned
from latentdiff.checkpoints.weights import FLOATS, read_weights
from latentdiff.diffusion.schedule import NoiseSchedule
from latentdiff.errors import ModelConfigError, ModelMismatchError
from latentdiff.models.autoencoder import AutoencoderKL
from latentdiff.models.autoencoder_tiny import AutoencoderTiny
from latentdiff.models.tokenizer import Tokenizer

__all__ = ["load_folder", "load_network", "load_schedule", "load_tokenizer"]

# Tables that older files carry and no network needs, and weights that stand there twice.
IGNORED_TENSORS = ("embeddings.position_ids", "text_model.embeddings.position_ids", "encoder.embed_tokens.weight")
UNUSED_PART = {"AutoencoderTiny": "encoder."}  # by class, how the names of tensors begin that no network here has
# Pipelines of diffusers that set steps_offset to 1, whatever scheduler_config.json says; leading spacing alone has one.
OFFSET_BY_ONE = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline")


def load_folder(
    folder: Path,
    name: str,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    prediction_type: str | None = None,
    load_vae: Callable[[dict[str, Any]], AutoencoderKL] | None = None,
) -> Components:
    """Load all components of a model from a folder.

    Args:
        folder: in diffusers' layout.
        name: how settings refer to it.
        dtype, device, prediction_type: see `read.load_pipeline`.
        load_vae: returns another autoencoder than that in the folder, given the configuration of the latter.

    Raises:
        InputError: there is no such prediction type.
        ModelLoadError: the model was refused; the subclass says why.
    """
    layout = read_layout(folder)
    classes, homes = layout.classes, layout.homes
    wanted = [name for name in NETWORKS if name in classes and (load_vae is None or name != "vae")]
    networks = {component: _load_component(layout, component, dtype, device) for component in wanted}
    if load_vae is not None:
        config = child(homes["vae"], "vae", "config.json")
        networks["vae"] = load_vae(read_json(config) if config.exists() else {})
    encoders = [networks[name] for name in ("text_encoder", "text_encoder_2") if name in networks]
    named = [name for name in ("tokenizer", "tokenizer_2") if name in classes]
    windows = [getattr(encoder.config, "max_position_embeddings", None) for encoder in encoders]  # labels have none
    tokenizers = [load_tokenizer(homes[name], name, longest) for name, longest in zip(named, windows)]
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
        defaults=read_defaults(folder),
        tuned=read_tuned(folder),
        tiny_decoder=None if load_vae else _load_tiny_decoder(homes["vae"], networks["vae"], dtype, device),
    )
    check_fit(folder, components)
    return components


def _load_component(layout: Layout, component: str, dtype: torch.dtype, device: str | torch.device) -> Any:
    """Load a network of a model, which may be in the folder of its base, or differ from one that is."""
    root, classes = layout.homes[component], (layout.classes[component],)
    if component != "unet" or layout.difference is None or layout.base is None:
        return load_network(root, component, classes, dtype, device)
    base = load_network(layout.base, component, classes, dtype, device)
    path, data, named = _read_config(root, component, classes)
    changes = read_header(layout.difference).tensors
    network = build(path, KINDS[named], data, len(base.state_dict()) + len(changes), dtype)
    return apply_difference(layout.difference, changes, base, network).requires_grad_(False).eval()


def _load_tiny_decoder(
    folder: Path, autoencoder: Any, dtype: torch.dtype, device: str | torch.device
) -> AutoencoderTiny | None:
    """Load the decoder of previews that a model may have.

    Raises:
        ModelLoadError: it was refused, or is for other latents.
    """
    if not (folder / TINY_DECODER / "config.json").is_file():
        return None
    found: AutoencoderTiny = load_network(folder, TINY_DECODER, ("AutoencoderTiny",), dtype, device)
    channels = found.config.latent_channels
    if channels != autoencoder.config.latent_channels:
        place, own = folder / TINY_DECODER, autoencoder.config.latent_channels
        raise ModelConfigError(f"{place} decodes latents of {channels} channels, those of vae have {own}; remove it")
    return found


def _read_config(root: Path, component: str, classes: tuple[str, ...]) -> tuple[Path, dict[str, Any], str]:
    """Return the configuration of a network, with its path and the class that it names, one of `classes`."""
    path = child(root, component, "config.json")
    data = read_json(path)
    architectures = data.get("architectures")
    named = data.get("_class_name") or (architectures[0] if isinstance(architectures, list) and architectures else None)
    if named not in classes:
        raise ModelConfigError(f"{path}: expected class {' or '.join(classes)}, got {str(named)[:80]!r}")
    return path, as_diffusers_reads(data) if component == "unet" else data, named


def load_network(
    root: Path, component: str, classes: tuple[str, ...], dtype: torch.dtype, device: str | torch.device
) -> Any:
    """Load one network from the folder `component` of a model, whose configuration names one of `classes`.

    Raises:
        ModelLoadError: it was refused; the subclass says why.
    """
    path, data, named = _read_config(root, component, classes)
    files = weight_files(root, component)
    headers = {file: read_header(file).tensors for file in files}
    for file, placed in files.items():
        if placed is not None and placed != headers[file].keys():
            raise ModelMismatchError(f"{file}: {_differences(placed, headers[file].keys())} by the index")
    tensors = {name: info for header in headers.values() for name, info in header.items()}
    network = build(path, KINDS[named], data, len(tensors), dtype)
    names = {_current_name(name, named): name for name in tensors if _is_used(name, named)}
    _check_tensors(root / component, network.state_dict(), {new: tensors[old] for new, old in names.items()})
    weights: dict[str, Tensor] = {}
    for file, header in headers.items():
        wanted = {name: info for name, info in header.items() if _is_used(name, named)}
        kept = getattr(network, "kept_in_float32", ()) if dtype == torch.float16 else ()
        exact = {name: info for name, info in wanted.items() if name.endswith(kept)}
        weights |= read_weights(file, exact, torch.float32, device)
        weights |= read_weights(file, {name: wanted[name] for name in wanted.keys() - exact.keys()}, dtype, device)
    network.load_state_dict({new: weights[old] for new, old in names.items()}, strict=True, assign=True)
    return network.requires_grad_(False).eval()


def _is_used(name: str, class_name: str) -> bool:
    part = UNUSED_PART.get(class_name)
    return name not in IGNORED_TENSORS and (part is None or not name.startswith(part))


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


def _differences(expected: AbstractSet[str], found: AbstractSet[str]) -> str:
    """Name up to five tensors that are missing or too many."""
    rows = [f"{name} is missing" for name in sorted(expected - found)]
    rows += [f"{name[:100]} is not expected" for name in sorted(found - expected)]
    more = f" and {len(rows) - 5} more" if len(rows) > 5 else ""
    return f"{'; '.join(rows[:5])}{more}"


def load_tokenizer(root: Path, component: str = "tokenizer", longest: int | None = None) -> Tokenizer:
    """Load the tokenizer from the folder `component` of a model.

    Args:
        longest: window of its text encoder, for a tokenizer that names none.

    Raises:
        ModelLoadError: it was refused; the subclass says why.
    """
    files = {path.name: path.read_bytes() for path in tokenizer_files(root, component)}
    return Tokenizer(files, str(root / component), longest)


def load_schedule(root: Path, component: str = "scheduler") -> NoiseSchedule:
    """Load the noise schedule of a model folder.

    Raises:
        ModelLoadError: see `load_pipeline`.
    """
    path = child(home(root, component), component, "scheduler_config.json")
    config = read_json(path)
    if config.get("trained_betas") == []:  # none, as some programs write it
        del config["trained_betas"]
    try:
        schedule = NoiseSchedule.from_dict({"_class_name": "", **config})
    except ModelConfigError as error:
        raise ModelConfigError(f"{path}: {error}") from error
    leading = component == "scheduler" and schedule.timestep_spacing in (None, "leading")
    if leading and (root / INDEX).exists() and read_layout(root).classes["pipeline"] in OFFSET_BY_ONE:
        return replace(schedule, steps_offset=min(1, schedule.num_train_timesteps - 1))
    return schedule
