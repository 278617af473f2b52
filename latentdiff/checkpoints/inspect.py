"""Say what a model folder or weight file is, from its JSON and headers alone; no weight is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from math import prod
from pathlib import Path
from typing import Any

from latentdiff.checkpoints.folder import (
    NETWORKS,
    child,
    model_hash,
    read_index,
    read_json,
    tokenizer_files,
    weight_files,
)
from latentdiff.checkpoints.header import DTYPE_BYTES, TensorInfo, read_header
from latentdiff.diffusion.schedule import NoiseSchedule

__all__ = ["describe_file", "describe_folder"]

FAMILIES = {  # by width of the context
    768: "Stable Diffusion 1.x",
    1024: "Stable Diffusion 2.x",
    1280: "Stable Diffusion XL refiner",
    2048: "Stable Diffusion XL",
}


def describe_folder(root: Path) -> dict[str, Any]:
    """Return what a model folder in diffusers' layout is, as JSON-ready values.

    Raises:
        ModelLoadError: it is none, or a file in it was refused.
    """
    classes = read_index(root)
    parts, tensors = {}, []
    for component in NETWORKS:
        if component not in classes:
            continue
        found = [info for file in weight_files(root, component) for info in read_header(file).tensors.values()]
        parts[component] = {"class": classes[component], **_count(found)}
        tensors += found
    unet = read_json(child(root, "unet", "config.json"))
    vae = read_json(child(root, "vae", "config.json"))
    schedule = NoiseSchedule.from_dict(read_json(child(root, "scheduler", "scheduler_config.json")))
    for component in ("tokenizer", "tokenizer_2"):
        tokenizer_files(root, component)
    return {
        "kind": "model folder",
        "family": _family(classes.get("text_encoder", ""), unet.get("cross_attention_dim")),
        "prediction_type": schedule.prediction_type,
        "beta_schedule": schedule.beta_schedule,
        "image_size": _image_size(unet, vae),
        **_count(tensors),
        "model_hash": model_hash(root),
        "components": parts,
    }


def describe_file(path: Path) -> dict[str, Any]:
    """Return what a safetensors file holds, as JSON-ready values.

    Raises:
        ModelLoadError: the file was refused.
    """
    header = read_header(path)
    counted = _count(header.tensors.values())
    return {"kind": "safetensors file", "tensors": len(header.tensors), **counted, "metadata": header.metadata}


def _family(text_class: str, width: Any) -> str:
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
