"""Load a whole model from one safetensors file of the original (CompVis, sgm) layout, and write one.

The file has weights alone. Which model they are of is told by their names and shapes; its configuration and vocabulary
come with the package (`families/`), so nothing is fetched.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from latentdiff.checkpoints.build import KINDS, TEXT_MODEL, build
from latentdiff.checkpoints.components import Components, check_fit
from latentdiff.checkpoints.compvis_keys import (
    SourceKey,
    autoencoder_keys,
    clip_keys,
    join,
    open_clip_keys,
    unet_keys,
)
from latentdiff.checkpoints.family import (
    ENLARGING,
    ENLARGING_CHANNELS,
    MARKS,
    UNET,
    VAE,
    clip_tokenizer,
    families,
    text_layouts,
)
from latentdiff.checkpoints.header import TensorInfo, read_header
from latentdiff.checkpoints.storage import save_tensors
from latentdiff.checkpoints.weights import FLOATS, read_weights, stored_weights
from latentdiff.diffusion.schedule import NoiseSchedule
from latentdiff.errors import InputError, ModelConfigError, ModelMismatchError
from latentdiff.images import check_writable
from latentdiff.models.autoencoder import AutoencoderKL

__all__ = [
    "Section",
    "fit",
    "load_section",
    "load_single_file",
    "recognise",
    "save_single_file",
]

VELOCITY, ZERO_SNR = "v_pred", "ztsnr"  # empty tensors with which some files say so of themselves
NAMED = 5  # tensors in an error


def load_single_file(
    path: Path,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    prediction_type: str | None = None,
) -> Components:
    """Load all components of a model from one file.

    Args:
        path: of the safetensors file.
        dtype, device: of the weights in memory.
        prediction_type: what the U-Net predicts; None for that of the family.

    Raises:
        InputError: there is no such prediction type.
        ModelLoadError: the file was refused; the subclass says why.
    """
    tensors = read_header(path).tensors
    family, schedule, sections = recognise(path, tensors)
    shape = families()[family]
    if prediction_type is not None:
        schedule = replace(schedule, prediction_type=prediction_type)
    elif schedule.prediction_type != "epsilon" and family != ENLARGING and VELOCITY not in tensors:
        warnings.warn(
            f"{path.name} is taken for the {family} that predicts velocity (768-v); the file itself does not say. "
            'If its pictures are noise, it predicts noise: pass prediction_type="epsilon"',
            stacklevel=4,
        )
    unet, autoencoder, *encoders = [load_section(path, tensors, section, dtype, device) for section in sections]
    tokenizers = [clip_tokenizer(text["pad"]) for text in shape["text"]]
    second = len(encoders) > 1
    components = Components(
        unet=unet,
        autoencoder=autoencoder,
        text_encoder=encoders[0],
        tokenizer=tokenizers[0],
        schedule=schedule,
        text_encoder_2=encoders[1] if second else None,
        tokenizer_2=tokenizers[1] if second else None,
        low_res_schedule=NoiseSchedule(**shape["low_res_schedule"]) if "low_res_schedule" in shape else None,
        force_zeros=shape.get("force_zeros", False),
        name=str(path),
        folder=path,
    )
    check_fit(path, components)
    return components


def save_single_file(
    components: Components, path: str | os.PathLike[str], dtype: torch.dtype | None = torch.float16
) -> None:
    """Write a whole model as one file of the original layout, which appears under its name only when it is whole.

    Schedule and configurations are not in such a file: whoever reads it takes those of the family.

    Args:
        components: of a model with CLIP text encoders.
        path: ending in .safetensors.
        dtype: of the weights in the file; None keeps each as it is.

    Raises:
        InputError: the model has components that the layout has no place for, or the path another ending.
        ModelValueError: a weight is not finite in that dtype.
        StorageError: the file cannot be written.
    """
    target = Path(path)
    if target.suffix != ".safetensors":
        raise InputError(f"a single file must end in .safetensors, got {target.name!r}")
    check_writable(target)
    if components.unet is None or not isinstance(components.autoencoder, AutoencoderKL):
        raise InputError("a single file holds a U-Net and an autoencoder, got a model without; save it as a folder")
    places: dict[str, tuple[Any, dict[str, SourceKey]]] = {}
    places[UNET] = (components.unet, unet_keys(components.unet.state_dict(), components.unet.config))
    places[VAE] = (
        components.autoencoder,
        autoencoder_keys(components.autoencoder.state_dict(), components.autoencoder.config),
    )
    for (layout, prefix), encoder in zip(
        text_layouts(components), (components.text_encoder, components.text_encoder_2)
    ):
        assert encoder is not None
        places[prefix] = (encoder, _places(encoder, layout))
    tensors: dict[str, Tensor] = {}
    for prefix, (network, found) in places.items():
        joined = join(found, stored_weights(network.state_dict(), dtype))
        tensors |= {prefix + name: tensor.contiguous() for name, tensor in joined.items()}
    save_tensors(tensors, target)


class Section(NamedTuple):
    """One network in a file: what a folder calls it, its class, its names there (see `compvis_keys`) and its config."""

    component: str
    class_name: str
    layout: str
    prefix: str
    config: dict[str, Any]


def recognise(path: Path, tensors: Mapping[str, TensorInfo]) -> tuple[str, NoiseSchedule, list[Section]]:
    """Return the name of the family that a file of the original layout belongs to, its schedule and its networks.

    Raises:
        ModelConfigError: it is none that is known.
    """
    family = _family(path, tensors)
    shape = families()[family]
    channels = tensors[f"{UNET}input_blocks.0.0.weight"].shape[1]
    schedule = NoiseSchedule(**shape["schedule"])
    if channels == 9:
        schedule = replace(schedule, prediction_type="epsilon")  # as all inpainting models do
    if VELOCITY in tensors:
        schedule = replace(schedule, prediction_type="v_prediction", rescale_betas_zero_snr=ZERO_SNR in tensors)
    config = {**shape["unet"], "in_channels": channels}
    sections = [
        Section("unet", "UNet2DConditionModel", "unet", UNET, config),
        Section("vae", "AutoencoderKL", "autoencoder", VAE, shape["vae"]),
    ]
    for component, text in zip(("text_encoder", "text_encoder_2"), shape["text"]):
        class_name = text["config"]["architectures"][0]
        sections.append(Section(component, class_name, text["layout"], text["prefix"], text["config"]))
    return family, schedule, sections


def _family(path: Path, tensors: Mapping[str, TensorInfo]) -> str:
    first = f"{UNET}input_blocks.0.0.weight"
    if first not in tensors:
        raise ModelConfigError(
            f"{path}: expected a whole model in the original layout, with {first}, got {len(tensors)} tensors such as "
            f"{next(iter(tensors), 'none')}; pass a whole checkpoint, or a folder in diffusers' layout"
        )
    for family, mark in MARKS.items():
        if any(name.startswith(mark) for name in tensors):
            channels = tensors[first].shape[1]
            if family == "Stable Diffusion 2.x" and channels == ENLARGING_CHANNELS:
                return ENLARGING
            if channels not in (4, 9):
                raise ModelConfigError(
                    f"{path}: {family} with {channels} input channels is not supported; 4 and 9 (inpainting) are"
                )
            return family
    raise ModelConfigError(f"{path}: has a U-Net but no text encoder of Stable Diffusion; pass a whole checkpoint")


def load_section(
    path: Path,
    tensors: Mapping[str, TensorInfo],
    section: Section,
    dtype: torch.dtype,
    device: str | torch.device,
) -> Any:
    """Return a network with its weights.

    Raises:
        ModelLoadError: they do not fit it, or cannot be used.
    """
    network, places = fit(path, tensors, section, dtype)
    there = {place.name: tensors[place.name] for place in places.values()}
    read = read_weights(path, there, dtype, device)
    weights = {name: place.take(read[place.name]).contiguous() for name, place in places.items()}
    network.load_state_dict(weights, strict=True, assign=True)
    return network.requires_grad_(False).eval()


def fit(
    path: Path, tensors: Mapping[str, TensorInfo], section: Section, dtype: torch.dtype
) -> tuple[nn.Module, dict[str, SourceKey]]:
    """Return a network without memory and where in the file each of its weights lies, with the prefix in its name.

    Raises:
        ModelMismatchError: a tensor is missing or of another shape, or the U-Net has others besides.
    """
    _, class_name, layout, prefix, config = section
    network: nn.Module = build(path, KINDS[class_name], config, len(tensors), dtype)
    expected = network.state_dict()
    places = _places(network, layout)
    if layout == "clip" and f"{prefix}{TEXT_MODEL}final_layer_norm.weight" not in tensors:
        places = {name: SourceKey(place.name.removeprefix(TEXT_MODEL)) for name, place in places.items()}
    places = {name: replace(place, name=prefix + place.name) for name, place in places.items()}
    wrong = []
    for name, place in places.items():
        wanted, found = place.shape(tuple(expected[name].shape)), tensors.get(place.name)
        if found is None:
            wrong.append(f"{place.name} is missing")
        elif found.dtype not in FLOATS or found.shape not in (wanted, wanted[:2] if place.as_convolution else wanted):
            wrong.append(f"{place.name} is {found.dtype} {list(found.shape)} instead of {list(wanted)}")
    if layout == "unet":  # of the other networks, files carry what no picture needs
        known = {place.name for place in places.values()}
        wrong += [f"{name[:100]} is not expected" for name in tensors if name.startswith(prefix) and name not in known]
    if wrong:
        more = f" and {len(wrong) - NAMED} more" if len(wrong) > NAMED else ""
        raise ModelMismatchError(f"{path}: {'; '.join(wrong[:NAMED])}{more}")
    return network, places


def _places(network: Any, layout: str) -> dict[str, SourceKey]:
    names = network.state_dict()
    if layout == "unet":
        return unet_keys(names, network.config)
    if layout == "autoencoder":
        return autoencoder_keys(names, network.config)
    return open_clip_keys(names) if layout == "open_clip" else clip_keys(names)
