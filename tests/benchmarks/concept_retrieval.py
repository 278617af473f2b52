"""Measure concept retrieval: do generated pictures look like drawings of what was asked for?

For each of 200 prompts ("a fox"), one picture is drawn with seed 0; its five nearest drawings of the whole emoji set,
by Euclidean distance between autoencoder latents, should include one of the prompted concept.

    latentdiff data emoji data/emoji64 --size 64
    python tests/benchmarks/concept_retrieval.py --data data/emoji64
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import numpy as np
import torch
from latentdiff.training.config import DataConfig, load_config
from latentdiff.training.data.dataset import composite, load_images
from torch import Tensor

from latentdiff import Pipeline
from latentdiff.checkpoints import load_pipeline
from latentdiff.images import to_tensor

ROOT = Path(__file__).parents[2]
NEAREST = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder made by `latentdiff data emoji`")
    parser.add_argument("--model", default=None, help="model folder; the embedded model by default")
    parser.add_argument("--config", default=str(ROOT / "configs/emoji-diffusion.yaml"), help="names its concepts")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--guidance", type=float, default=None)
    arguments = parser.parse_args()
    trained = load_config(arguments.config).data
    things = concepts_asked(trained.model_copy(update={"folder": arguments.data}), arguments.prompts)
    components = load_pipeline(arguments.model)
    latents, concepts = whole_set(arguments.data, trained.size, components.autoencoder)
    pipe = Pipeline(components)
    settings = {} if arguments.guidance is None else {"guidance_scale": arguments.guidance}
    hits, first, missed = 0, 0, []
    for concept, thing in things:
        picture = pipe(thing, seed=0, output_type="pt", **settings).images  # (1, 3, H, W) in [0, 1]
        found = nearest(encode(components.autoencoder, picture * 2 - 1)[0], latents, concepts)
        first += found[0] == concept
        if concept in found:
            hits += 1
        else:
            missed.append(f"{thing} -> {found[0]}")
    print("missed:", "; ".join(missed))
    count = len(things)
    print(f"among the first {NEAREST}: {hits} of {count} = {hits / count:.1%}; the first itself: {first / count:.1%}")
    print(json.dumps({"prompts": count, "top5": hits / count, "top1": first / count, "drawings": len(concepts)}))


def concepts_asked(config: DataConfig, count: int) -> list[tuple[str, str]]:
    """Return `count` (concept, "a thing") pairs drawn with a fixed seed from the concepts the model was trained on."""
    rows = load_images(config).rows
    things = sorted({(row["concept"], row["thing"]) for row in rows if not row["variant"]})
    return random.Random(0).sample(things, min(count, len(things)))


@torch.no_grad()
def encode(autoencoder: torch.nn.Module, images: Tensor) -> Tensor:
    """Return flat latents (N, C*h*w) of images (N, 3, H, W) in [-1, 1]."""
    return torch.cat([autoencoder.encode(part).mode() for part in images.split(64)]).flatten(1)


def whole_set(folder: str, size: int, autoencoder: torch.nn.Module) -> tuple[Tensor, np.ndarray]:
    """Return the latents (N, D) and concept names (N,) of every drawing of every split, on white."""
    latents, concepts = [], []
    for split in ("train", "validation", "test"):
        data = load_images(DataConfig(folder=folder, size=size), split)
        latents.append(encode(autoencoder, to_tensor(composite(data.images, (255, 255, 255)))))
        concepts += [row["concept"] for row in data.rows]
    return torch.cat(latents), np.array(concepts)


def nearest(latent: Tensor, latents: Tensor, concepts: np.ndarray, without: int | None = None) -> list[str]:
    """Return the concepts of the `NEAREST` drawings, nearest first, leaving out the one with the number `without`."""
    distances = (latents - latent).square().sum(dim=1)
    if without is not None:
        distances[without] = torch.inf
    return concepts[distances.topk(NEAREST, largest=False).indices.numpy()].tolist()


if __name__ == "__main__":
    main()
