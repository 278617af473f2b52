"""What a model of pixels has learnt, shown: its bits per dimension, and pictures of the process both ways."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad

from latentdiff.checkpoints import Components
from latentdiff.diffusion import draw_noise, image_generator, make_plan, sample, start
from latentdiff.evaluate import negative_log_likelihood
from latentdiff.evaluate.likelihood import network_of
from latentdiff.images import from_tensor, to_tensor

from ..config import DiffusionTraining
from ..data.dataset import composite, load_images
from ..loop.run import save_grid

MEASURED = 128  # pictures whose bits are counted; `latentdiff evaluate` takes more
COLUMNS = 9  # of the strip
FRAMES = 60  # of the animation
SIDE = 128  # of a picture in it, in pixels


def show_process(components: Components, config: DiffusionTraining, folder: Path) -> None:
    """Print bits per dimension of unseen pictures, and write samples/process.png and samples/denoising.gif.

    The upper half of process.png are pictures on their way to noise, the lower half noise on its way to pictures.
    """
    split = "test" if (Path(config.data.folder) / "test").is_dir() else "train"
    data = load_images(config.data, split, Path(config.cache or folder / "cache"), MEASURED)
    images = to_tensor(composite(data.images, (255, 255, 255)))  # (N, 3, H, W)
    captions = [row["captions"][0] for row in data.rows]
    figures = negative_log_likelihood(components, images, captions)
    if "bound" in figures:
        terms = " + ".join(f"{figures['bound'][name]['mean']:.4f} ({name})" for name in ("L_T", "L_t", "L_0"))
        print(f"variational bound of {len(images)} {split} pictures: {_of(figures['bound']['total'])} = {terms}")
    print(f"probability-flow ODE: {_of(figures['ode'])}")
    rows = forward_process(components, images[:4]) + reverse_process(components, config.prompts[:4], COLUMNS)
    save_grid([frame for row in rows for frame in enlarged(torch.stack(row))], folder / "samples/process.png", COLUMNS)
    frames = [enlarged(torch.stack(frame)) for frame in zip(*reverse_process(components, config.prompts[:16], FRAMES))]
    save_animation(frames, folder / "samples/denoising.gif")


def forward_process(components: Components, images: Tensor) -> list[list[Tensor]]:
    """Return each picture at `COLUMNS` timesteps, evenly apart, from itself to noise, each (3, H, W)."""
    pixels = components.autoencoder.encode(images).mode()
    noise = draw_noise([image_generator(seed) for seed in range(len(pixels))], pixels.shape[1:])
    last = components.schedule.num_train_timesteps - 1
    columns = [images]
    for timestep in torch.linspace(0, last, COLUMNS)[1:].round().long().tolist():
        noisy = components.schedule.add_noise(pixels, noise, torch.full((len(pixels),), timestep))
        columns.append(components.autoencoder.decode(noisy))
    return [list(row) for row in torch.stack(columns, dim=1)]


@torch.no_grad()
def reverse_process(components: Components, prompts: list[str], count: int) -> list[list[Tensor]]:
    """Return one picture of each prompt at `count` of all steps of ancestral sampling, each (3, H, W)."""
    plan = make_plan(components.schedule, "ddpm", components.schedule.num_train_timesteps)
    generators = [image_generator(seed) for seed in range(len(prompts))]
    shape = (components.autoencoder.config.latent_channels, *components.native_size)
    x = start(plan, draw_noise(generators, shape))
    shown = set(torch.linspace(0, len(plan), count).round().int().tolist())
    columns = [x / (1 + plan.sigmas[0] ** 2).sqrt()]
    for step in sample(network_of(components, prompts), plan, x, generators):
        if step.index + 1 in shown:
            following = plan.sigmas[step.index + 1] if step.index + 1 < len(plan) else torch.zeros(())
            columns.append(step.x / (1 + following**2).sqrt())  # as the network sees it
    pictures = [components.autoencoder.decode(column.float()) for column in columns]
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


def _of(figure: dict[str, float]) -> str:
    return f"{figure['mean']:.3f} +- {figure['standard_error']:.3f} bits/dim"
