"""Measure and plot how near each sampler comes to the exact solution in so many network calls, with the embedded model.

The distance is that of the latents of 32 pictures, at the model's default guidance, to those of 1,000 steps of the same
equation, so it is of samplers that draw no noise. Calls are counted, not steps. What the pictures are worth is another
question, which `latentdiff evaluate --sweep sampler=...` answers.

    python tests/benchmarks/sampler_distance.py --figures figures.json --plot assets/sampler-distance.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib
from torch import Tensor
from tqdm import tqdm

from latentdiff import Pipeline
from latentdiff.diffusion import make_plan

matplotlib.use("Agg")

from matplotlib import pyplot

CALLS = (4, 6, 8, 12, 16, 25, 50)
EXACT = ("ddim", 1000)
SAMPLERS = (
    *("ddim", "heun", "dpm2", "lms", "dpmpp_2m", "dpmpp_2m_karras", "unipc", "unipc_karras", "deis"),
    "plms",
)
PROMPTS = ("a fox", "a cat", "an owl", "a pizza", "a red car", "a house", "a guitar", "a smiling face")
BATCH = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--figures", required=True, type=Path, help="JSON file to write, or to plot again where it exists"
    )
    parser.add_argument("--plot", help="PNG file to draw")
    parser.add_argument("--pictures", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0, help="of the first picture")
    arguments = parser.parse_args()
    if not arguments.figures.exists():
        found = measure(arguments.pictures, arguments.seed)
        arguments.figures.write_text(json.dumps(found, indent=1) + "\n")
    figures = json.loads(arguments.figures.read_text())
    if arguments.plot:
        plot(figures, arguments.plot)
    print(json.dumps(figures))


def measure(pictures: int, seed: int) -> dict[str, list[tuple[int, float]]]:
    """Return for each sampler pairs of network calls and the distance that they leave."""
    pipe = Pipeline.from_pretrained()
    exact = drawn(pipe, *EXACT, pictures, seed)
    found: dict[str, list[tuple[int, float]]] = {}
    for sampler in tqdm(SAMPLERS):
        for calls in CALLS:
            steps, made = steps_for(pipe, sampler, calls)
            error = (drawn(pipe, sampler, steps, pictures, seed) - exact).square().mean().sqrt()
            found.setdefault(sampler, []).append((made, error.item()))
    return found


def drawn(pipe: Pipeline, sampler: str, steps: int, pictures: int, seed: int) -> Tensor:
    """Return the latents (N, C, h, w) of pictures of the prompts in turn."""
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(pictures)]
    made = pipe(prompts, seed=seed, batch_size=BATCH, sampler=sampler, num_inference_steps=steps, output_type="latent")
    assert isinstance(made.images, Tensor)
    return made.images


def steps_for(pipe: Pipeline, sampler: str, calls: int) -> tuple[int, int]:
    """Return the most steps that take no more than so many network calls, and how many they take."""
    made = {steps: len(make_plan(pipe.components.schedule, sampler, steps)) for steps in range(1, calls + 1)}
    steps = max(step for step, count in made.items() if count <= calls)
    return steps, made[steps]


def plot(figures: dict[str, list[tuple[int, float]]], file: str) -> None:
    """Draw the distances over the calls."""
    figure, axes = pyplot.subplots(figsize=(7, 4.4), layout="constrained")
    for number, (sampler, points) in enumerate(figures.items()):
        calls, values = zip(*points, strict=True)
        style = {"linewidth": 2.8, "zorder": 5} if sampler == "unipc" else {"linewidth": 1.2}
        axes.plot(calls, values, ("-", "--", ":")[number // 4], marker="o", markersize=3, label=sampler, **style)
    axes.set_xscale("log")
    axes.set_xticks(CALLS, [str(calls) for calls in CALLS])
    axes.minorticks_off()
    axes.set_xlabel("calls of the network")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, ncols=5, loc="upper center", bbox_to_anchor=(0.5, -0.16), frameon=False)
    axes.set_yscale("log")
    axes.set_ylabel(f"distance to {EXACT[1]:,} steps (RMS of a latent)")
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    main()
