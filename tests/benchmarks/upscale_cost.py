"""Enlarge pictures by the pipeline: seconds and memory, beside what the plan says, and what windows change.

    python tests/benchmarks/upscale_cost.py --sizes 64 128 512
    python tests/benchmarks/upscale_cost.py --sizes --seams 160

Every picture is enlarged in a process of its own; memory is its largest resident size (VmHWM), and seconds are those of
the call, without loading. --seams enlarges some pictures in windows and at once, and tells how far the two are apart,
in values of 0 to 255, within a latent of where windows begin and end, and elsewhere; and how much the difference
changes from one pixel to the next, there and elsewhere. Prints one JSON line last.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2]))

from tiled_decoding import resident

import latentdiff.generation.upscale
from latentdiff import Pipeline

GALLERY = Path(__file__).parents[2] / "assets" / "gallery.png"
CELL = 67  # of the gallery: a drawing and the line beside it
SEAMS = 8  # pictures

# Those of the embedded upscaler.
DEFAULTS = {"num_inference_steps": 5, "guidance_scale": 1.0, "correction": "colour"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded-upscale")
    parser.add_argument("--sizes", type=int, nargs="*", default=[64, 128, 256], help="sides of the small pictures")
    parser.add_argument("--steps", type=int, default=DEFAULTS["num_inference_steps"])
    parser.add_argument("--prompt", default="")
    parser.add_argument("--seams", type=int, metavar="SIDE", help="of small pictures, enlarged in windows and at once")
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
    apart = seams(arguments, arguments.seams) if arguments.seams else None
    print(json.dumps({"model": arguments.model, "steps": arguments.steps, "sizes": figures, "seams": apart}))


def small_picture(size: int, number: int = 0) -> Image.Image:
    """Return a square of the gallery, `number` drawings from its left."""
    gallery = Image.open(GALLERY).convert("RGB")
    side, left = min(gallery.size), number * CELL
    return gallery.crop((left, 0, left + side, side)).resize((size, size), Image.Resampling.LANCZOS)


def seams(arguments: argparse.Namespace, size: int) -> dict[str, Any]:
    """Return how far pictures in windows are from the same at once, at the borders of windows and elsewhere."""
    pipe = Pipeline.from_pretrained(arguments.model, device="cpu")
    settings = DEFAULTS | {"num_inference_steps": arguments.steps}
    drawn: list[list[np.ndarray]] = []
    for at_once in (10**9, 0):
        latentdiff.generation.upscale.AT_ONCE = at_once
        smalls = [small_picture(size, number) for number in range(SEAMS)]
        results = [pipe(arguments.prompt, image=small, **settings).images[0] for small in smalls]
        drawn.append([np.asarray(picture, dtype=np.float64) for picture in results])
    windows, factor = pipe.upscale_plan(small_picture(size)).windows, pipe.autoencoder.config.downsample_factor
    if len(windows) == 1:
        raise SystemExit(f"--seams {size} is one window; take larger pictures")
    difference = np.stack(drawn[1]) - np.stack(drawn[0])  # (N, H, W, 3)
    change = np.abs(difference).max(axis=3)  # (N, H, W)
    jumps = np.zeros_like(change)  # largest step of the difference to the pixel above or at the left
    near, across = np.zeros_like(change[0], dtype=bool), np.zeros_like(change[0], dtype=bool)
    for axis, starts, side in ((0, windows.rows, windows.tall), (1, windows.columns, windows.wide)):
        ends = {place * factor for start in starts for place in (start, start + side)}
        places = np.array([place for place in ends if 0 < place < near.shape[axis]])
        pixels = np.expand_dims(np.arange(near.shape[axis]), 1 - axis)  # down or across the picture
        near |= (np.abs(pixels[..., None] + 0.5 - places) <= factor).any(axis=-1)
        across |= np.isin(pixels, places)
        steps = np.abs(np.diff(difference, axis=1 + axis)).max(axis=3)
        jumps = np.maximum(jumps, np.pad(steps, [(0, 0), (1 - axis, 0), (axis, 0)]))
    found: dict[str, Any] = {"pictures": SEAMS, "windows": len(windows), "share near borders": float(near.mean())}
    for name, values, chosen in (("change", change, near), ("jumps", jumps, across)):
        for place, of in (("at borders", values[:, chosen]), ("elsewhere", values[:, ~chosen])):
            found[f"{name} {place}"] = {
                "mean": float(of.mean()),
                "99.9 %": float(np.quantile(of, 0.999)),
                "most": float(of.max()),
                "most of each": of.max(axis=1).tolist(),
            }
    for name, values in found.items():
        print(f"{name}: {values}")
    return found


def enlarge(arguments: argparse.Namespace, size: int) -> None:
    """Enlarge one picture; print what it took."""
    pipe, small = Pipeline.from_pretrained(arguments.model, device="cpu"), small_picture(size)
    plan, begin = pipe.upscale_plan(small), time.perf_counter()
    pipe(arguments.prompt, image=small, **DEFAULTS | {"num_inference_steps": arguments.steps})
    seconds, peak = time.perf_counter() - begin, resident("VmHWM")
    print(json.dumps({"seconds": round(seconds, 2), "mb": round(peak), "plan": str(plan), "need": plan.need}))


if __name__ == "__main__":
    main()
