"""Variants of a model: a folder with what another model, beside it, has not, and a U-Net given by a difference."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from latentdiff.checkpoints.components import AnyNetwork, Components, moved
from latentdiff.checkpoints.difference import difference
from latentdiff.checkpoints.folder import BASE, DIFFERENCE, INDEX
from latentdiff.checkpoints.read import load_pipeline
from latentdiff.checkpoints.saver import pipeline_index, write_components
from latentdiff.checkpoints.storage import replace_folder, save_tensors, write_json
from latentdiff.checkpoints.weights import stored_weights
from latentdiff.diffusion.schedule import NoiseSchedule
from latentdiff.errors import InputError
from latentdiff.files import require_path

__all__ = ["save_variant"]


def save_variant(
    components: Components,
    folder: str | os.PathLike[str],
    base: str | os.PathLike[str],
    dtype: torch.dtype | None = torch.float16,
    rank: int | None = None,
) -> None:
    """Write only what a model has besides that of a folder beside the new one, which it then needs to be loaded.

    Args:
        components: complete, with a U-Net.
        folder: new, or one that a model was saved to before.
        base: folder of a whole model, in the same folder as the new one.
        dtype: of the weights in the files; None keeps each as it is.
        rank: of the difference that stands for the U-Net; None for its weights.

    Raises:
        InputError: there is no U-Net, the base is elsewhere, or the folder holds something that is no model.
        ModelLoadError: the base is refused.
        StorageError: the folder cannot be written.
    """
    target, source = require_path(folder, "a folder").absolute(), require_path(base, "the base").absolute()
    if target.parent.resolve() != source.resolve().parent:
        raise InputError(f"a variant must be beside its base, {source}, got {target}; choose a folder there")
    index, networks, tokenizers, schedules = pipeline_index(moved(components, torch.device("cpu")))  # where the base is
    _, their_networks, their_tokenizers, their_schedules = pipeline_index(load_pipeline(source))
    changed = {name: network for name, network in networks.items() if not _equal(network, their_networks.get(name))}
    planned = {name: one for name, one in schedules.items() if _content(one) != _content(their_schedules.get(name))}
    words = {
        name: one
        for name, one in tokenizers.items()
        if name.replace("tokenizer", "text_encoder") in changed
        or name not in their_tokenizers
        or one.digest != their_tokenizers[name].digest
    }

    def write(place: Path) -> None:
        lowered = {"unet"} & changed.keys() if rank is not None else set()
        whole = {name: network for name, network in changed.items() if name not in lowered}
        write_components(place, whole, words, planned, dtype)
        if lowered and rank is not None:
            (place / "unet").mkdir()
            found = difference(their_networks["unet"], changed["unet"], rank)
            save_tensors(stored_weights(found, dtype), place / "unet" / DIFFERENCE)
            write_json(place / "unet" / "config.json", changed["unet"].config.to_dict())
        lacking = {*networks, *tokenizers, *schedules} - {*changed, *words, *planned}
        kept = {name: entry for name, entry in index.items() if name not in lacking}
        write_json(place / INDEX, {BASE: source.name, **kept})

    replace_folder(target, INDEX, write)


def _content(schedule: NoiseSchedule | None) -> dict[str, Any] | None:
    return None if schedule is None else schedule.to_dict()


def _equal(network: AnyNetwork, other: AnyNetwork | None) -> bool:
    """Say whether two networks have the same configuration and weights."""
    if other is None or network.config != other.config:
        return False
    theirs = other.state_dict()
    return all(torch.equal(tensor.float(), theirs[name].float()) for name, tensor in network.state_dict().items())
