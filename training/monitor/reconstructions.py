"""What an autoencoder makes of held-out pictures while it is trained, and the model that a run ends with."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentdiff.checkpoints import save_model
from latentdiff.errors import InputError
from latentdiff.models.autoencoder import AutoencoderKL

from ..loop.run import save_grid
from ..losses.image import psnr

PIXELS_AT_ONCE = 32 * 128**2  # through the network


@torch.no_grad()
def reconstructed(model: AutoencoderKL, images: Tensor) -> Tensor:
    """Return images (N, 3, H, W), on the CPU, decoded from the mode of their latents."""
    device = next(model.parameters()).device
    return torch.cat([model.decode(model.encode(part.to(device)).mode()).cpu() for part in in_parts(images)])


def save_pairs(images: Tensor, decoded: Tensor, file: Path) -> None:
    """Save the first 32 images (N, 3, H, W), each row of eight above what they were decoded to."""
    rows = [torch.cat([images[i : i + 8], decoded[i : i + 8]]) for i in range(0, min(32, len(images)), 8)]
    save_grid(torch.cat(rows), file, columns=8)


def mean_psnr(decoded: Tensor, images: Tensor) -> float:
    """Return the mean PSNR in dB of decoded images (N, 3, H, W)."""
    return psnr(decoded, images).mean().item()


def in_parts(images: Tensor) -> tuple[Tensor, ...]:
    """Return images (N, 3, H, W) in parts of `PIXELS_AT_ONCE`, at most 32 images, or one image where that is larger."""
    return images.split(min(32, max(1, PIXELS_AT_ONCE // images[0, 0].numel())))


@torch.no_grad()
def save_normalised(
    model: AutoencoderKL, images: Tensor | None, folder: Path
) -> tuple[AutoencoderKL, dict[str, list[float]]]:
    """Fold the measured latent statistics into a copy of the model, save it, and return it with both statistics.

    The per-channel mean and standard deviation of the latents of `images` go into the two 1x1 convolutions around the
    latent space, so that latents have mean 0 and standard deviation 1 and `scaling_factor` is 1: an ordinary
    AutoencoderKL that no loader has to know more about. Without images the model is saved as it is.
    """
    if images is None:
        save_model(model, folder)
        return model, {}
    device = next(model.parameters()).device
    with torch.device("meta"):
        normalised = AutoencoderKL(model.config)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    normalised.load_state_dict(weights, assign=True)
    normalised.requires_grad_(False).eval()
    latents = torch.cat([model.encode(part.to(device)).mode() for part in in_parts(images)])
    mean, std = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    fold_statistics(normalised, mean, std)
    normalised.config = replace(model.config, scaling_factor=1.0)
    save_model(normalised, folder)
    return normalised, {"latent_mean_before": mean.tolist(), "latent_std_before": std.tolist()}


@torch.no_grad()
def export(model: AutoencoderKL, images: Tensor | None, held_out: Tensor, folder: Path) -> None:
    """Save the model to folder/vae as `save_normalised` does, and what was measured of it to autoencoder.json."""
    vae = folder / "vae"
    normalised, statistics = save_normalised(model, images, vae)
    figures = {
        "held_out_psnr_db": mean_psnr(reconstructed(normalised, held_out), held_out),
        "held_out_images": len(held_out),
        **statistics,
    }
    (folder / "autoencoder.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(f"held-out PSNR {figures['held_out_psnr_db']:.2f} dB; saved {vae}")


@torch.no_grad()
def fold_statistics(model: AutoencoderKL, mean: Tensor, std: Tensor) -> None:
    """Rescale the latents to (latents - mean) / std per channel inside `quant_conv` and `post_quant_conv`."""
    before: Any = model.quant_conv
    after: Any = model.post_quant_conv
    if before is None or after is None:
        raise InputError("measured latent statistics need use_quant_conv and use_post_quant_conv: true in the model")
    channels = len(mean)
    after.bias += after.weight[:, :, 0, 0] @ mean
    after.weight *= std[None, :, None, None]
    before.bias[:channels] -= mean
    before.weight[:channels] /= std[:, None, None, None]
    before.bias[:channels] /= std
    before.bias[channels:] -= 2 * std.log()
