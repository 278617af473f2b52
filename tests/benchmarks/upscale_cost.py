"""Enlarge pictures by the pipeline: seconds and memory, beside what the plan says that it takes.

    python tests/benchmarks/upscale_cost.py
    python tests/benchmarks/upscale_cost.py --model embedded-upscale --sizes 64 512 --steps 25

Without --model the network has the shape of the embedded one, room for a small picture beside the latents, and random
weights, with which it is as fast as a trained one. Every picture is enlarged in a process of its own; memory is its
largest resident size (VmHWM), and seconds are those of the call, without loading. Prints one JSON line last.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2]))

from latentdiff import Pipeline
from latentdiff.checkpoints import load_pipeline
from latentdiff.diffusion import NoiseSchedule
from latentdiff.models.unet import UNet2DConditionModel

GALLERY = Path(__file__).parents[2] / "assets" / "gallery.png"
SIDE = 64  # of the small pictures that the model without --model is meant for


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="one that enlarges")
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 128, 256], help="sides of the small pictures")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--prompt", default="", help="guided towards, for twice the time, if there is one")
    parser.add_argument("--only", type=int, help=argparse.SUPPRESS)  # what the processes are called with
    arguments = parser.parse_args()
    if arguments.only:
        enlarge(arguments, arguments.only)
        return
    print(
        f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, {arguments.steps} steps"
    )
    figures = {}
    for size in arguments.sizes:
        command = [sys.executable, __file__, *sys.argv[1:], "--only", str(size)]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        figures[size] = one = json.loads(output.splitlines()[-1])
        print(f"{size} -> {4 * size}: {one['seconds']:.1f} s, {one['mb']:.0f} MB; planned: {one['plan']}", flush=True)
    print(json.dumps({"model": arguments.model, "steps": arguments.steps, "sizes": figures}))


def enlarge(arguments: argparse.Namespace, size: int) -> None:
    """Enlarge one picture; print what it took."""
    pipe = untrained() if arguments.model is None else Pipeline.from_pretrained(arguments.model, device="cpu")
    gallery = Image.open(GALLERY).convert("RGB")
    small = gallery.crop((0, 0, min(gallery.size), min(gallery.size))).resize((size, size), Image.Resampling.LANCZOS)
    plan, begin = pipe.upscale_plan(small), time.perf_counter()
    pipe(arguments.prompt, image=small, num_inference_steps=arguments.steps)
    seconds, lines = time.perf_counter() - begin, Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    peak = next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))
    print(json.dumps({"seconds": round(seconds, 2), "mb": round(peak), "plan": str(plan), "need": plan.need}))


def untrained() -> Pipeline:
    """Return a model of the embedded one's shape that enlarges."""
    parts = load_pipeline()
    assert parts.unet is not None
    config = replace(parts.unet.config, in_channels=7, num_class_embeds=1000, sample_size=SIDE)
    low = NoiseSchedule(beta_schedule="linear", class_name="DDPMScheduler")
    unet = UNet2DConditionModel(config).requires_grad_(False)
    return Pipeline(replace(parts, unet=unet, low_res_schedule=low, folder=None))


if __name__ == "__main__":
    main()
