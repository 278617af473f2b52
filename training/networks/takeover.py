"""The autoencoder that training starts from; the new one may have more levels."""

from __future__ import annotations

import re

import torch

from latentdiff.checkpoints import load_autoencoder
from latentdiff.errors import InputError
from latentdiff.models.autoencoder import AutoencoderConfig, AutoencoderKL

from ..config import AutoencoderTraining
from .parts import part_folder


def load_started(config: AutoencoderTraining, device: torch.device | str = "cpu") -> AutoencoderKL:
    """Return the autoencoder that training starts from.

    Raises:
        InputError: there is none, its latents have other channels, or are of pictures made smaller by more.
        ModelLoadError: it is refused.
    """
    place = part_folder("start_from", str(config.start_from))
    started, shape = load_autoencoder(place, device=device), AutoencoderConfig.from_dict(config.model)
    found, own = ((one.latent_channels, one.downsample_factor) for one in (started.config, shape))
    if found[0] != own[0] or found[1] > own[1]:
        raise InputError(
            f"start_from must have {own[0]} latent channels, {own[1]} times smaller than pictures or less, got "
            f"{found[0]} channels, {found[1]} times; change model or start from another autoencoder"
        )
    return started


def take_over(model: AutoencoderKL, started: AutoencoderKL) -> None:
    """Give an autoencoder the weights of another that fit, levels counted from the latents.

    Layers that only the model has, on the side of the pictures, or that have other shapes stay as they are.

    Raises:
        InputError: the other one has more levels, or none of its weights fits.
    """
    added = len(model.config.block_out_channels) - len(started.config.block_out_channels)
    if added < 0:
        raise InputError(f"start_from has {-added} more levels than model.block_out_channels; add channels there")
    own = model.state_dict()  # the decoder counts its levels from the latents, the encoder from the pictures
    given = {
        re.sub(r"(?<=^encoder\.down_blocks\.)\d+", lambda found: str(int(found[0]) + added), name): tensor
        for name, tensor in started.state_dict().items()
    }
    other = {_layer(name) for name, tensor in given.items() if name not in own or own[name].shape != tensor.shape}
    fitting = {name: tensor for name, tensor in given.items() if _layer(name) not in other}
    if not fitting:
        raise InputError("start_from has no layer that fits; give model.block_out_channels its numbers")
    model.load_state_dict({**own, **fitting})


def _layer(name: str) -> str:
    return name.rpartition(".")[0]
