"""What a LoRA of a style does to the diffusion loss, of its own held-out drawings and of the styles learnt before.

    python tests/benchmarks/lora_style.py runs/emoji-lora/lora.safetensors --new data/fxemoji --old data/emoji64
    python tests/benchmarks/lora_style.py LORA --new data/fxemoji --old data/emoji64 --grid assets/lora.png

The same noise at the same timesteps with and without the LoRA. The grid shows prompts of held-out and other things,
without it above and with it below.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

from latentdiff.training.config import DataConfig
from latentdiff.training.data.dataset import composite, load_images
from latentdiff.training.loop.run import save_grid

from latentdiff import Pipeline
from latentdiff.images import to_tensor
from latentdiff.marks import GENERATED

TIMESTEPS = 20  # of each picture, evenly spread
PROMPTS = ("a fox", "a cat", "a house", "a pizza", "a pine tree", "a red heart", "a rocket", "a smiling face")
STYLE = "firefox style"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lora", type=Path)
    parser.add_argument("--new", required=True, help="data set of the style, with a validation split")
    parser.add_argument("--old", required=True, help="data set of the styles before, likewise")
    parser.add_argument("--images", type=int, default=100, help="of each set at most")
    parser.add_argument("--grid", type=Path, help="PNG to write")
    arguments = parser.parse_args()
    plain = Pipeline.from_pretrained(device="cpu")
    styled = plain.with_loras({arguments.lora: 1.0})
    figures: dict[str, dict[str, float]] = {}
    for name, folder in (("new style", arguments.new), ("old styles", arguments.old)):
        latents, captions = held_out(plain, folder, arguments.images)
        before, after = (losses(pipe, latents, captions) for pipe in (plain, styled))
        ratio = float((after - before).mean() / before.mean())
        error = float((after - before).std() / len(before) ** 0.5 / before.mean())
        figures[name] = {"before": float(before.mean()), "after": float(after.mean()), "change": ratio, "error": error}
        print(
            f"{name}: loss {before.mean():.4f} without, {after.mean():.4f} with the LoRA: "
            f"{ratio:+.1%} +- {error:.1%} ({len(before)} held-out pictures)"
        )
    if arguments.grid is not None:
        drawn = [
            pipe([f"{prompt}, {STYLE}" for prompt in PROMPTS], output_type="pt").images for pipe in (plain, styled)
        ]
        save_grid(torch.cat(drawn) * 2 - 1, arguments.grid, columns=len(PROMPTS), source_type=GENERATED)
    print(json.dumps(figures))


def held_out(pipe: Pipeline, folder: str, count: int) -> tuple[Tensor, list[str]]:
    """Return scaled latents (N, C, h, w) of validation pictures, evenly spread over the set, and their captions."""
    data = load_images(DataConfig(folder=folder, size=pipe.native_size[0]), "validation")
    rows = list(range(0, len(data), max(1, len(data) // count)))[:count]
    images = to_tensor(composite(data.images[rows], (255, 255, 255)))
    with torch.no_grad():
        latents = pipe.autoencoder.encode(images).mode() * pipe.autoencoder.config.scaling_factor
    return latents, [data.rows[row]["captions"][0] for row in rows]


@torch.no_grad()
def losses(pipe: Pipeline, latents: Tensor, captions: list[str]) -> Tensor:
    """Return the squared error (N,) of what the network predicts, averaged over timesteps; noise by picture."""
    schedule = pipe.components.schedule
    context = torch.stack([encoded.states[0] for encoded in pipe.components.prompt_encoder(captions)])
    generator = torch.Generator().manual_seed(0)
    found = torch.zeros(len(latents))
    for number in range(TIMESTEPS):
        timesteps = torch.full((len(latents),), int((number + 0.5) / TIMESTEPS * schedule.num_train_timesteps))
        noise = torch.randn(latents.shape, generator=generator)
        output = pipe.unet(schedule.add_noise(latents, noise, timesteps), timesteps, context)
        found += (output - schedule.target(latents, noise, timesteps)).square().mean(dim=(1, 2, 3))
    return found / TIMESTEPS


if __name__ == "__main__":
    main()
