"""Load a model, whatever it is kept in: a folder, a single file, or a folder of OpenCLIP's."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from latentdiff.checkpoints.components import Components, TextEncoder
from latentdiff.checkpoints.find import find_model
from latentdiff.checkpoints.folder import home
from latentdiff.checkpoints.loader import load_folder, load_network, load_tokenizer
from latentdiff.checkpoints.openclip import CONFIG, load_open_clip
from latentdiff.checkpoints.single_file import load_single_file
from latentdiff.models.autoencoder import AutoencoderKL
from latentdiff.models.tokenizer import Tokenizer

__all__ = ["load_autoencoder", "load_pipeline", "load_text_encoder"]


def load_pipeline(
    model: str | os.PathLike[str] | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    prediction_type: str | None = None,
) -> Components:
    """Load all components of a text-to-image model.

    Args:
        model: folder in diffusers' layout, or a safetensors file of the original one; None or "embedded" for the model
            that comes with the package.
        dtype: of the weights in memory, whatever it is in the files.
        device: where the weights go.
        prediction_type: what the U-Net predicts (see `diffusion.prediction.PREDICTIONS`), where the files say it
            wrongly or, as single files of Stable Diffusion 2.x, not at all; None for what they say.

    Raises:
        InputError: there is no such folder or prediction type.
        ModelLoadError: the model was refused; the subclass says why.
    """
    if model is not None and Path(model).is_file():
        return load_single_file(Path(model), dtype, device, prediction_type)
    folder, name = find_model(model)
    return load_folder(folder, name, dtype, device, prediction_type)


def load_autoencoder(
    path: str | os.PathLike[str], dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> AutoencoderKL:
    """Load an autoencoder: the folder with its config.json, or one with that folder inside as `vae`.

    Raises:
        ModelLoadError: see `load_pipeline`.
    """
    folder = Path(path)
    if not (folder / "config.json").exists():
        folder = home(folder, "vae") / "vae"
    return load_network(folder.parent, folder.name, ("AutoencoderKL",), dtype, device)


def load_text_encoder(
    path: str | os.PathLike[str], dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> tuple[TextEncoder, Tokenizer]:
    """Load the text encoder and the tokenizer of a model folder, which may lack the rest, or of a folder of OpenCLIP's.

    Raises:
        ModelLoadError: see `load_pipeline`.
    """
    folder, kinds = Path(path), ("BertModel", "CLIPTextModel", "T5EncoderModel")
    if (folder / CONFIG).is_file():
        return load_open_clip(folder, None, dtype, device)
    places = [home(folder, component) for component in ("text_encoder", "tokenizer")]
    return load_network(places[0], "text_encoder", kinds, dtype, device), load_tokenizer(places[1])
