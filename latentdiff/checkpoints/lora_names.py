"""Translate layer names between LoRA dialects: diffusers and PEFT, kohya, web UI.

    diffusers, PEFT   unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight
    kohya             lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight
                      lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q.lora_down.weight
    webui             diffusion_model_input_blocks_1_1_transformer_blocks_0_attn1_to_q.lora_down.weight

An underscore may stand for a dot or for itself. So names are never taken apart: every name that a layer of the model
can have is made beforehand, with underscores for dots, and looked up.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from latentdiff.checkpoints.components import AnyNetwork, Components
from latentdiff.checkpoints.compvis_keys import UNET_ENDS, open_clip_keys, unet_keys
from latentdiff.checkpoints.family import text_layouts
from latentdiff.models.clip import CLIPTextModel
from latentdiff.models.lora import layers_of
from latentdiff.models.unet import UNet2DConditionModel

__all__ = ["DIALECTS", "Key", "dialect_of", "known_names", "network_of", "networks_of", "parse_key", "written_names"]

DIALECTS = ("diffusers", "kohya", "webui")
KEY = re.compile(
    r"(?P<layer>.+?)(?:"
    r"\.lora_(?P<new>A|B|down|up|mid)(?:\.[^.]+)?\.weight"  # PEFT may put the adapter's name before the last word
    r"|(?:_lora|\.lora|\.lora_linear_layer)\.(?P<old>down|up)\.weight"
    r"|\.(?P<alpha>alpha))"
)
HALVES = {"A": "down", "B": "up"}
# Names of layers in files that diffusers wrote before 2023-06, by the end of what they are called here.
OLD_ENDS = {"to_out.0": "to_out", "q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}
WEBUI_STARTS = ("model", "diffusion_model", "cond_stage_model", "conditioner", "transformer", "0", "1")

Layers = tuple[tuple[str, str], ...]
"""Networks and names of layers; several where they are one layer there, whose rows are theirs one below the other."""


class Key(NamedTuple):
    """A name in a LoRA file: what it calls its layer, with underscores for dots, and "down", "up", "mid" or "alpha"."""

    layer: str
    half: str


def parse_key(name: str) -> Key | None:
    """Return the components of a name in a LoRA file, None if it is none."""
    found = KEY.fullmatch(name)
    if found is None:
        return None
    layer = found["layer"].replace("base_model.model.", "").replace(".processor.", ".")
    half = found["new"] or found["old"] or found["alpha"]
    return Key(layer.replace(".", "_"), HALVES.get(half, half))


def dialect_of(layer: str) -> str:
    """Return in which of `DIALECTS` a layer is named, given `Key.layer`."""
    if layer.startswith(("lora_unet_", "lora_te")):
        return "kohya"
    return "webui" if re.match(rf"({'|'.join(WEBUI_STARTS)})_", layer) else "diffusers"


def network_of(layer: str) -> str:
    """Return in which network a layer is, by its name alone, given `Key.layer`."""
    if re.match("lora_te2|text_encoder_2|(text_encoders_)?clip_g|1_|conditioner_embedders_1", layer):
        return "text_encoder_2"
    text = "lora_te|text_encoder|clip_[lh]_|text_model|cond_stage_model|conditioner|0_|transformer_|model_transformer"
    return "text_encoder" if re.match(text, layer) else "unet"


def networks_of(components: Components) -> dict[str, AnyNetwork]:
    """Return the networks of a model that LoRAs change, as files call them: the refiner's text encoder is a second."""
    if components.text_encoder_2 is not None:
        return {
            "unet": components.unet,
            "text_encoder": components.text_encoder,
            "text_encoder_2": components.text_encoder_2,
        }
    refiner = components.unet.config.expects_sizes
    return {"unet": components.unet, "text_encoder_2" if refiner else "text_encoder": components.text_encoder}


def known_names(components: Components) -> dict[str, Layers]:
    """Return every name that a layer of the model can have in a file, with underscores for dots."""
    names: dict[str, list[tuple[str, str]]] = {}

    def add(prefixes: tuple[str, ...], network: str, found: Mapping[str, str]) -> None:
        for ours, theirs in found.items():
            for prefix in prefixes:
                names.setdefault(f"{prefix}{theirs}".replace(".", "_"), []).append((network, ours))

    for network, model in networks_of(components).items():
        own = {name: name for name in layers_of(model)}
        # A file of one network may have no prefix; of two text encoders it is the first then.
        plain = (f"{network}.",) if model is components.text_encoder_2 else (f"{network}.", "")
        add(plain, network, own)
        for end, old in OLD_ENDS.items():
            add(plain, network, {name: name.removesuffix(end) + old for name in own if name.endswith(f".{end}")})
        if network == "unet":
            add(("lora_unet.",), network, own)
            add(("model.diffusion_model.", "diffusion_model.", "lora_unet."), network, _compvis_names(components.unet))
        else:
            add(_kohya_texts(components, network), network, own)
            add(_comfy_texts(components, network), network, own)
            # As transformers has called them since its release 5.
            add(plain, network, {name: name.removeprefix("text_model.") for name in own})
    for network, prefix, found in _texts(components):
        add((prefix, _short(prefix)), network, found)
        heads = {ours: theirs for ours, theirs in _heads(found).items() if theirs != found[ours]}
        add((prefix, _short(prefix)), network, heads)
    return {name: tuple(dict.fromkeys(layers)) for name, layers in names.items()}


def written_names(components: Components, dialect: str) -> dict[tuple[str, str], str]:
    """Return what each layer is called in a file of a dialect, before the point."""
    names = {}
    for network, model in networks_of(components).items():
        start = "lora_unet" if network == "unet" else _kohya_text(components, network)
        for name in layers_of(model):
            plain = f"{network}.{name}" if dialect == "diffusers" else f"{start}.{name}".replace(".", "_")
            names[network, name] = plain
    if dialect == "webui":
        for name, theirs in _compvis_names(components.unet).items():
            names["unet", name] = f"diffusion_model.{theirs}".replace(".", "_")
        for network, prefix, found in _texts(components):
            for name, theirs in _heads(found).items():
                names[network, name] = f"{_short(prefix)}{theirs}".replace(".", "_")
    return names


def _kohya_texts(components: Components, network: str) -> tuple[str, ...]:
    """Return the starts of names of a text encoder's layers; some programs count even where there is one."""
    usual = f"{_kohya_text(components, network)}."
    return (usual, "lora_te1.") if usual == "lora_te." else (usual,)


def _comfy_texts(components: Components, network: str) -> tuple[str, ...]:
    """Return the same for files of ComfyUI."""
    if network == "text_encoder_2":
        name = "clip_g"
    else:
        name = "clip_h" if getattr(components.text_encoder.config, "hidden_act", "") == "gelu" else "clip_l"
    return (f"text_encoders.{name}.transformer.", f"{name}.transformer.")


def _kohya_text(components: Components, network: str) -> str:
    if network == "text_encoder_2":
        return "lora_te2"
    return "lora_te" if components.text_encoder_2 is None else "lora_te1"


def _compvis_names(unet: UNet2DConditionModel) -> dict[str, str]:
    """Return what the layers of a U-Net are called in the original layout, where they have a place in it."""
    if not isinstance(unet.config.layers_per_block, int):
        return {}
    own = [name for name in layers_of(unet) if name in UNET_ENDS or "_block" in name]
    key_map = unet_keys([f"{name}.weight" for name in own], unet.config)
    return {name: key_map[f"{name}.weight"].name.removesuffix(".weight") for name in own}


def _texts(components: Components) -> list[tuple[str, str, dict[str, str]]]:
    """Return network, prefix and names of layers of each text encoder in the original layout; none for others."""
    if not isinstance(components.text_encoder, CLIPTextModel):
        return []
    texts = []
    encoders = [item for item in networks_of(components).items() if item[0] != "unet"]
    for (network, model), (layout, prefix) in zip(encoders, text_layouts(components)):
        own = {name: name for name in layers_of(model)}
        if layout == "open_clip":
            key_map = open_clip_keys([f"{name}.weight" for name in own if name != "text_projection"])
            own = {name.removesuffix(".weight"): re.sub("[._]weight$", "", p.name) for name, p in key_map.items()}
        texts.append((network, prefix, own))
    return texts


def _heads(found: Mapping[str, str]) -> dict[str, str]:
    """Return the same with queries, keys and values apart, which lie in one tensor there."""
    return {ours: theirs.replace("attn.in_proj", f"attn.{ours[-6:]}") for ours, theirs in found.items()}


def _short(prefix: str) -> str:
    return re.sub(r"^(cond_stage_model|conditioner\.embedders)\.", "", prefix)
