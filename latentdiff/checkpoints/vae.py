"""Load an autoencoder by itself: from its folder, from a model folder that has one, or from a file of its weights.

Such a file is in the original layout, with or without its prefix, or in that of diffusers. It does not say its
configuration, so that is the one of the model that it is for.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from latentdiff.checkpoints.family import VAE, families
from latentdiff.checkpoints.folder import vae_folder
from latentdiff.checkpoints.header import read_header
from latentdiff.checkpoints.loader import load_network
from latentdiff.checkpoints.single_file import Section, load_section
from latentdiff.errors import ModelMismatchError
from latentdiff.models.autoencoder import AutoencoderKL

__all__ = ["load_autoencoder_from"]

PREFIXES = (VAE, "vae.", "")
FIRST = "decoder.conv_in.weight"  # which both layouts have


def load_autoencoder_from(
    path: Path, config: Mapping[str, Any] | None, dtype: torch.dtype, device: str | torch.device
) -> AutoencoderKL:
    """Load an autoencoder from a file or folder.

    Args:
        config: content of a config.json, for a file; None for that of Stable Diffusion 1.x.

    Raises:
        ModelLoadError: it was refused; the subclass says why.
    """
    if path.is_file():
        return _load_file(path, config or families()["Stable Diffusion 1.x"]["vae"], dtype, device)
    folder = vae_folder(path)
    network: AutoencoderKL = load_network(folder.parent, folder.name, ("AutoencoderKL",), dtype, device)
    return network


def _load_file(path: Path, config: Mapping[str, Any], dtype: torch.dtype, device: str | torch.device) -> AutoencoderKL:
    tensors = read_header(path).tensors
    prefix = next((prefix for prefix in PREFIXES if prefix + FIRST in tensors), None)
    if prefix is None:
        raise ModelMismatchError(
            f"{path}: expected an autoencoder, with {FIRST}, got {len(tensors)} tensors such as "
            f"{next(iter(tensors))[:80]}; pass a VAE"
        )
    layout = "autoencoder"
    if any(name.startswith(f"{prefix}decoder.up_blocks.") for name in tensors):
        layout = "diffusers, old" if any(name.endswith(".query.weight") for name in tensors) else "diffusers"
    section = Section("vae", "AutoencoderKL", layout, prefix, dict(config))
    network: AutoencoderKL = load_section(path, tensors, section, dtype, device)
    return network
