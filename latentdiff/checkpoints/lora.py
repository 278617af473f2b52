"""LoRA files: read in every dialect in use, put into a model and taken out, written for other tools."""

from __future__ import annotations

import json
import math
import os
import reprlib
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from hashlib import sha256
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentdiff.checkpoints.claims import lora_metadata_of
from latentdiff.checkpoints.components import Components
from latentdiff.checkpoints.family import family_of
from latentdiff.checkpoints.folder import read_json
from latentdiff.checkpoints.generation_config import METADATA, defaults_in
from latentdiff.checkpoints.hashes import model_hash
from latentdiff.checkpoints.header import Header, TensorInfo, read_header
from latentdiff.checkpoints.lora_kinds import BUNDLE, bundled_words, family_of_lora, other_methods, remedy_for
from latentdiff.checkpoints.lora_names import (
    DIALECTS,
    Layers,
    dialect_of,
    known_names,
    network_of,
    networks_of,
    parse_key,
    written_names,
)
from latentdiff.checkpoints.storage import save_tensors
from latentdiff.checkpoints.weights import FLOATS, NUMBERS, read_weights, stored_weights
from latentdiff.errors import InputError, ModelConfigError, ModelMismatchError, suggest
from latentdiff.files import check_writable, require_path
from latentdiff.lora_tags import Weight
from latentdiff.models.clip import CLIPTextModel
from latentdiff.models.lora import Factors, LoRA, WeightedLoRA, factors_fit, layers_of, merge, share_weights

__all__ = ["apply_loras", "describe_lora", "load_lora", "save_lora"]

NETWORKS = ("unet", "text_encoder", "text_encoder_2")
NAMED = 5  # layers in an error
POSITIONS = "position_ids"  # the end of the name of a table of whole numbers, which some files carry along
PEFT_METADATA = "lora_adapter_metadata"  # where diffusers puts PEFT's configuration of each network, as JSON
PEFT_CONFIG = "adapter_config.json"  # where PEFT itself puts it, beside the file


def load_lora(path: str | os.PathLike[str], components: Components) -> LoRA:
    """Read a LoRA file.

    Args:
        path: a safetensors file in one of `lora_names.DIALECTS`, or in several at once.
        components: of the model it is for.

    Raises:
        ModelMismatchError: it has a layer that the model has not, or of another shape, or half of one.
        ModelLoadError: the file was refused; the subclass says why.
    """
    file = require_path(path, "a LoRA")
    header = read_header(file)
    for method, name in other_methods(header).items():
        raise ModelConfigError(f"{file}: expected LoRA, got {method} ({name[:100]}); use a LoRA or LoCon file")
    found = _layers_in(file, header, components)
    tensors = read_weights(file, {name: header.tensors[name] for halves in found.values() for name in halves.values()})
    _warn_of_words(file, header, components)
    settings, files = _peft_settings(file, header)
    models = {network: layers_of(model) for network, model in networks_of(components).items()}
    networks: dict[str, dict[str, Factors]] = {}
    for layers, halves in found.items():
        down, up = tensors[halves["down"]], tensors[halves["up"]]
        mid = tensors[halves["mid"]] if "mid" in halves else None
        for (network, layer), rows in zip(layers, up.chunk(len(layers))):
            alpha = _alpha(file, settings, network, layer, len(down))
            if "alpha" in halves:
                alpha = float(tensors[halves["alpha"]])
            shape = models[network][layer].weight.shape
            kernel, ones = shape[2:], (1,) * len(shape[2:])
            factors = Factors(
                down.reshape(len(down), -1, *(kernel if mid is None else ones)),
                rows.reshape(len(rows), -1, *ones),
                alpha,
                mid,
            )
            networks.setdefault(network, {})[layer] = factors
    digest = "".join(map(model_hash, files))
    whole = digest if len(files) == 1 else sha256(digest.encode()).hexdigest()
    return LoRA(networks, os.fspath(path), whole, defaults_in(file, header.metadata))


def _warn_of_words(file: Path, header: Header, components: Components) -> None:
    """Warn of learned words in a file that the model does not know yet."""
    tokenizer = components.tokenizer
    words = [word for word in bundled_words(header.tensors) if tokenizer is None or not tokenizer.knows(word)]
    if words:
        shown = ", ".join(word[:40] for word in words[:NAMED])
        warnings.warn(
            f"{file.name} holds learned words besides ({shown}), which prompts do not know yet; add them as embeddings "
            f"of the same file, such as {file.name}:{words[0][:40]}",
            stacklevel=5,
        )


def _layers_in(file: Path, header: Header, components: Components) -> dict[Layers, dict[str, str]]:
    """Return the layers of the model that a file has, each with the names of its halves there.

    Raises:
        ModelMismatchError: something in the file does not fit the model.
    """
    known, wrong, tensors = known_names(components), list[str](), header.tensors
    found: dict[Layers, dict[str, str]] = {}
    for name in tensors:
        if BUNDLE.fullmatch(name) or name.endswith(POSITIONS):
            continue
        key = parse_key(name)
        layers = None if key is None else known.get(key.layer)
        if key is None or layers is None:
            wrong.append(f"{name[:100]} is no layer of this model")
        elif found.setdefault(layers, {}).setdefault(key.half, name) != name:
            wrong.append(f"{name[:100]} is the same as {found[layers][key.half][:100]}")
    wrong += _misfits(found, tensors, components)
    if not found and not wrong:
        wrong.append(f"there is no layer among its {len(tensors)} tensors")
    if wrong:
        more = f" and {len(wrong) - NAMED} more" if len(wrong) > NAMED else ""
        raise ModelMismatchError(f"{file}: {'; '.join(wrong[:NAMED])}{more}; {remedy_for(header)}")
    return found


def _misfits(
    found: Mapping[Layers, Mapping[str, str]], tensors: Mapping[str, TensorInfo], components: Components
) -> list[str]:
    """Return what is wrong with layers that a model has, and a file has changes for."""
    wrong = list[str]()
    counts = Counter(layer for layers in found for layer in layers)
    wrong += [f"{layer} of {network} is there twice" for (network, layer), count in counts.items() if count > 1]
    models = {network: layers_of(model) for network, model in networks_of(components).items()}
    for layers, halves in found.items():
        missing = [half for half in ("down", "up") if half not in halves]
        if missing:
            wrong.append(f"{next(iter(halves.values()))[:100]} has no {' and no '.join(missing)} beside it")
            continue
        rows, *rest = models[layers[0][0]][layers[0][1]].weight.shape
        weight = (rows * len(layers), *rest)
        down, up = tensors[halves["down"]], tensors[halves["up"]]
        mid = tensors[halves["mid"]] if "mid" in halves else None
        if not all(info.dtype in FLOATS for info in (down, up, mid) if info is not None):
            wrong.append(f"{halves['down']} is of {down.dtype} and {up.dtype}, not of {', '.join(FLOATS)}")
        elif not factors_fit(weight, down.shape, up.shape, None if mid is None else mid.shape):
            wrong.append(f"{halves['down']} {list(down.shape)} and {list(up.shape)} make no change of {list(weight)}")
        alpha = tensors[halves["alpha"]] if "alpha" in halves else None
        if alpha is not None and (prod(alpha.shape) != 1 or alpha.dtype not in NUMBERS):
            wrong.append(f"{halves['alpha']} is {alpha.dtype} {list(alpha.shape)} instead of one number")
    return wrong


def _peft_settings(file: Path, header: Header) -> tuple[dict[str, Any], list[Path]]:
    """Return PEFT's configuration, its keys below those of the networks, and the files that all was read from."""
    beside = file.with_name(PEFT_CONFIG)
    if PEFT_METADATA in header.metadata:
        try:
            settings = json.loads(header.metadata[PEFT_METADATA])
        except (ValueError, RecursionError) as error:
            raise ModelConfigError(f"{file}: its {PEFT_METADATA} is no JSON; save it again") from error
        return settings if isinstance(settings, dict) else {}, [file]
    if not any("base_model.model." in name for name in header.tensors) or not beside.exists():
        return {}, [file]
    config = read_json(beside)
    return {f"{network}.{key}": config[key] for network in NETWORKS for key in config}, [file, beside]


def _alpha(file: Path, settings: Mapping[str, Any], network: str, layer: str, rank: int) -> float:
    """Return the alpha of a layer for which the file has none of its own: what PEFT was told, or the rank."""
    alpha, patterns = settings.get(f"{network}.lora_alpha", rank), settings.get(f"{network}.alpha_pattern")
    for pattern, value in (patterns if isinstance(patterns, dict) else {}).items():
        if f".{layer}".endswith(f".{pattern.removeprefix('^')}"):
            alpha = value
            break
    number = _finite(alpha)
    if number is None:
        raise ModelConfigError(f"{file}: lora_alpha of {layer} must be a finite number, got {reprlib.repr(alpha)}")
    return number * math.sqrt(rank) if settings.get(f"{network}.use_rslora") is True else number


def _finite(value: object) -> float | None:
    """Return a number as a float; None for whatever is no finite number, or too large for one."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def apply_loras(components: Components, loras: Mapping[Any, Weight]) -> Components:
    """Return components with these LoRAs in their weights instead of those they have; the given ones stay as they are.

    They share every weight that no LoRA changes. Without any they are those of before, bit for bit.

    Args:
        components: with LoRAs or without; the result is on their device and in their dtype.
        loras: files, or what `load_lora` made of them, each with its weight.

    Raises:
        InputError: a weight is no finite number.
        ModelLoadError: a file was refused, or does not fit the model.
    """
    if not isinstance(loras, Mapping):
        raise InputError(
            f'LoRAs must be files with their weights, got {reprlib.repr(loras)}; try {{"a.safetensors": 1}}'
        )
    base = components if components.base is None else components.base
    applied = tuple(
        WeightedLoRA(given if isinstance(given, LoRA) else load_lora(given, base), *_weights(weight))
        for given, weight in loras.items()
    )
    merged: dict[str, Any] = {}
    for name, network in networks_of(base).items():
        changes = [(one.lora.networks.get(name, {}), one.unet if name == "unet" else one.text) for one in applied]
        like = next(networks_of(components)[name].parameters())
        merged[name] = merge(network, changes).to(like.device, like.dtype)
    if base is components:  # what is kept must not move when `components` do
        base = _with_networks(base, {name: share_weights(network) for name, network in networks_of(base).items()})
    defaults = dict(base.defaults)
    for one in applied:
        defaults |= one.lora.defaults if one.unet else {}
    changed = _with_networks(components, merged)
    return replace(changed, loras=applied, base=base if applied else None, defaults=defaults)


def _with_networks(components: Components, networks: Mapping[str, Any]) -> Components:
    unet, *encoders = networks.values()
    return replace(
        components, unet=unet, text_encoder=encoders[0], text_encoder_2=encoders[1] if encoders[1:] else None
    )


def _weights(weight: object) -> tuple[float, float]:
    pair = weight if isinstance(weight, (tuple, list)) else (weight, weight)
    numbers = [number for one in pair if (number := _finite(one)) is not None]
    if len(pair) != 2 or len(numbers) != 2:
        raise InputError(
            "the weight of a LoRA must be a finite number, or two (U-Net, text encoders), got "
            f"{reprlib.repr(weight)}; try 0.8"
        )
    return numbers[0], numbers[1]


def save_lora(lora: LoRA, path: str | os.PathLike[str], components: Components, dialect: str = "diffusers") -> None:
    """Write a LoRA file, which appears under its name only when it is whole.

    Args:
        lora: for the model of `components`.
        path: ending in .safetensors.
        components: of the model.
        dialect: one of `lora_names.DIALECTS`; diffusers loads the first two.

    Raises:
        InputError: an unknown dialect, one that has no name for the form of a layer, or a path with another ending.
        ModelValueError: a factor is not finite.
        StorageError: the file cannot be written.
    """
    target = require_path(path, "a LoRA")
    if dialect not in DIALECTS:
        raise InputError(f"dialect {dialect!r} is unknown{suggest(dialect, DIALECTS)}")
    if target.suffix != ".safetensors":
        raise InputError(f"a LoRA file must end in .safetensors, got {target.name!r}")
    check_writable(target)
    peft = dialect == "diffusers"
    names, tensors = written_names(components, dialect), dict[str, Tensor]()
    for network, layers in lora.networks.items():
        for layer, factors in layers.items():
            name = names[network, layer]
            tensors[f"{name}.{'lora_A' if peft else 'lora_down'}.weight"] = factors.down
            tensors[f"{name}.{'lora_B' if peft else 'lora_up'}.weight"] = factors.up
            if factors.mid is not None and peft:
                raise InputError(f"{layer} is in Tucker form, which diffusers cannot read; save in the dialect kohya")
            if factors.mid is not None:
                tensors[f"{name}.lora_mid.weight"] = factors.mid
            if not peft:
                tensors[f"{name}.alpha"] = torch.tensor(factors.alpha)
    tensors = {name: tensor.clone() for name, tensor in stored_weights(tensors, None).items()}
    settings: dict[str, Any] = {}
    for network, layers in lora.networks.items():
        settings |= {f"{network}.{key}": value for key, value in _peft_config(layers).items()}
    metadata = {PEFT_METADATA: json.dumps(settings)} if peft else None
    if not peft and isinstance(components.text_encoder, CLIPTextModel):
        metadata = lora_metadata_of(family_of(components), components.schedule)
    if lora.defaults:
        metadata = {**(metadata or {"format": "pt"}), METADATA: json.dumps(dict(lora.defaults))}
    save_tensors(tensors, target, metadata)


def _peft_config(layers: Mapping[str, Factors]) -> dict[str, Any]:
    """Return the arguments of PEFT's LoraConfig, which matches layers by the ends of their names."""
    # transformers has dropped this start of names; without it they match before and after.
    found = {name.removeprefix("text_model."): factors for name, factors in layers.items()}
    rank = Counter(factors.rank for factors in found.values()).most_common(1)[0][0]
    alpha = Counter(factors.alpha for factors in found.values()).most_common(1)[0][0]
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {name: factors.rank for name, factors in found.items() if factors.rank != rank},
        "alpha_pattern": {name: factors.alpha for name, factors in found.items() if factors.alpha != alpha},
        "target_modules": list(found),
    }


def describe_lora(path: Path, header: Header) -> dict[str, Any] | None:
    """Return what a LoRA file is, as JSON-ready values, given its header; None if it is none.

    Raises:
        ModelLoadError: the file cannot be read.
    """
    keys = {name: key for name in header.tensors if (key := parse_key(name))}
    others = other_methods(header)
    halves = {key.half for key in keys.values()}
    if others and not halves & {"up", "down"}:
        return {"kind": f"{' and '.join(others)} (not supported)"}
    if not halves >= {"up", "down"}:
        return None
    downs = {key.layer: header.tensors[name] for name, key in keys.items() if key.half == "down"}
    ranks = {layer: info.shape[0] for layer, info in downs.items() if info.shape}
    settings, _ = _peft_settings(path, header)
    named = {_finite(value) for key, value in settings.items() if key.endswith(".lora_alpha")}
    alphas = {alpha for alpha in named if alpha is not None}
    scalars = {name: header.tensors[name] for name, key in keys.items() if key.half == "alpha"}
    scalars = {name: info for name, info in scalars.items() if prod(info.shape) == 1 and info.dtype in NUMBERS}
    alphas |= {float(alpha) for alpha in read_weights(path, scalars).values()}
    return {
        "kind": f"LoRA with {' and '.join(others)} (not supported)" if others else "LoRA",
        "dialect": " and ".join(sorted({dialect_of(layer) for layer in downs})),
        "family": family_of_lora(header) or "not known",
        "layers": dict(Counter(network_of(layer) for layer in downs)),
        "ranks": sorted(set(ranks.values())),
        "alphas": sorted(alphas) or "as the ranks",
        **({"learned words": sorted(words)} if (words := bundled_words(header.tensors)) else {}),
        "convolutions": sum(info.shape[2:] > (1, 1) for info in downs.values()),
        **({"defaults": defaults} if (defaults := defaults_in(path, header.metadata)) else {}),
    }
