"""Save models as folders in diffusers' layout: safetensors and JSON that diffusers and transformers load."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from latentdiff.checkpoints.build import KINDS
from latentdiff.checkpoints.components import AnyNetwork, Components
from latentdiff.checkpoints.folder import COMPUTED_IN, INDEX, TINY_DECODER
from latentdiff.checkpoints.generation_config import FILE as DEFAULTS
from latentdiff.checkpoints.storage import flush_to_disk, replace_folder, save_tensors, write_json
from latentdiff.checkpoints.tuned_sampler import FILE as TUNED
from latentdiff.checkpoints.weights import stored_weights
from latentdiff.diffusion.schedule import NoiseSchedule
from latentdiff.diffusion.tuned import TunedSampler, schedule_digest
from latentdiff.files import require_path
from latentdiff.models.pixels import LabelEncoder, PixelSpace
from latentdiff.models.tokenizer import Tokenizer

__all__ = [
    "flush_to_disk",
    "pipeline_index",
    "replace_folder",
    "save_model",
    "save_pipeline",
    "save_tensors",
    "write_components",
    "write_json",
]

TOKENIZER_CLASS = {
    "BertModel": "BertTokenizer",
    "CLIPTextModel": "CLIPTokenizer",
    "CLIPTextModelWithProjection": "CLIPTokenizer",
    "T5EncoderModel": "T5Tokenizer",
}
# Whose class a component's name in model_index.json is, unless it is one that only this package has.
LIBRARIES = {
    "low_res_scheduler": "diffusers",
    "scheduler": "diffusers",
    "text_encoder": "transformers",
    "tokenizer": "transformers",
    "unet": "diffusers",
    "vae": "diffusers",
}
OWN_CLASSES = ("PixelSpace", "LabelEncoder")
DIFFUSERS_VERSION = "0.31.0"  # the oldest for which folders are written; some of its pipelines ask


def save_model(model: AnyNetwork, folder: str | os.PathLike[str], dtype: torch.dtype | None = None) -> None:
    """Write config.json and the weights of one network into `folder`, which has them only when they are whole.

    Args:
        model: one of the networks of `latentdiff.models`.
        folder: new, or one that a model was saved to before.
        dtype: of the weights in the file; None keeps each as it is.

    Raises:
        ModelValueError: a weight is not finite in that dtype.
        StorageError: the folder cannot be written.
    """
    target = require_path(folder, "a folder")
    replace_folder(target, "config.json", lambda place: write_model(model, place, dtype))


def save_pipeline(
    components: Components, folder: str | os.PathLike[str], dtype: torch.dtype | None = torch.float16
) -> None:
    """Write a whole model; `diffusers.StableDiffusionPipeline.from_pretrained` loads it too, if it is of that kind.

    Whatever else is in the folder stays, such as the card of an older model; the components of that one are replaced.

    Args:
        components: complete, with a U-Net.
        folder: new, or one that a model was saved to before.
        dtype: of the weights in the files; None keeps each as it is.

    Raises:
        InputError: there is no U-Net, or the folder holds something that is no model.
        ModelValueError: a weight is not finite in that dtype.
        StorageError: the folder cannot be written.
    """
    target = require_path(folder, "a folder")
    index, networks, tokenizers, schedules = pipeline_index(components)

    def write(place: Path) -> None:
        write_components(place, networks, tokenizers, schedules, dtype)
        if components.tiny_decoder is not None:
            write_model(components.tiny_decoder, place / TINY_DECODER, dtype)
        elif (Path(folder) / TINY_DECODER).exists():  # which would be that of an older model
            (place / TINY_DECODER).mkdir()
        if components.defaults or (Path(folder) / DEFAULTS).exists():  # which would be those of an older model
            write_json(place / DEFAULTS, dict(components.defaults))
        if components.tuned is not None or (Path(folder) / TUNED).exists():
            tuned = components.tuned or TunedSampler(schedule_digest(components.schedule), {})
            write_json(place / TUNED, tuned.to_dict())
        write_json(place / INDEX, index)

    replace_folder(target, INDEX, write)


def write_components(
    place: Path,
    networks: Mapping[str, AnyNetwork],
    tokenizers: Mapping[str, Tokenizer],
    schedules: Mapping[str, NoiseSchedule],
    dtype: torch.dtype | None,
) -> None:
    """Write components of a model, by their names, into its folder; see `save_pipeline`."""
    for component, network in networks.items():
        write_model(network, place / component, dtype)
    for component, tokenizer in tokenizers.items():
        tokenizer.save(place / component)
    for component, schedule in schedules.items():
        (place / component).mkdir()
        write_json(place / component / "scheduler_config.json", schedule.to_dict())


def pipeline_index(
    components: Components,
) -> tuple[dict[str, Any], dict[str, AnyNetwork], dict[str, Tokenizer], dict[str, NoiseSchedule]]:
    """Return the content of a model_index.json, and by their names in it the networks, tokenizers and schedules.

    Raises:
        InputError: there is no U-Net.
    """
    large = components.unet.config.expects_sizes  # Stable Diffusion XL
    alone = large and components.text_encoder_2 is None  # its refiner
    networks: dict[str, AnyNetwork] = {"unet": components.unet, "vae": components.autoencoder}
    networks["text_encoder_2" if alone else "text_encoder"] = components.text_encoder
    tokenizers: dict[str, Tokenizer] = {}
    if components.tokenizer is not None:
        tokenizers["tokenizer_2" if alone else "tokenizer"] = components.tokenizer
    if components.text_encoder_2 is not None and components.tokenizer_2 is not None:
        networks["text_encoder_2"], tokenizers["tokenizer_2"] = components.text_encoder_2, components.tokenizer_2
    classes = {component: _class_name(network) for component, network in networks.items()}
    for component in tokenizers:
        classes[component] = TOKENIZER_CLASS[classes[component.replace("tokenizer", "text_encoder")]]
    schedules = {"scheduler": components.schedule}
    if components.low_res_schedule is not None:
        schedules["low_res_scheduler"] = components.low_res_schedule
    classes |= {component: schedule.to_dict()["_class_name"] for component, schedule in schedules.items()}
    index: dict[str, Any] = {
        component: ["latentdiff" if name in OWN_CLASSES else LIBRARIES[component.removesuffix("_2")], name]
        for component, name in sorted(classes.items())
    }
    kind = _pipeline_class(components, alone)
    options: dict[str, Any] = {"_diffusers_version": DIFFUSERS_VERSION}
    absent = (
        () if kind == "LatentdiffPipeline" else ("feature_extractor", "image_encoder" if large else "safety_checker")
    )
    options |= {name: [None, None] for name in (*absent, *(("text_encoder", "tokenizer") if alone else ()))}
    if large:
        options |= {"force_zeros_for_empty_prompt": components.force_zeros}
        options |= {"requires_aesthetics_score": True} if alone else {}
    elif absent and not components.upscales:
        options["requires_safety_checker"] = False
    return {"_class_name": kind, **options, **index}, networks, tokenizers, schedules


def _pipeline_class(components: Components, alone: bool) -> str:
    """Return the class of diffusers that runs a model, or the name under which only we do."""
    if isinstance(components.autoencoder, PixelSpace) or isinstance(components.text_encoder, LabelEncoder):
        return "LatentdiffPipeline"
    size = "XL" if components.unet.config.expects_sizes else ""
    if components.upscales:
        return "StableDiffusionUpscalePipeline"
    task = "Inpaint" if components.inpaints else ""
    return f"StableDiffusion{size}{'Img2Img' if alone else task}Pipeline"


def _class_name(network: AnyNetwork) -> str:
    """Return the class of the reference, which for text encoders with a projection is another than ours."""
    named: list[str] = network.config.header().get("architectures", [])
    return named[0] if named else type(network).__name__


def write_model(model: AnyNetwork, place: Path, dtype: torch.dtype | None) -> None:
    """Write config.json and the weights of one network into a folder."""
    kind = KINDS[type(model).__name__]
    weights = stored_weights(model.state_dict(), dtype)
    place.mkdir(parents=True, exist_ok=True)
    save_tensors(weights, place / f"{kind.stem}.safetensors")
    more: dict[str, Any] = {}
    if kind.config.ignored is None and any(tensor.dtype != torch.float32 for tensor in weights.values()):
        # Of transformers, which would compute in the precision of the file, while diffusers computes in float32.
        more[COMPUTED_IN] = "float32"
    write_json(place / "config.json", {**more, **model.config.to_dict()})
