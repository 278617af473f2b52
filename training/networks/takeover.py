"""Layers of a trained autoencoder for one that may have more levels."""

from __future__ import annotations

import re

from latentdiff.errors import InputError
from latentdiff.models.autoencoder import AutoencoderKL


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
