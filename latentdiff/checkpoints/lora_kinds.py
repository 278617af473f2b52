"""Recognise files given as LoRAs that are something else: other parametrisations, other families, no LoRA at all."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from latentdiff.checkpoints.family import FAMILIES, UNET
from latentdiff.checkpoints.header import Header, TensorInfo
from latentdiff.checkpoints.lora_names import parse_key

__all__ = ["BUNDLE", "bundled_words", "family_of_lora", "other_methods", "remedy_for"]

# Other ways to change weights that are called LoRA too, each by what is in the names of its tensors.
OTHER_METHODS = {
    "DoRA": r"\.(dora_scale|lora_magnitude_vector)",
    "LoHa": r"\.hada_",
    "LoKr": r"\.lokr_",
    "OFT": r"\.oft_",
    "GLoRA": r"\.(a1|a2|b1|b2)\.weight$",
    "(IA)^3": r"\.on_input$",
    "whole differences": r"\.diff(_b)?$",
    "LoRA with biases": r"\.lora_B(\.[^.]+)?\.bias$",
    "LyCORIS with learned scales": r"\.scalar$",
    "changes of norms": r"\.(w|b)_norm$",
}
# What files are that have no LoRA in them, by the names of their tensors, and what to do with them.
NO_LORAS = {
    "it holds learned words; pass it as an embedding": r"emb_params|clip_[lg]|string_to_param.*|<[^<>]+>",
    "it is a whole model; pass it as the model": re.escape(UNET) + r"(in|out)put_blocks\..*|conditioner\..*\.weight",
    "it is a VAE; pass it as the VAE": r"(first_stage_model\.)?(de|en)coder\.conv_in\.weight",
    "it is a ControlNet, which is not supported": r"control(_model|net).*",
}
# Families of models that are not supported, by names that only their layers have.
OTHER_FAMILIES = {
    "Flux": r"(double|single)_(transformer_)?blocks_",
    "Stable Diffusion 3": r"joint_blocks_|context_block_|^(lora_)?transformer_transformer_blocks_\d+_attn_add_",
}
# Beginnings of names of base models, as sd-scripts and ModelSpec have them.
BASES = {
    r"sdxl.*refiner|stable-diffusion-xl.*refiner": "Stable Diffusion XL refiner",
    r"sdxl|stable-diffusion-xl": "Stable Diffusion XL",
    r"sd_?v?2|stable-diffusion-v2": "Stable Diffusion 2.x",
    r"sd_?v?1|stable-diffusion-v1": "Stable Diffusion 1.x",
    r"sd_?v?3|stable-diffusion-3": "Stable Diffusion 3",
    r"flux": "Flux",
}
BUNDLE = re.compile(r"bundle_emb\.(?P<word>.+)\.(?P<kind>string_to_param\.\*|emb_params|clip_l|clip_g)")


def other_methods(header: Header) -> dict[str, str]:
    """Return which other methods are in a file, each with the name of a tensor."""
    found = {
        method: [name for name in header.tensors if re.search(mark, name)] for method, mark in OTHER_METHODS.items()
    }
    return {method: names[0] for method, names in found.items() if names}


def bundled_words(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Return the learned words in a LoRA file, each with its tensors by what a file of an embedding calls them."""
    words: dict[str, dict[str, str]] = {}
    for name in names:
        found = BUNDLE.fullmatch(name)
        if found is not None:
            kind = found["kind"].replace("string_to_param.*", "emb_params")
            words.setdefault(found["word"], {})[kind] = name
    return words


def family_of_lora(header: Header) -> str | None:
    """Return the family of models that a LoRA is for, by its shapes, names or metadata; None where none says."""
    return _by_shapes(header.tensors) or _by_names(header.tensors) or _by_metadata(header.metadata)


def remedy_for(header: Header) -> str:
    """Return what to do with a file whose tensors do not fit a model, as the end of a message."""
    tensors = header.tensors
    if not any(parse_key(name) for name in tensors):
        for remedy, mark in NO_LORAS.items():
            if any(re.fullmatch(mark, name) for name in tensors):
                return remedy
        if len(tensors) == 1:
            return "it may hold a learned word; pass it as an embedding"
    by_shapes = _by_shapes(tensors)
    if by_shapes is not None:
        return f"by its shapes it is for {by_shapes}"
    by_names = _by_names(tensors)
    if by_names is not None:
        return f"by its names it is for {by_names}"
    by_metadata = _by_metadata(header.metadata)
    return f"its metadata say that it is for {by_metadata}" if by_metadata else "use it with the model it was made for"


def _by_shapes(tensors: Mapping[str, TensorInfo]) -> str | None:
    """Return the family whose context is as wide as that of a LoRA's layers."""
    for name, info in tensors.items():
        key = parse_key(name)
        if key and key.half == "down" and key.layer.endswith(("attn2_to_k", "attn2_to_v")) and len(info.shape) > 1:
            return FAMILIES.get(info.shape[1])
    return None


def _by_names(tensors: Mapping[str, TensorInfo]) -> str | None:
    layers = [key.layer for name in tensors if (key := parse_key(name))]
    for family, mark in OTHER_FAMILIES.items():
        if any(re.search(mark, layer) for layer in layers):
            return family
    return (
        "Stable Diffusion XL" if any(layer.startswith(("lora_te2_", "text_encoder_2_")) for layer in layers) else None
    )


def _by_metadata(metadata: Mapping[str, str]) -> str | None:
    for entry in ("ss_base_model_version", "modelspec.architecture"):
        for start, family in BASES.items():
            if re.match(start, metadata.get(entry, "").lower()):
                return family
    return None
