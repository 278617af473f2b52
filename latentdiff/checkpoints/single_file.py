"""Load a whole model from one safetensors file of the original (CompVis, sgm) layout, and write one.

The file has weights alone. Which model they are of is told by their names and shapes; its configuration and vocabulary
come with the package (`families/`), so nothing is fetched.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from latentdiff.checkpoints.build import KINDS, TEXT_MODEL, build
from latentdiff.checkpoints.claims import VELOCITY, ZERO_SNR, Claims, marks_of, metadata_of, read_claims
from latentdiff.checkpoints.components import Components, ModelSource, check_fit
from latentdiff.checkpoints.compvis_keys import (
    SourceKey,
    autoencoder_keys,
    clip_keys,
    diffusers_keys,
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
    family_of,
    text_layouts,
)
from latentdiff.checkpoints.header import Header, TensorInfo, read_header
from latentdiff.checkpoints.storage import save_tensors
from latentdiff.checkpoints.weights import FLOATS, read_weights, stored_weights
from latentdiff.diffusion.schedule import NoiseSchedule
from latentdiff.errors import InputError, ModelConfigError, ModelMismatchError
from latentdiff.files import check_writable, require_path
from latentdiff.models.autoencoder import AutoencoderConfig, AutoencoderKL
from latentdiff.models.clip import CLIPTextConfig
from latentdiff.models.unet import UNet2DConditionModel, UNetConfig

__all__ = [
    "VELOCITY",
    "Section",
    "fit",
    "load_section",
    "load_single_file",
    "recognise",
    "save_single_file",
]

NAMED = 5  # tensors in an error
# Of a schedule, what every program that samples must know; the rest are habits of samplers.
NOISE_KEYS = (
    *("prediction_type", "rescale_betas_zero_snr", "beta_schedule", "beta_start", "beta_end", "num_train_timesteps"),
    "variance_type",
)
# Of configurations, what other programs have settings of their own for, or no use.
INFORMATIVE = (
    "sample_size",
    "force_upcast",
    "eos_token_id",
    "projection_dim",
    "use_attention_mask",
    "upcast_attention",
)


def load_single_file(
    path: Path,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    prediction_type: str | None = None,
    load_vae: Callable[[dict[str, Any]], AutoencoderKL] | None = None,
) -> Components:
    """Load all components of a model from one file.

    Args:
        path: of the safetensors file.
        dtype, device: of the weights in memory.
        prediction_type: what the U-Net predicts; None for that of the family.
        load_vae: returns another autoencoder than that in the file, given the configuration of the latter.

    Raises:
        InputError: there is no such prediction type.
        ModelLoadError: the file was refused; the subclass says why.
    """
    header = read_header(path)
    family, schedule, sections, claims = recognise(path, header)
    shape = families()[family]
    if prediction_type is not None:
        schedule = replace(schedule, prediction_type=prediction_type)
    elif schedule.prediction_type != "epsilon" and family != ENLARGING and not claims.say_prediction:
        warnings.warn(
            f"{path.name} is taken for the {family} that predicts velocity (768-v); the file itself does not say. "
            'If its pictures are noise, it predicts noise: pass prediction_type="epsilon"',
            stacklevel=4,
        )
    for note in claims.all_notes(schedule):
        warnings.warn(note, stacklevel=4)
    if load_vae is None and not any(name.startswith(VAE) for name in header.tensors):
        raise ModelMismatchError(f"{path}: has no autoencoder ({VAE}...); pass one besides, as vae or --vae")
    networks: dict[str, Any] = {
        one.component: load_vae(one.config)
        if load_vae is not None and one.component == "vae"
        else load_section(path, header.tensors, one, dtype, device)
        for one in sections
    }
    encoders = [network for name, network in networks.items() if name.startswith("text_encoder")]
    tokenizers = [clip_tokenizer(text["pad"]) for text in shape["text"]]
    second = len(encoders) > 1
    components = Components(
        unet=networks["unet"],
        autoencoder=networks["vae"],
        text_encoder=encoders[0],
        tokenizer=tokenizers[0],
        schedule=schedule,
        text_encoder_2=encoders[1] if second else None,
        tokenizer_2=tokenizers[1] if second else None,
        low_res_schedule=_low_res_schedule(shape, claims),
        force_zeros=claims.configs.get("force_zeros", shape.get("force_zeros", False)) is True,
        name=str(path),
        source=ModelSource(path),
    )
    check_fit(path, components)
    return components


def save_single_file(
    components: Components, path: str | os.PathLike[str], dtype: torch.dtype | None = torch.float16
) -> None:
    """Write a whole model as one file of the original layout, which appears under its name only when it is whole.

    What its readers take from the family of models, and is otherwise here, is in its marks and metadata. Of what only
    this package reads there, a warning tells.

    Args:
        components: of a model with CLIP text encoders.
        path: ending in .safetensors.
        dtype: of the weights in the file; None keeps each as it is.

    Raises:
        InputError: the model has components or words that the layout has no place for, or the path another ending.
        ModelValueError: a weight is not finite in that dtype.
        StorageError: the file cannot be written.
    """
    target = require_path(path, "a single file")
    if target.suffix != ".safetensors":
        raise InputError(f"a single file must end in .safetensors, got {target.name!r}")
    check_writable(target)
    if not isinstance(components.autoencoder, AutoencoderKL):
        raise InputError("a single file holds a U-Net and an autoencoder, got a model without; save it as a folder")
    metadata, marks = _identity(components)
    networks: dict[str, tuple[nn.Module, str]] = {UNET: (components.unet, "unet")}
    networks[VAE] = (components.autoencoder, "autoencoder")
    encoders = [one for one in (components.text_encoder, components.text_encoder_2) if one is not None]
    networks |= {prefix: (encoder, kind) for (kind, prefix), encoder in zip(text_layouts(components), encoders)}
    tensors = dict(marks)
    for prefix, (network, layout) in networks.items():
        joined = join(_key_map(network, layout), stored_weights(network.state_dict(), dtype))
        tensors |= {prefix + name: tensor.contiguous() for name, tensor in joined.items()}
    save_tensors(tensors, target, metadata)


def _identity(components: Components) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Return the metadata and the marks of a file, with all that its readers would take from the family otherwise."""
    family = family_of(components)
    shape, channels = families()[family], components.unet.config.in_channels
    usual = NoiseSchedule(**shape["schedule"])
    if channels == 9:
        usual = replace(usual, prediction_type="epsilon")
    schedule = components.schedule
    marks = marks_of(schedule, usual, torch.zeros(0))
    if schedule.prediction_type in ("epsilon", "v_prediction"):
        usual = replace(usual, prediction_type=schedule.prediction_type, rescale_betas_zero_snr=ZERO_SNR in marks)
    configs, lost = dict[str, Any](), list[str]()
    if schedule.to_dict() != usual.to_dict():
        configs["scheduler"] = schedule.to_dict()
        lost += [key for key in NOISE_KEYS if getattr(schedule, key) != getattr(usual, key)]
    low_res, usual_one = components.low_res_schedule, _low_res_schedule(shape, None)
    if low_res is not None and usual_one is not None and low_res.to_dict() != usual_one.to_dict():
        configs["low_res_scheduler"] = low_res.to_dict()
        lost.append("low_res_scheduler")
    if components.force_zeros != shape.get("force_zeros", False):
        configs["force_zeros"] = components.force_zeros
    side = _side(components)
    for component, config, likely in _configs(components, shape, side):
        differing = {key: value for key, value in config.items() if value != likely.get(key, value)}
        configs |= {component: differing} if differing else {}
        lost += [f"{key} of {component}" for key in differing if key not in INFORMATIVE]
    lost += _other_vocabularies(components, shape)
    if lost:
        warnings.warn(
            f"a single file has no place for {', '.join(lost)}: this package reads it from the metadata, but other "
            f"programs take that of {family}; save a folder for them",
            stacklevel=4,
        )
    return metadata_of(family, schedule, side, channels, configs), marks


def _side(components: Components) -> int | None:
    """Return the side of the pictures that a model was trained on, where metadata can say it."""
    side = components.unet.config.sample_size
    pixels = side * components.autoencoder.config.downsample_factor if isinstance(side, int) else 0
    return pixels if 64 <= pixels <= 2048 and pixels % 8 == 0 else None


def _configs(
    components: Components, shape: Mapping[str, Any], side: int | None
) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Yield the name of each component, its configuration, and that which a reader would take."""
    unet = {**shape["unet"], "in_channels": components.unet.config.in_channels}
    if side is not None:
        unet["sample_size"] = components.unet.config.sample_size
    yield "unet", components.unet.config.to_dict(), UNetConfig.from_dict(unet).to_dict()
    yield "vae", components.autoencoder.config.to_dict(), AutoencoderConfig.from_dict(shape["vae"]).to_dict()
    names, encoders = ("text_encoder", "text_encoder_2"), (components.text_encoder, components.text_encoder_2)
    for name, encoder, text in zip(names, encoders, shape["text"]):
        assert encoder is not None
        yield name, encoder.config.to_dict(), CLIPTextConfig.from_dict(text["config"]).to_dict()


def _other_vocabularies(components: Components, shape: Mapping[str, Any]) -> list[str]:
    """Return what to tell of tokenizers that are not CLIP's; a reader refuses those with fewer words.

    Raises:
        InputError: one has words that no reader would miss.
    """
    lost = []
    for tokenizer, text in zip((components.tokenizer, components.tokenizer_2), shape["text"]):
        usual = clip_tokenizer(text["pad"])
        if tokenizer is None or tokenizer.same_as(usual):
            continue
        if len(tokenizer) >= len(usual):
            raise InputError(
                "a single file has no place for a vocabulary other than CLIP's, such as one with learned words; "
                "save it as a folder"
            )
        lost.append("the vocabulary")
    return lost


class Section(NamedTuple):
    """One network in a file: what a folder calls it, its class, its names there (see `compvis_keys`) and its config."""

    component: str
    class_name: str
    layout: str
    prefix: str
    config: dict[str, Any]


def recognise(path: Path, header: Header) -> tuple[str, NoiseSchedule, list[Section], Claims]:
    """Return the family that a file of the original layout belongs to, its schedule, networks, and its claims.

    Raises:
        ModelLoadError: it is none that is known, or says something of itself that cannot be honoured.
    """
    tensors = header.tensors
    family = _family(path, tensors)
    claims = read_claims(path, header)
    shape = families()[family]
    channels = tensors[f"{UNET}input_blocks.0.0.weight"].shape[1]
    schedule = NoiseSchedule(**shape["schedule"])
    if channels == 9:
        schedule = replace(schedule, prediction_type="epsilon")  # as all inpainting models do
    try:
        schedule = claims.schedule(schedule)
    except (InputError, ModelConfigError) as error:
        raise ModelConfigError(f"{path}: {error}") from error
    vae = claims.config("vae", shape["vae"])
    config = {**shape["unet"], "in_channels": channels}
    if claims.side is not None and isinstance(vae["block_out_channels"], list):
        config["sample_size"] = claims.side // 2 ** (len(vae["block_out_channels"]) - 1)
    sections = [
        Section("unet", "UNet2DConditionModel", "unet", UNET, claims.config("unet", config)),
        Section("vae", "AutoencoderKL", "autoencoder", VAE, vae),
    ]
    for component, text in zip(("text_encoder", "text_encoder_2"), shape["text"]):
        class_name = text["config"]["architectures"][0]
        config = claims.config(component, text["config"])
        sections.append(Section(component, class_name, text["layout"], text["prefix"], config))
    return family, schedule, sections, claims


def _low_res_schedule(shape: Mapping[str, Any], claims: Claims | None) -> NoiseSchedule | None:
    own = None if claims is None else claims.configs.get("low_res_scheduler")
    if isinstance(own, dict):
        return NoiseSchedule.from_dict({"_class_name": "", **own})
    return NoiseSchedule(**shape["low_res_schedule"]) if "low_res_schedule" in shape else None


def _family(path: Path, tensors: Mapping[str, TensorInfo]) -> str:
    first = f"{UNET}input_blocks.0.0.weight"
    if first not in tensors:
        prefixed = next((name for name in tensors if name.endswith(f".{first}")), None)
        if prefixed is not None:
            prefix = prefixed.removesuffix(first)
            raise ModelConfigError(
                f"{path}: names of its tensors begin with {prefix[:60]!r}, which is in the way; save it again without"
            )
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
    network, key_map = fit(path, tensors, section, dtype)
    there = {source.name: tensors[source.name] for source in key_map.values()}
    read = read_weights(path, there, dtype, device)
    weights = {name: source.take(read[source.name]).contiguous() for name, source in key_map.items()}
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
    key_map = _key_map(network, layout)
    if layout == "clip" and f"{prefix}{TEXT_MODEL}final_layer_norm.weight" not in tensors:
        key_map = {name: SourceKey(source.name.removeprefix(TEXT_MODEL)) for name, source in key_map.items()}
    key_map = {name: replace(source, name=prefix + source.name) for name, source in key_map.items()}
    wrong = []
    for name, source in key_map.items():
        wanted, found = source.shape(tuple(expected[name].shape)), tensors.get(source.name)
        if found is None:
            wrong.append(f"{source.name} is missing")
        elif found.dtype not in FLOATS or found.shape not in (wanted, wanted[:2] if source.as_convolution else wanted):
            wrong.append(f"{source.name} is {found.dtype} {list(found.shape)} instead of {list(wanted)}")
    if layout == "unet":  # of the other networks, files carry what no picture needs
        known = {source.name for source in key_map.values()}
        wrong += [f"{name[:100]} is not expected" for name in tensors if name.startswith(prefix) and name not in known]
    if wrong:
        more = f" and {len(wrong) - NAMED} more" if len(wrong) > NAMED else ""
        raise ModelMismatchError(f"{path}: {'; '.join(wrong[:NAMED])}{more}")
    return network, key_map


def _key_map(network: nn.Module, layout: str) -> dict[str, SourceKey]:
    names = network.state_dict()
    if layout.startswith("diffusers"):
        return diffusers_keys(names, old=layout != "diffusers")
    if isinstance(network, UNet2DConditionModel):
        return unet_keys(names, network.config)
    if isinstance(network, AutoencoderKL):
        return autoencoder_keys(names, network.config)
    return open_clip_keys(names) if layout == "open_clip" else clip_keys(names)
