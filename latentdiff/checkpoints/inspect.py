"""Describe a model folder or weight file from its JSON and headers alone; no weight is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from math import prod
from pathlib import Path
from typing import Any

import torch

from latentdiff.checkpoints.claims import Claims
from latentdiff.checkpoints.family import FAMILIES, UNET, VAE
from latentdiff.checkpoints.folder import (
    NETWORKS,
    as_diffusers_reads,
    child,
    read_json,
    read_layout,
    reading,
    tokenizer_files,
    weight_files,
)
from latentdiff.checkpoints.hashes import model_hash
from latentdiff.checkpoints.header import DTYPE_BYTES, Header, TensorInfo, read_header
from latentdiff.checkpoints.lora import PEFT_METADATA, describe_lora
from latentdiff.checkpoints.single_file import fit, recognise
from latentdiff.diffusion.schedule import NoiseSchedule

__all__ = ["describe_file", "describe_folder"]

NAMED_UNUSED = 20  # tensors


def describe_folder(root: Path) -> dict[str, Any]:
    """Return what a model folder in diffusers' layout is, as JSON-ready values.

    Raises:
        ModelLoadError: it is none, or a file in it was refused.
    """
    with reading(root):
        return _describe_folder(root)


def _describe_folder(root: Path) -> dict[str, Any]:
    layout = read_layout(root)
    classes, homes, base = layout.classes, layout.homes, layout.base
    components, tensors = {}, []
    for component in NETWORKS:
        if component not in classes:
            continue
        changes = layout.difference if component == "unet" else None
        files = [changes] if changes else weight_files(homes[component], component)
        found = [info for file in files for info in read_header(file).tensors.values()]
        components[component] = {"class": classes[component], **_count(found)}
        if base is not None and (changes or homes[component] == base):
            components[component]["difference from" if changes else "of"] = base.name
        tensors += found
    unet = as_diffusers_reads(read_json(child(homes["unet"], "unet", "config.json")))
    vae = read_json(child(homes["vae"], "vae", "config.json"))
    schedule = NoiseSchedule.from_dict(read_json(child(homes["scheduler"], "scheduler", "scheduler_config.json")))
    for component in ("tokenizer", "tokenizer_2"):
        tokenizer_files(homes.get(component, root), component)
    return {
        "kind": "model folder" if base is None else f"variant of the model {base.name} beside it",
        "family": _family(classes.get("text_encoder", ""), unet.get("cross_attention_dim")),
        "prediction_type": schedule.prediction_type,
        "beta_schedule": schedule.beta_schedule,
        "image_size": _image_size(unet, vae),
        **_count(tensors),
        "model_hash": model_hash(root),
        "components": components,
    }


def describe_file(path: Path) -> dict[str, Any]:
    """Return what a safetensors file holds, as JSON-ready values.

    Raises:
        ModelLoadError: the file was refused.
    """
    header = read_header(path)
    counted = {"tensors": len(header.tensors), **_count(header.tensors.values())}
    if any(name.startswith(UNET) for name in header.tensors):
        return _describe_single_file(path, header, counted)
    alone = any(name.endswith("decoder.conv_in.weight") for name in header.tensors)
    kind = describe_lora(path, header) or {"kind": "VAE" if alone else "safetensors file"}
    metadata = {name: text for name, text in header.metadata.items() if name != PEFT_METADATA}  # a name a layer
    return {**kind, **counted, "metadata": metadata}


def _describe_single_file(path: Path, header: Header, counted: dict[str, Any]) -> dict[str, Any]:
    """Return what a whole model in one file of the original layout is, and which tensors no part of it needs."""
    tensors = header.tensors
    family, schedule, sections, claims = recognise(path, header)
    used: set[str] = set()
    components, configs = {}, {section.component: section.config for section in sections}
    for section in sections:
        if section.component == "vae" and not any(name.startswith(VAE) for name in tensors):
            continue  # which is to be given besides
        _, key_map = fit(path, tensors, section, torch.float32)
        own = {source.name for source in key_map.values()}
        components[section.component] = {"class": section.class_name, **_count(tensors[name] for name in own)}
        used |= own
    unused = [name for name in tensors if name not in used]
    return {
        "kind": "single file of the original layout",
        "family": family + (" (inpainting)" if configs["unet"]["in_channels"] == 9 else ""),
        "assumed": f"{_assumed(claims)} are those of the family; the file does not say",
        **({"notes": list(claims.all_notes(schedule))} if claims.all_notes(schedule) else {}),
        "prediction_type": schedule.prediction_type,
        "beta_schedule": schedule.beta_schedule,
        "image_size": _image_size(configs["unet"], configs["vae"]),
        **counted,
        "model_hash": model_hash(path),
        "components": components,
        "unused": {"tensors": len(unused), "first": unused[:NAMED_UNUSED]},
    }


def _assumed(claims: Claims) -> str:
    if not claims.say_prediction:
        return "configuration, schedule and prediction type"
    return "configuration and schedule"


def _family(text_class: str, width: object) -> str:
    if text_class in ("BertModel", "LabelEncoder"):
        return "latentdiff"
    return FAMILIES.get(width if isinstance(width, int) else 0, "Stable Diffusion layout")


def _image_size(unet: dict[str, Any], vae: dict[str, Any]) -> int | None:
    side, blocks = unet.get("sample_size"), vae.get("block_out_channels", [1])  # none in a pixel space
    return side * 2 ** (len(blocks) - 1) if isinstance(side, int) and isinstance(blocks, list) else None


def _count(tensors: Iterable[TensorInfo]) -> dict[str, Any]:
    """Return parameters, bytes and the precision that holds most of them."""
    numbers: Counter[str] = Counter()
    for tensor in tensors:
        numbers[tensor.dtype] += prod(tensor.shape)
    size = sum(count * DTYPE_BYTES[dtype] for dtype, count in numbers.items())
    return {"precision": numbers.most_common(1)[0][0], "parameters": sum(numbers.values()), "bytes": size}
