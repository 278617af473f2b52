"""Held-out errors of trained U-Nets, run by run, and how far each is from the first, paired picture by picture.

The errors are those of a run's log (`training.monitor.validation`), of more pictures: squared, unweighted, at fixed
timesteps under fixed noise, in four buckets of timesteps from little noise to much.

    python tests/benchmarks/held_out.py runs/trial-a:400 runs/trial-b:300     # checkpoints of these steps
    python tests/benchmarks/held_out.py runs/trial-a runs/trial-b             # the newest ones
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from accelerate import Accelerator

sys.path.insert(0, str(Path(__file__).parents[2]))

import latentdiff.training.monitor.validation as validation
from latentdiff.training.config import DiffusionTraining, load_config
from latentdiff.training.loop.checkpointing import checkpoint_folders
from latentdiff.training.loop.run import CONFIG_FILE, mixed_precision
from latentdiff.training.setup import load_components
from safetensors.torch import load_file

from latentdiff.checkpoints import Components

WEIGHTS = {"average": "ema", "live": "model"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN[:STEP]")
    parser.add_argument("--pictures", type=int, default=384)
    options = parser.parse_args()
    validation.PICTURES = options.pictures
    first: dict[str, np.ndarray] = {}
    figures: dict[str, dict[str, float]] = {}
    for run in options.runs:
        for weights, errors in errors_of(run).items():  # (buckets, pictures)
            of_pictures = errors.mean(axis=0)
            apart = of_pictures - first.setdefault(weights, of_pictures)
            interval = 1.96 * apart.std() / len(apart) ** 0.5
            figures[f"{run} {weights}"] = {"error": float(errors.mean()), "difference": float(apart.mean())}
            buckets = " ".join(f"{error:.4f}" for error in errors.mean(axis=1))
            print(f"{run} {weights}: {errors.mean():.4f} ({buckets})  {apart.mean():+.4f} +- {interval:.4f}")
    print(json.dumps(figures))


def errors_of(run: str) -> dict[str, np.ndarray]:
    """Return the held-out errors (buckets, pictures) of the averaged and the live weights of a checkpoint."""
    name, _, step = run.partition(":")
    folder = Path(name) / f"checkpoints/step-{int(step):08d}" if step else checkpoint_folders(Path(name))[0]
    config = load_config(str(Path(name) / CONFIG_FILE), [])
    assert isinstance(config, DiffusionTraining)
    components = load_components(config)
    assert isinstance(components, Components)
    samples = validation.load_held_out(config, components)
    assert samples is not None
    accelerator = Accelerator(
        cpu=True, mixed_precision=mixed_precision(config.run, components.unet.conv_in.weight.device)
    )
    found = {}
    for weights, part in WEIGHTS.items():
        components.unet.load_state_dict(load_file(folder / f"{part}.safetensors"))
        errors = validation.held_out_errors(components.unet.eval(), components, config, samples, accelerator)
        found[weights] = errors.numpy()
    return found


if __name__ == "__main__":
    main()
