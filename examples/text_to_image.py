"""Text to image on one screen: what `latentdiff generate "a red fox"` does, from public pieces alone.

python examples/text_to_image.py "a red fox" fox.png
"""

from __future__ import annotations

import sys

import torch
from PIL import Image
from torch import Tensor

from latentdiff.checkpoints import load_pipeline
from latentdiff.diffusion import Call, draw_noise, image_generator, make_plan, sample, start
from latentdiff.images import from_tensor, write_png
from latentdiff.marks import GENERATED


@torch.no_grad()
def text_to_image(prompt: str, seed: int = 0, steps: int = 25, guidance_scale: float = 7.5) -> Image.Image:
    """Generate a picture with the embedded model."""
    model = load_pipeline()
    # Text to context: states of every token, of the empty text and of the prompt. Each is (1, L, D).
    unconditional, conditional = (model.prompt_encoder([text])[0].states for text in ("", prompt))
    context = torch.cat([unconditional, conditional])  # (2, L, D)

    def network(x: Tensor, call: Call) -> Tensor:
        """Call the U-Net with and without the prompt, and go further in the direction between (guidance)."""
        timesteps = call.timesteps.expand(2)
        outputs = model.unet(torch.cat([x, x]), timesteps, context)  # (2, C, h, w)
        without, with_prompt = outputs.chunk(2)
        return without + guidance_scale * (with_prompt - without)  # (1, C, h, w)

    # The sampler is a table of numbers, one row a step; noise depends on the seed alone.
    plan = make_plan(model.schedule, "euler_a", steps)
    generators = [image_generator(seed)]
    height, width = (side // model.autoencoder.config.downsample_factor for side in model.native_size)
    noise = draw_noise(generators, (model.autoencoder.config.latent_channels, height, width))  # (1, C, h, w)
    x = start(plan, noise)
    for step in sample(model.denoiser(network), plan, x, generators):  # noise to latents, in sigma coordinates
        x = step.x
    images = model.autoencoder.decode(x / model.autoencoder.config.scaling_factor)  # (1, 3, H, W) in [-1, 1]
    return from_tensor(images)[0]


if __name__ == "__main__":
    write_png(sys.argv[2], text_to_image(sys.argv[1]), {}, GENERATED)  # marked as made by a model
