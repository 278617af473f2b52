"""The autoencoder that training starts from; the new one may have more levels."""

from __future__ import annotations

import re
from dataclasses import replace

import torch
from torch import Tensor

from latentdiff.checkpoints import load_autoencoder
from latentdiff.errors import InputError
from latentdiff.models.autoencoder import AutoencoderConfig, AutoencoderKL

from ..config import AutoencoderTraining
from .parts import part_folder


def load_started(config: AutoencoderTraining, device: torch.device | str = "cpu") -> AutoencoderKL:
    """Return the autoencoder that training starts from.

    Raises:
        InputError: there is none, its latents have more channels, or are of pictures made smaller by more.
        ModelLoadError: it is refused.
    """
    place = part_folder("start_from", str(config.start_from))
    started, shape = load_autoencoder(place, device=device), AutoencoderConfig.from_dict(config.model)
    found, own = ((one.latent_channels, one.downsample_factor) for one in (started.config, shape))
    if found[0] > own[0] or found[1] > own[1]:
        raise InputError(
            f"start_from must have {own[0]} latent channels or fewer, {own[1]} times smaller than pictures or less, "
            f"got {found[0]} channels, {found[1]} times; change model or start from another autoencoder"
        )
    return started


def take_over(model: AutoencoderKL, started: AutoencoderKL) -> None:
    """Give an autoencoder the weights of another, levels counted from the latents, and let it begin where that ended.

    Levels that only the model has, on the side of the pictures, begin by changing nothing: their residual blocks add 0,
    the step down takes the mean of four pixels, the step up repeats each. So pictures of twice the size become about
    the latents that the halved ones had, and latents about the same pictures, twice the size (Chen et al. 2016,
    Net2Net, arXiv 1511.05641). Where the model has more latent channels, the first are those of the other, and the
    decoder begins without the rest. Layers of other shapes stay as they are.

    Raises:
        InputError: the other one has more levels, none of its weights fits, or a new level has other channels than the
            finest of the other one.
    """
    widths, finest = model.config.block_out_channels, started.config.block_out_channels[0]
    added = len(widths) - len(started.config.block_out_channels)
    if added < 0:
        raise InputError(f"start_from has {-added} more levels than model.block_out_channels; add channels there")
    if any(width != finest for width in widths[:added]):
        raise InputError(
            f"the first {added} of model.block_out_channels must be {finest}, as of the finest level of start_from, so "
            f"that new levels can begin by changing nothing, got {list(widths)}"
        )
    own = model.state_dict()  # the decoder counts its levels from the latents, the encoder from the pictures
    given = {
        re.sub(r"(?<=^encoder\.down_blocks\.)\d+", lambda found: str(int(found[0]) + added), name): tensor
        for name, tensor in started.state_dict().items()
    }
    given |= _with_more_latents(given, own, started.config.latent_channels, model.config.latent_channels)
    other = {_layer(name) for name, tensor in given.items() if name not in own or own[name].shape != tensor.shape}
    fitting = {name: tensor for name, tensor in given.items() if _layer(name) not in other}
    if not fitting:
        raise InputError("start_from has no layer that fits; give model.block_out_channels its numbers")
    model.load_state_dict({**own, **fitting, **_changing_nothing(own, len(widths), added)})


def freeze_encoder(model: AutoencoderKL, started: AutoencoderKL) -> None:
    """Keep the latents of an autoencoder as they are, those of another that it took over.

    Raises:
        InputError: its encoder is another.
    """
    halves = [
        {name: tensor for name, tensor in one.state_dict().items() if name.startswith(("encoder.", "quant_conv."))}
        for one in (model, started)
    ]
    same = halves[0].keys() == halves[1].keys()
    if not same or not all(torch.equal(tensor, halves[1][name]) for name, tensor in halves[0].items()):
        raise InputError("decoder_only needs the encoder of start_from; give model the numbers of its vae/config.json")
    model.config = replace(model.config, scaling_factor=started.config.scaling_factor)
    for half in (model.encoder, model.quant_conv):
        if half is not None:
            half.requires_grad_(False)


def _with_more_latents(given: dict[str, Tensor], own: dict[str, Tensor], old: int, new: int) -> dict[str, Tensor]:
    """Return the layers at the latents for `new` channels, of which the first `old` are those of the given ones.

    The rest begin as random functions of the picture, with the noise of the first ones, and are not decoded.
    """
    if old == new:
        return {}
    means, moments = [*range(old)], [*range(old), *range(new, new + old)]  # of all new ones; then the log variances
    found = {name: own[name].clone() for name in ("encoder.conv_out.weight", "encoder.conv_out.bias")}
    if found["encoder.conv_out.weight"].shape[1] != given["encoder.conv_out.weight"].shape[1]:
        return {}
    for name, tensor in found.items():
        tensor[moments] = given[name]
        tensor[new + old :] = given[name][old + torch.arange(new - old) % old]
    found["decoder.conv_in.weight"] = torch.zeros_like(own["decoder.conv_in.weight"])
    found["decoder.conv_in.weight"][:, :old] = given["decoder.conv_in.weight"]
    for layer, kept in (("quant_conv", moments), ("post_quant_conv", means)):
        weight, bias = torch.eye(len(own[f"{layer}.bias"]))[:, :, None, None], torch.zeros_like(own[f"{layer}.bias"])
        weight[torch.tensor(kept)[:, None], kept], bias[kept] = given[f"{layer}.weight"], given[f"{layer}.bias"]
        found |= {f"{layer}.weight": weight, f"{layer}.bias": bias}
    return found


def _changing_nothing(own: dict[str, Tensor], levels: int, added: int) -> dict[str, Tensor]:
    """Return the tensors of an autoencoder with which its first levels change nothing."""
    found = {}
    for level in range(added):
        encoder, decoder = f"encoder.down_blocks.{level}.", f"decoder.up_blocks.{levels - 1 - level}."
        for name, tensor in own.items():
            if name.startswith((encoder, decoder)) and ".conv2." in name:
                found[name] = torch.zeros_like(tensor)
        below = f"decoder.up_blocks.{levels - 2 - level}.upsamplers.0.conv."
        for step, side in ((f"{encoder}downsamplers.0.conv.", slice(0, 2)), (below, slice(1, 2))):
            kernel = torch.zeros(3, 3)
            kernel[side, side] = 1
            weight = torch.eye(len(own[f"{step}bias"]))[:, :, None, None] * kernel / kernel.sum()  # (C, C, 3, 3)
            found |= {f"{step}weight": weight, f"{step}bias": torch.zeros(len(weight))}
    return found


def _layer(name: str) -> str:
    return name.rpartition(".")[0]
