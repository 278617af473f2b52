"""Unconditional diffusion on a folder of pictures, in pixels: train a small U-Net, then sample sixteen pictures.

python examples/train_ddpm.py assets/sample samples.png
python examples/train_ddpm.py my/pictures samples.png --size 64 --steps 20000
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch.nn.functional import mse_loss
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import trange

from latentdiff.diffusion import NoiseSchedule, as_denoiser, draw_noise, image_generator, make_plan, sample, start
from latentdiff.images import fit, from_tensor, open_image, to_tensor, write_png
from latentdiff.marks import GENERATED
from latentdiff.models.unet import UNet2DConditionModel, UNetConfig


def train(folder: str, size: int, steps: int, batch_size: int = 16) -> tuple[UNet2DConditionModel, NoiseSchedule]:
    """Train a U-Net to predict velocity (Ho et al. 2020, arXiv 2006.11239; Salimans and Ho 2022, arXiv 2202.00512)."""
    images = to_tensor([fit(open_image(path), size, size) for path in sorted(Path(folder).glob("*.png"))])
    blocks = {"down_block_types": ["DownBlock2D"] * 3, "up_block_types": ["UpBlock2D"] * 3}
    shape = {"in_channels": 3, "out_channels": 3, "block_out_channels": [32, 64, 64], "layers_per_block": 1, **blocks}
    unet = UNet2DConditionModel(UNetConfig.from_dict({**shape, "cross_attention_dim": 32, "sample_size": size}))
    schedule = NoiseSchedule(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    average = AveragedModel(unet, multi_avg_fn=get_ema_multi_avg_fn(0.99))
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-3)
    for _ in trange(steps):
        pictures = images[torch.randint(len(images), (batch_size,))]  # (B, 3, H, W)
        noise, timesteps = torch.randn_like(pictures), torch.randint(schedule.num_train_timesteps, (batch_size,))
        predicted = unet(schedule.add_noise(pictures, noise, timesteps), timesteps, torch.zeros(batch_size, 1, 32))
        loss = mse_loss(predicted, schedule.target(pictures, noise, timesteps))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.update_parameters(unet)
    return average.module.eval(), schedule


@torch.no_grad()
def generate(unet: UNet2DConditionModel, schedule: NoiseSchedule, size: int, count: int = 16) -> torch.Tensor:
    """Return pictures (B, 3, H, W) in [-1, 1]."""
    context = torch.zeros(count, 1, 32)
    denoise = as_denoiser(lambda x, call: unet(x, call.timesteps, context), schedule.prediction_type, limit=1.0)
    plan, generators = make_plan(schedule, "ddim", 50), [image_generator(seed) for seed in range(count)]
    *_, last = sample(denoise, plan, start(plan, draw_noise(generators, (3, size, size))), generators)
    return last.x


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("out")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=2000)
    options = parser.parse_args()
    pictures = generate(*train(options.folder, options.size, options.steps), options.size)
    rows = torch.cat([torch.cat(list(row), dim=-1) for row in pictures.split(4)], dim=-2)  # a grid of four by four
    write_png(options.out, from_tensor(rows[None])[0], {}, GENERATED)  # marked as made by a model
