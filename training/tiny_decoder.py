"""Train a tiny decoder for the previews of a model: it learns what the model's autoencoder decodes.

Source: the distillation of TAESD; the network is `latentdiff.models.autoencoder_tiny`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from latentdiff.checkpoints import Components
from latentdiff.models.autoencoder_tiny import AutoencoderTiny, AutoencoderTinyConfig

from .loop.run import seeded
from .losses.image import multiscale_gradient, psnr

WIDTH = 24  # channels: about 0.1 M parameters
ITERATIONS, BATCH, LEARNING_RATE = 1500, 8, 2e-3
GRADIENT = 0.5  # weight of the edges beside the distance
SMOOTHED = 0.5  # share of the samples whose latents are as smooth as early estimates
MEASURED_ON = 32  # pictures that are not trained on


def tiny_config(components: Components) -> AutoencoderTinyConfig:
    """Return the shape of a decoder for the latents of a model: most blocks where pictures are small."""
    config = components.autoencoder.config
    blocks = (2,) * (config.downsample_factor.bit_length() - 2) + (1, 1)
    blocks = blocks[-config.downsample_factor.bit_length() :]
    return AutoencoderTinyConfig(
        latent_channels=config.latent_channels,
        decoder_block_out_channels=(WIDTH,) * len(blocks),
        num_decoder_blocks=blocks,
        scaling_factor=1.0,
    )


@torch.no_grad()
def decoded_pairs(components: Components, images: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return scaled latents (N, C, h, w) of images (N, 3, H, W), some of them smoothed, and what is decoded of them.

    Args:
        seed: chooses which are smoothed, and by how much.
    """
    autoencoder, drawn = components.autoencoder, seeded(seed, 0, 7)
    latents, pictures = list[Tensor](), list[Tensor]()
    for image in images.to(components.device, components.dtype):
        own = autoencoder.encode(image[None]).mode()
        if torch.rand((), generator=drawn) < SMOOTHED:
            blurred = F.interpolate(F.avg_pool2d(own, 2, ceil_mode=True), own.shape[-2:], mode="bilinear")
            own = own.lerp(blurred, float(torch.rand((), generator=drawn)))
        pictures.append(autoencoder.decode(own).float().clamp(-1, 1))
        latents.append(own.float() * autoencoder.config.scaling_factor)
    return torch.cat(latents), torch.cat(pictures)


def train_tiny_decoder(
    config: AutoencoderTinyConfig,
    latents: Tensor,
    pictures: Tensor,
    iterations: int = ITERATIONS,
    report: Callable[[str], object] = print,
) -> tuple[AutoencoderTiny, float]:
    """Train a tiny decoder, and return it with its PSNR in dB on the last pictures, which it has not seen.

    Args:
        latents: (N, C, h, w), scaled.
        pictures: (N, 3, H, W), what the autoencoder decodes of them.
        iterations: of Adam; its learning rate falls to zero by a cosine.
        report: is told of the progress, a line at a time.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        decoder = AutoencoderTiny(config)
    decoder.to(latents.device).train()
    optimizer = torch.optim.Adam(decoder.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99))
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    trained_on = max(1, len(latents) - MEASURED_ON)
    for iteration in range(iterations):
        some = torch.randint(trained_on, (BATCH,), generator=seeded(0, iteration, 8)).to(latents.device)
        found, wanted = decoder.decode(latents[some]), pictures[some]
        loss = F.l1_loss(found, wanted) + GRADIENT * multiscale_gradient(found, wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        falling.step()
        if (iteration + 1) % max(1, iterations // 10) == 0:
            report(f"tiny decoder: iteration {iteration + 1} of {iterations}, loss {loss.item():.4f}")
    decoder.requires_grad_(False).eval()
    held_out = slice(-min(MEASURED_ON, len(latents)), None)
    with torch.no_grad():
        return decoder, psnr(decoder.decode(latents[held_out]), pictures[held_out]).mean().item()
