"""Load a model, whatever it is kept in: a folder, a single file, or a folder of OpenCLIP's."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from latentdiff.checkpoints.components import Components, TextEncoder
from latentdiff.checkpoints.find import find_model
from latentdiff.checkpoints.folder import home, reading
from latentdiff.checkpoints.loader import load_folder, load_network, load_tokenizer
from latentdiff.checkpoints.openclip import CONFIG, load_open_clip
from latentdiff.checkpoints.single_file import load_single_file
from latentdiff.checkpoints.vae import load_autoencoder_from
from latentdiff.errors import InputError
from latentdiff.files import require_path
from latentdiff.models.autoencoder import AutoencoderKL
from latentdiff.models.pixels import LabelEncoder
from latentdiff.models.tokenizer import Tokenizer

__all__ = ["load_autoencoder", "load_pipeline", "load_text_encoder"]


def load_pipeline(
    model: str | os.PathLike[str] | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    prediction_type: str | None = None,
    vae: str | os.PathLike[str] | None = None,
    *,
    local: bool = False,
) -> Components:
    """Load all components of a text-to-image model.

    Args:
        model: folder in diffusers' layout, or a safetensors file of the original one; None or "embedded" for the model
            that comes with the package.
        dtype: of the weights in memory, whatever it is in the files.
        device: where the weights go.
        prediction_type: what the U-Net predicts (see `diffusion.prediction.PREDICTIONS`), where the files say it
            wrongly or, as single files of Stable Diffusion 2.x, not at all; None for what they say.
        vae: autoencoder in place of the model's own, which may then be missing: see `load_autoencoder`. A file of
            weights alone is used with the configuration of the latter.
        local: of models on a hub, take only what is in the cache already.

    Raises:
        InputError: there is no such folder or prediction type.
        ModelLoadError: the model was refused; the subclass says why.
    """
    other = None if vae is None else _existing(vae)

    def from_other(config: dict[str, Any]) -> AutoencoderKL:
        assert other is not None
        return load_autoencoder_from(other, config, dtype, device)

    load_vae = None if other is None else from_other
    with reading(model):
        if model is not None and _is_file(require_path(model, "a model")):
            components = load_single_file(Path(model), dtype, device, prediction_type, load_vae)
        else:
            folder, name = find_model(model, local=local)
            components = load_folder(folder, name, dtype, device, prediction_type, load_vae)
    if other is None or components.source is None:
        return components
    return replace(components, source=replace(components.source, vae=other))


def load_autoencoder(
    path: str | os.PathLike[str], dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> AutoencoderKL:
    """Load an autoencoder: the folder with its config.json, one with that folder inside as `vae`, or a file.

    A file has weights alone, in the original layout or in that of diffusers; of the model that they are for, its
    configuration is taken to be that of Stable Diffusion 1.x.

    Raises:
        ModelLoadError: see `load_pipeline`.
    """
    with reading(path):
        return load_autoencoder_from(require_path(path, "an autoencoder"), None, dtype, device)


def load_text_encoder(
    path: str | os.PathLike[str], dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> tuple[TextEncoder, Tokenizer]:
    """Load the text encoder and the tokenizer of a model folder, which may lack the rest, or of a folder of OpenCLIP's.

    Raises:
        ModelLoadError: see `load_pipeline`.
    """
    folder, kinds = require_path(path, "a text encoder"), ("BertModel", "CLIPTextModel", "T5EncoderModel")
    with reading(folder):
        if (folder / CONFIG).is_file():
            return load_open_clip(folder, None, dtype, device)
        places = [home(folder, component) for component in ("text_encoder", "tokenizer")]
        encoder: TextEncoder = load_network(places[0], "text_encoder", kinds, dtype, device)
        longest = None if isinstance(encoder, LabelEncoder) else encoder.config.max_position_embeddings
        return encoder, load_tokenizer(places[1], longest=longest)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that no system takes
        return False


def _existing(vae: str | os.PathLike[str]) -> Path:
    path = require_path(vae, "a VAE")
    try:
        if path.exists():
            return path
    except (OSError, ValueError):
        pass
    raise InputError(f"vae {str(vae)[:200]!r} is no file or folder here; pass a safetensors file or a folder")
