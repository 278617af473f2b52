"""Complete held-out drawings under seeded masks: a trained inpainting model against the blend of the base model.

    latentdiff data emoji data/emoji64 --size 64
    python tests/benchmarks/inpainting.py --data data/emoji64 --out assets/inpainting.png
    python tests/benchmarks/inpainting.py --data data/emoji64 --recipe configs/emoji-diffusion.yaml
    python tests/benchmarks/inpainting.py --data data/emoji64 --trained runs/inpaint/model --images 50
    python tests/benchmarks/inpainting.py --data data/emoji64 --trained none

Each drawing of the test split, whose concepts no training has seen, is completed from its first caption, by both with
the same seed; with --recipe each drawing of the validation and test splits that this recipe would keep, so that of the
base model's own recipe they are unseen drawings of what it knows. Measured are PSNR inside the mask, whether the
concept is among the five nearest drawings of the whole set but this one (`concept_retrieval.py`; for the drawings
themselves it says what can be reached), whether all other pixels are those given, and the time beside that of a plain
generation.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[2]))

from concept_retrieval import NEAREST, encode, nearest, whole_set
from latentdiff.training.config import DataConfig, load_config
from latentdiff.training.data.dataset import composite, load_images
from latentdiff.training.data.sources import is_wanted
from latentdiff.training.loop.run import save_grid

from latentdiff import Pipeline
from latentdiff.corruptions.masks import draw_mask
from latentdiff.images import to_tensor

SHOWN, ENLARGED = 8, 2  # drawings in the grid, and how many times as large
TIMED = 10  # plain generations
LEAST_ERROR = 1 / 255  # RMS, in [0, 1]; a mask over plain white would else count without bound


@dataclass(frozen=True)
class Example:
    """A drawing, (H, W, 3) uint8 on white, its mask (H, W), and its number in the whole set counted from the end."""

    picture: np.ndarray
    mask: np.ndarray
    caption: str
    concept: str
    place: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder made by `latentdiff data emoji`")
    parser.add_argument("--trained", default="embedded-inpaint", help="inpainting model; none for the blend alone")
    parser.add_argument("--recipe", help="whose data.keep and data.drop choose among drawings")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, help="the pipeline's own by default")
    parser.add_argument("--seed", type=int, default=0, help="of the first mask and picture")
    parser.add_argument("--out", type=Path, help="PNG to draw: input, blend, trained, truth")
    arguments = parser.parse_args()
    base = Pipeline.from_pretrained(device="cpu")
    pipes = {"blend": base}
    if arguments.trained != "none":
        pipes["trained"] = Pipeline.from_pretrained(arguments.trained, device="cpu")
    examples = held_out(arguments.data, base.native_size[0], arguments.images, arguments.seed, arguments.recipe)
    height, width = base.native_size
    options: dict[str, Any] = {"num_inference_steps": arguments.steps, "height": height, "width": width}
    if arguments.guidance is not None:
        options["guidance_scale"] = arguments.guidance
    drawn, seconds = complete(pipes, base, examples, arguments.seed, options)
    drawn["truth"] = [example.picture for example in examples]
    if arguments.out is not None:
        draw_grid(examples, drawn, arguments.out)
    figures = measure(examples, drawn, base, arguments.data)
    report(figures, seconds, len(examples))


def held_out(folder: str, size: int, count: int, seed: int, recipe: str | None) -> list[Example]:
    """Return held-out drawings, evenly spread over them all, each with a mask of its own that leaves something."""
    found: list[tuple[np.ndarray, dict[str, Any]]] = []
    for split in ("validation", "test"):
        data = load_images(DataConfig(folder=folder, size=size), split)
        found += zip(data.images, data.rows)
    rules = None if recipe is None else load_config(recipe).data
    chosen = range(len(found) - len(data), len(found))
    if rules is not None:
        chosen = [number for number, (_, row) in enumerate(found) if is_wanted(row, rules)]
    examples = []
    for number, place in enumerate(np.linspace(0, len(chosen) - 1, min(count, len(chosen))).round().astype(int)):
        mask = draw_mask(np.random.default_rng([seed, number]), size, size, full=0.0)
        rgba, row = found[chosen[place]]
        caption, concept = row["captions"][0], row["concept"]
        examples.append(Example(composite(rgba, (255, 255, 255)), mask, caption, concept, chosen[place] - len(found)))
    return examples


def complete(
    pipes: dict[str, Pipeline], base: Pipeline, examples: Sequence[Example], seed: int, options: dict[str, Any]
) -> tuple[dict[str, list[np.ndarray]], dict[str, float]]:
    """Return the pictures (H, W, 3) uint8 that each pipeline completes, and the median seconds that one takes."""
    drawn: dict[str, list[np.ndarray]] = {name: [] for name in pipes}
    seconds: dict[str, list[float]] = {name: [] for name in ("plain", *pipes)}
    base("a fox", **options)  # warms up
    for number, example in enumerate(tqdm(examples, desc="completing")):
        given: dict[str, Any] = {"image": Image.fromarray(example.picture), "mask": Image.fromarray(example.mask)}
        if number < TIMED:
            begin = time.perf_counter()
            base(example.caption, seed=seed + number, **options)
            seconds["plain"].append(time.perf_counter() - begin)
        for name, pipe in pipes.items():
            begin = time.perf_counter()
            picture = pipe(example.caption, seed=seed + number, **given, **options).images[0]
            seconds[name].append(time.perf_counter() - begin)
            drawn[name].append(np.asarray(picture))
    return drawn, {name: float(np.median(taken[:TIMED])) for name, taken in seconds.items()}


def measure(
    examples: Sequence[Example], drawn: dict[str, list[np.ndarray]], base: Pipeline, folder: str
) -> dict[str, dict[str, Tensor]]:
    """Return for each way of completing what is found of each picture, (N,) float64."""
    latents, concepts = whole_set(folder, base.native_size[0], base.autoencoder)
    figures = {}
    for name, pictures in drawn.items():
        seen = encode(base.autoencoder, to_tensor(np.stack(pictures)))
        found = [
            example.concept in nearest(one, latents, concepts, without=len(concepts) + example.place)
            for example, one in zip(examples, seen)
        ]
        pairs = list(zip(examples, pictures))
        kept = [np.array_equal(picture[~one.mask], one.picture[~one.mask]) for one, picture in pairs]
        psnr = [psnr_inside(picture, one.picture, one.mask) for one, picture in pairs]
        values = {"psnr": psnr, "top5": found, "kept": kept}
        figures[name] = {key: torch.tensor(value, dtype=torch.float64) for key, value in values.items()}
    return figures


def psnr_inside(picture: np.ndarray, truth: np.ndarray, mask: np.ndarray) -> float:
    """Return the peak signal-to-noise ratio in dB of the pixels (H, W, 3) uint8 in a mask (H, W)."""
    difference = (picture[mask].astype(np.float64) - truth[mask]) / 255
    return float(-20 * np.log10(max(np.sqrt(np.square(difference).mean()), LEAST_ERROR)))


def report(figures: dict[str, dict[str, Tensor]], seconds: dict[str, float], count: int) -> None:
    """Print a table, what the trained model is better by, and one JSON line."""
    print(f"{count} held-out drawings, mean +- standard error")
    summary: dict[str, Any] = {"images": count, "seconds": seconds}
    for name, values in figures.items():
        summary[name] = {"top5": mean_error(values["top5"])}
        line = f"{name:8} concept among {NEAREST} {shown(values['top5'], 100, ' %')}"
        if name in seconds:
            kept = int(values["kept"].sum())
            summary[name] |= {"psnr": mean_error(values["psnr"]), "kept": kept}
            line += f", PSNR inside {shown(values['psnr'], 1, ' dB')}, all other pixels as given in {kept} of {count}, "
            line += f"{seconds[name]:.2f} s, {seconds[name] / seconds['plain']:.2f} x a plain generation"
        print(line)
    if "trained" in figures:
        gains = {key: figures["trained"][key] - figures["blend"][key] for key in ("psnr", "top5")}
        summary["gain"] = {key: mean_error(gain) for key, gain in gains.items()}
        print(f"trained - blend, of each drawing: {shown(gains['psnr'], 1, ' dB')}, {shown(gains['top5'], 100, ' %')}")
    print(json.dumps(summary))


def mean_error(values: Tensor) -> tuple[float, float]:
    """Return the mean of independent values and its standard error."""
    return float(values.mean()), float(values.std() / len(values) ** 0.5)


def shown(values: Tensor, scale: float, unit: str) -> str:
    mean, error = mean_error(values)
    return f"{scale * mean:.2f} +- {scale * error:.2f}{unit}"


def draw_grid(examples: Sequence[Example], drawn: dict[str, list[np.ndarray]], file: Path) -> None:
    """Draw rows of the input, its mask in grey, what was made of it, and the truth."""
    cells: list[np.ndarray] = []
    for number in np.linspace(0, len(examples) - 1, min(SHOWN, len(examples))).round().astype(int).tolist():
        example = examples[number]
        cells.append(np.where(example.mask[..., None], np.uint8(128), example.picture))
        cells += [pictures[number] for pictures in drawn.values()]
    large = np.stack(cells).repeat(ENLARGED, axis=1).repeat(ENLARGED, axis=2)  # (N, H, W, 3)
    save_grid(to_tensor(large), file, columns=1 + len(drawn))


if __name__ == "__main__":
    main()
