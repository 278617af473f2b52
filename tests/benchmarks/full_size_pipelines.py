"""Compare pictures of inpainting and super-resolution models of the published sizes, random weights, with diffusers'.

Both pipelines share the memory of their weights (6 GB at most) and draw from one seed, in float32, with DDIM.

    python tests/benchmarks/full_size_pipelines.py
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2]))

from latentdiff import Pipeline
from latentdiff.checkpoints import Components
from latentdiff.checkpoints.single_file import families
from tests.checkpoints.test_single_file import components_of
from tests.models.tiny import noise_picture
from tests.parity.test_pipeline_inpaint import take_modes

INPAINTING = ("Stable Diffusion 1.x", "Stable Diffusion 2.x")
UPSCALING = "Stable Diffusion x4 upscaler"
SEED, PROMPT = 5, "a red fox"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=128, help="side of the pictures drawn, in pixels")
    parser.add_argument("--steps", type=int, default=5)
    arguments = parser.parse_args()
    take_modes(pytest.MonkeyPatch())
    figures = {}
    for family, channels in [*((name, 9) for name in INPAINTING), (UPSCALING, 7)]:
        figures[family] = found = compare(components_of(families()[family], channels), arguments.size, arguments.steps)
        print(f"{family}, {channels} channels: {found}", flush=True)
    print(json.dumps(figures))


def compare(components: Components, size: int, steps: int) -> dict[str, float]:
    """Return how far the pictures are apart at most, in values of 0 to 255, and the deviation that they have."""
    autoencoder: Any = components.autoencoder
    with torch.no_grad():
        autoencoder.decoder.conv_out.weight *= 5  # contrast
    pipe = Pipeline(components)
    peer = pipe.to_diffusers()
    peer.scheduler = diffusers.DDIMScheduler.from_config(peer.scheduler.config)
    peer.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(SEED)
    settings: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": 4.0}
    drawn = np.s_[:]
    if components.upscales:
        small = noise_picture(size // 4, size // 4)
        expected = peer(PROMPT, image=small, generator=generator, noise_level=40, **settings).images[0]
        found = pipe(PROMPT, image=small, seed=SEED, sampler="ddim", noise_level=40, **settings).images[0]
    else:
        settings |= {"height": size, "width": size}
        picture, mask = noise_picture(size, size), Image.new("L", (size, size))
        mask.paste(255, (0, size // 2, size, size))
        drawn = np.s_[size // 2 :]
        given: dict[str, Any] = {"image": picture, "mask_image": mask, "strength": 1.0, "generator": generator}
        expected = peer(PROMPT, **given, **settings).images[0]
        found = pipe(PROMPT, image=picture, mask=mask, seed=SEED, sampler="ddim", **settings).images[0]
    ours, theirs = (np.asarray(one, dtype=np.float64)[drawn] for one in (found, expected))
    return {"most": float(np.abs(ours - theirs).max()), "deviation": float(ours.std())}


if __name__ == "__main__":
    main()
