"""Measure and plot what each sampler makes of so many network calls, with the embedded model at its default guidance.

Two figures: how far the latents of 32 pictures are from those of 1,000 steps of the same equation (for samplers that
draw no noise), and concept retrieval of 100 prompts (`concept_retrieval.py`). Calls are counted, not steps.

    latentdiff data emoji data/emoji64 --size 64
    python tests/benchmarks/sampler_quality.py --data data/emoji64 --figures figures.json
    python tests/benchmarks/sampler_quality.py --figures figures.json --plot assets/sampler-quality.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from concept_retrieval import ROOT, concepts_asked, encode, nearest, whole_set
from latentdiff.training.config import load_config
from torch import Tensor
from tqdm import tqdm

from latentdiff import Pipeline
from latentdiff.diffusion import make_plan

CALLS = (4, 6, 8, 12, 16, 25, 50)
RETRIEVED_CALLS = (4, 8, 12, 25, 50)
EXACT = ("ddim", 1000)
DETERMINISTIC = (
    *("ddim", "heun", "dpm2", "lms", "dpmpp_2m", "dpmpp_2m_karras", "unipc", "unipc_karras", "deis"),
    "plms",
)
# ddpm is left out: on the embedded model's trailing timesteps it is euler_a.
RETRIEVED = ("ddim", "dpmpp_2m", "dpmpp_2m_karras", "unipc", "euler_a", "dpmpp_2m_sde", "dpmpp_3m_sde", "lcm")
BATCH = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder made by `latentdiff data emoji`; measures, and writes --figures")
    parser.add_argument("--figures", required=True, help="JSON file of what was measured")
    parser.add_argument("--plot", help="PNG file to draw")
    parser.add_argument("--compared", type=int, default=32, help="pictures compared with the exact ones")
    parser.add_argument("--prompts", type=int, default=100, help="prompts of the retrieval")
    parser.add_argument("--seed", type=int, default=0, help="of the first prompt's picture")
    arguments = parser.parse_args()
    file = Path(arguments.figures)
    if arguments.data:
        file.write_text(
            json.dumps(measure(arguments.data, arguments.compared, arguments.prompts, arguments.seed), indent=1) + "\n"
        )
    figures = json.loads(file.read_text())
    if arguments.plot:
        plot(figures, arguments.plot)
    print(json.dumps(figures))


def measure(folder: str, compared: int, prompts: int, seed: int) -> dict[str, Any]:
    """Return for each sampler its network calls with what they reach."""
    pipe = Pipeline.from_pretrained()
    trained = load_config(ROOT / "configs/emoji-diffusion.yaml").data
    things = concepts_asked(trained.model_copy(update={"folder": folder}), max(compared, prompts))
    texts = [thing for _, thing in things]
    exact = drawn(pipe, texts[:compared], *EXACT, seed)
    distances: dict[str, list[list[float]]] = {}
    for sampler in tqdm(DETERMINISTIC, desc="distances"):
        for calls in CALLS:
            steps, made = steps_for(pipe, sampler, calls)
            error = (drawn(pipe, texts[:compared], sampler, steps, seed) - exact).square().mean().sqrt()
            distances.setdefault(sampler, []).append([made, float(error)])
    drawings, concepts = whole_set(folder, trained.size, pipe.autoencoder)
    shares: dict[str, list[list[float]]] = {}
    for sampler in tqdm(RETRIEVED, desc="retrieval"):
        for calls in RETRIEVED_CALLS:
            steps, made = steps_for(pipe, sampler, calls)
            images = drawn(pipe, texts[:prompts], sampler, steps, seed, "pt") * 2 - 1
            pairs = zip(things, encode(pipe.autoencoder, images))
            hits = sum(concept in nearest(latent, drawings, concepts) for (concept, _), latent in pairs)
            shares.setdefault(sampler, []).append([made, hits / prompts])
    return {"compared": compared, "prompts": prompts, "exact": EXACT, "distance": distances, "top5": shares}


def drawn(pipe: Pipeline, texts: list[str], sampler: str, steps: int, seed: int, output_type: str = "latent") -> Tensor:
    options: dict[str, Any] = {"sampler": sampler, "num_inference_steps": steps, "output_type": output_type}
    return pipe(texts, seed=seed, batch_size=BATCH, **options).images


def steps_for(pipe: Pipeline, sampler: str, calls: int) -> tuple[int, int]:
    """Return the most steps that take no more than so many network calls, and how many they take."""
    made = {steps: len(make_plan(pipe.components.schedule, sampler, steps)) for steps in range(1, calls + 1)}
    steps = max(step for step, count in made.items() if count <= calls)
    return steps, made[steps]


def plot(figures: dict[str, Any], file: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    for axes, key, scale in ((left, "distance", 1.0), (right, "top5", 100.0)):
        for number, (sampler, points) in enumerate(figures[key].items()):
            calls, values = zip(*points)
            style = {"linewidth": 2.8, "zorder": 5} if sampler in ("euler_a", "unipc") else {"linewidth": 1.2}
            line = ("-", "--", ":")[number // 4]
            axes.plot(
                calls, [value * scale for value in values], line, marker="o", markersize=3, label=sampler, **style
            )
        axes.set_xscale("log")
        axes.set_xticks(CALLS, [str(calls) for calls in CALLS])
        axes.minorticks_off()
        axes.set_xlabel("calls of the network")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.16), frameon=False)
    left.set_yscale("log")
    left.set_ylabel(f"distance to {figures['exact'][1]:,} steps (RMS of a latent)")
    right.set_ylabel(f"concept among 5 nearest, % of {figures['prompts']}")
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    main()
