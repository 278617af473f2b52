"""Pictures of what a model of pixels has learnt: the diffusion process in both directions."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad
from tqdm import tqdm

from latentdiff.checkpoints import Components
from latentdiff.diffusion import draw_noise, image_generator, make_plan, sample, start
from latentdiff.evaluate.likelihood import network_of
from latentdiff.images import from_tensor, to_tensor

from ..config import DiffusionTraining
from ..data.dataset import composite, load_images
from ..data.source import MissingSplitError
from ..loop.run import save_grid

STEPS = 250  # of ancestral sampling, at most
PROMPTS = 16  # that the animation shows
ROWS, COLUMNS = 4, 9  # of the strip, in each direction
FRAMES = 65  # of the animation; every eighth is a column of the strip
SIDE = 128  # of a picture in it, in pixels


def show_process(components: Components, config: DiffusionTraining, folder: Path) -> None:
    """Write samples/process.png and samples/denoising.gif.

    The upper half of process.png are pictures on their way to noise, the lower half noise on its way to pictures.
    """
    cache = Path(config.cache or folder / "cache")
    try:
        data = load_images(config.data, "test", cache, ROWS)
    except MissingSplitError:
        data = load_images(config.data, "train", cache, ROWS)
    images = to_tensor(composite(data.images, (255, 255, 255)))  # (N, 3, H, W)
    drawn = reverse_process(components, config.samples.prompts[:PROMPTS])
    rows = forward_process(components, images) + [row[:: (FRAMES - 1) // (COLUMNS - 1)] for row in drawn[:ROWS]]
    save_grid([frame for row in rows for frame in enlarged(torch.stack(row))], folder / "samples/process.png", COLUMNS)
    save_animation([enlarged(torch.stack(frame)) for frame in zip(*drawn)], folder / "samples/denoising.gif")


def forward_process(components: Components, images: Tensor) -> list[list[Tensor]]:
    """Return each picture at `COLUMNS` timesteps, evenly apart, from itself to noise, each (3, H, W), on the CPU."""
    device = components.unet.conv_in.weight.device
    pixels = components.autoencoder.encode(images.to(device)).mode()
    noise = draw_noise([image_generator(seed) for seed in range(len(pixels))], pixels.shape[1:]).to(device)
    last = components.schedule.num_train_timesteps - 1
    columns = [images]
    for timestep in torch.linspace(0, last, COLUMNS)[1:].round().long().tolist():
        noisy = components.schedule.add_noise(pixels, noise, torch.full((len(pixels),), timestep, device=device))
        columns.append(components.autoencoder.decode(noisy).cpu())
    return [list(row) for row in torch.stack(columns, dim=1)]


@torch.no_grad()
def reverse_process(components: Components, prompts: list[str]) -> list[list[Tensor]]:
    """Return one picture of each prompt at `FRAMES` points of ancestral sampling, each (3, H, W), on the CPU."""
    plan = make_plan(components.schedule, "ddpm", min(STEPS, components.schedule.num_train_timesteps))
    generators = [image_generator(seed) for seed in range(len(prompts))]
    shape = (components.autoencoder.config.latent_channels, *components.native_size)
    x = start(plan, draw_noise(generators, shape).to(components.unet.conv_in.weight.device))
    seen = [x / (1 + plan.sigmas[0] ** 2).sqrt()]  # at each step, as the network sees it
    sampled = sample(network_of(components, prompts), plan, x, generators)
    for step in tqdm(sampled, "denoising", total=len(plan)):
        following = plan.sigmas[step.index + 1] if step.index + 1 < len(plan) else torch.zeros(())
        seen.append(step.x / (1 + following**2).sqrt())
    places = torch.linspace(0, len(plan), FRAMES).round().int().tolist()
    pictures = [components.autoencoder.decode(seen[place].float()).cpu() for place in places]
    return [list(row) for row in torch.stack(pictures, dim=1)]


def enlarged(pictures: Tensor) -> Tensor:
    """Return pictures (N, 3, H, W) with each pixel a square, about `SIDE` pixels wide."""
    times = max(1, SIDE // pictures.shape[-1])
    return pictures.repeat_interleave(times, dim=-1).repeat_interleave(times, dim=-2)


def save_animation(frames: list[Tensor], file: Path) -> None:
    """Save frames (N, 3, H, W), each a grid of four columns, as a GIF that rests on the last one."""
    sheets = []
    for frame in frames:
        rows = [torch.cat(list(row), dim=-1) for row in pad(frame, (0, 4, 0, 4), value=1.0).split(4)]
        sheets.append(from_tensor(torch.cat(rows, dim=-2)[None])[0].quantize(64, Image.Quantize.MEDIANCUT))
    durations = [60] * (len(sheets) - 1) + [2000]
    sheets[0].save(file, save_all=True, append_images=sheets[1:], duration=durations, loop=0)
