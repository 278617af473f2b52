"""Enlarge held-out drawings: a trained super-resolution model against Lanczos, from clean and from degraded pictures.

    latentdiff data emoji data/emoji256 --size 256
    python tests/benchmarks/upscaling.py --data data/emoji256 --out assets/upscaling.png
    python tests/benchmarks/upscaling.py --data data/emoji256 --model runs/upscale/model --images 20 --noise-level 0

Each drawing of the test split is made small in two ways: clean (by Lanczos), and degraded (by `latentdiff/corruptions/`
at full strength, seeded). The model is told the first caption. Measured are PSNR and SSIM over the whole picture, what
the model is better by picture by picture, and the time and memory that it takes.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from PIL.Image import Resampling
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[2]))

from inpainting import mean_error
from latentdiff.training.config import DataConfig
from latentdiff.training.data.dataset import composite, open_held_out
from latentdiff.training.loop.run import save_grid
from latentdiff.training.losses.image import psnr, ssim
from tiled_decoding import resident

from latentdiff import Pipeline
from latentdiff.corruptions.degradation import degrade
from latentdiff.images import to_tensor

KINDS = ("clean", "degraded")
SHOWN = 3  # of each kind
METRICS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"psnr": psnr, "ssim": ssim}

# Those of the embedded upscaler.
DEFAULTS = {"num_inference_steps": 5, "guidance_scale": 1.0, "correction": "colour"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder made by `latentdiff data emoji` at --size or larger")
    parser.add_argument("--model", default="embedded-upscale", help="super-resolution model")
    parser.add_argument("--size", type=int, default=256, help="side of the large pictures in pixels")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--steps", type=int, help="these four: as `latentdiff upscale` has them by default")
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--noise-level", type=int)
    parser.add_argument("--correction")
    parser.add_argument("--seed", type=int, default=0, help="of the first picture and its degradation")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="PNG to draw: small picture, Lanczos, model, truth")
    arguments = parser.parse_args()
    pipe = Pipeline.from_pretrained(arguments.model, device=arguments.device)
    if not pipe.components.upscales:
        parser.error(f"{arguments.model} draws from text; name a model that enlarges pictures")
    data = open_held_out(DataConfig(folder=arguments.data, size=arguments.size), Path(), arguments.images, "test")
    if data is None or min(min(sample.size) for sample in data.samples) < arguments.size:
        parser.error(f"{arguments.data} has no test pictures of {arguments.size} px; make it with --size")
    chosen = {"num_inference_steps": arguments.steps, "guidance_scale": arguments.guidance}
    chosen |= {"noise_level": arguments.noise_level, "correction": arguments.correction}
    settings = DEFAULTS | {name: value for name, value in chosen.items() if value is not None}
    factor = pipe.autoencoder.config.downsample_factor
    truths = [composite(rgba, (255, 255, 255)) for rgba in data.images]  # each (H, W, 3) uint8
    captions = [row["captions"][0] for row in data.rows]
    before, cells, figures = resident("VmRSS"), list[np.ndarray](), dict[str, Any]()
    for kind in KINDS:
        small = [shrunk(truth, factor, kind, arguments.seed + number) for number, truth in enumerate(truths)]
        drawn, seconds = enlarge(pipe, small, captions, arguments.seed, settings)
        pictures = {
            "small": [resized(one, arguments.size, Resampling.NEAREST) for one in small],
            "lanczos": [resized(one, arguments.size, Resampling.LANCZOS) for one in small],
            "model": drawn,
            "truth": truths,
        }
        figures[kind] = measure(pictures) | {"seconds": seconds}
        report(kind, figures[kind])
        shown = np.linspace(0, len(data) - 1, min(SHOWN, len(data))).round().astype(int)
        cells += [ways[number] for number in shown for ways in pictures.values()]
    peak = resident("VmHWM")
    print(f"{arguments.device}, {torch.get_num_threads()} threads: {peak:.0f} MB at most, {before:.0f} before drawing")
    if arguments.out is not None:
        save_grid(to_tensor(np.stack(cells)), arguments.out, columns=len(pictures))
    print(json.dumps({"images": len(data), "factor": factor, "peak_mb": round(peak), **figures}))


def shrunk(picture: np.ndarray, factor: int, kind: str, seed: int) -> np.ndarray:
    """Return a picture (H, W, 3) uint8 as the model gets it, (H / factor, W / factor, 3)."""
    if kind == "clean":
        return resized(picture, picture.shape[0] // factor, Resampling.LANCZOS)
    return degrade(picture, factor, np.random.default_rng(seed), 1.0)


def resized(picture: np.ndarray, side: int, kernel: Resampling) -> np.ndarray:
    return np.asarray(Image.fromarray(picture).resize((side, side), kernel))


def enlarge(
    pipe: Pipeline, small: Sequence[np.ndarray], captions: Sequence[str], seed: int, settings: dict[str, Any]
) -> tuple[list[np.ndarray], float]:
    """Return what the model makes of each small picture, (H, W, 3) uint8, and its median seconds."""
    drawn, seconds = [], []
    for number, (picture, caption) in enumerate(zip(tqdm(small, desc="enlarging"), captions)):
        begin = time.perf_counter()
        result = pipe(caption, image=Image.fromarray(picture), seed=seed + number, **settings)
        seconds.append(time.perf_counter() - begin)
        drawn.append(np.asarray(result.images[0]))
    return drawn, float(np.median(seconds))


def measure(pictures: dict[str, list[np.ndarray]]) -> dict[str, Any]:
    """Return mean and standard error of PSNR in dB and SSIM, of Lanczos, of the model and of what it is better by."""
    found: dict[str, dict[str, Tensor]] = {}
    for name in ("lanczos", "model"):
        both = [to_tensor(np.stack(pair)).split(1) for pair in zip(pictures[name], pictures["truth"])]
        found[name] = {key: torch.stack([of(*pair).mean() for pair in both]) for key, of in METRICS.items()}
    found["gain"] = {key: found["model"][key] - value for key, value in found["lanczos"].items()}
    return {name: {key: mean_error(value) for key, value in values.items()} for name, values in found.items()}


def report(kind: str, figures: dict[str, Any]) -> None:
    """Print what was measured of one kind of small pictures."""
    print(f"{kind}, mean +- standard error; {figures['seconds']:.2f} s each")
    for name in ("lanczos", "model", "gain"):
        psnr_found, ssim_found = figures[name]["psnr"], figures[name]["ssim"]
        print(f"  {name:8} PSNR {psnr_found[0]:6.2f} +- {psnr_found[1]:.2f} dB", end=", ")
        print(f"SSIM {ssim_found[0]:7.4f} +- {ssim_found[1]:.4f}")


if __name__ == "__main__":
    main()
