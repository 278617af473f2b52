"""Compare averages made after a run with averages of the same widths kept during it, by precision of the snapshots.

    python tests/benchmarks/posthoc_ema.py
    python tests/benchmarks/posthoc_ema.py --steps 2000 --every 20

A tiny U-Net is trained on eight pictures on the CPU. Errors are norms over all weights, as shares of how far the
average is from the live weights; "model file" is what rounding it to float16 alone costs, as exported models are.
"rounding" is how many times larger than in one snapshot rounding errors are. Prints a table and a JSON line.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

from latentdiff.training.loop import posthoc_ema
from latentdiff.training.loop.checkpointing import load_latest
from latentdiff.training.loop.posthoc_ema import PowerEma, average_of, snapshots
from latentdiff.training.loop.state import RunState

from latentdiff.commands.train import train as cli_train
from tests.training.test_stages import pictures, recipe

WIDTHS = (0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.25)
PRECISIONS = (torch.float32, torch.float16, torch.bfloat16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--every", type=int, default=20, help="steps from snapshot to snapshot")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "diffusion"
        kept = train(Path(folder), arguments.steps, arguments.every)
        live = load_latest(run).tensors["model"]  # type: ignore[union-attr]
        read, rows = posthoc_ema._read, []
        count = len(snapshots(run))
        for width, average in kept.items():
            apart = distance(average.weights, live)
            row: dict[str, Any] = {"sigma_rel": width}
            for precision in PRECISIONS:
                posthoc_ema._read = lambda *given, to=precision: rounded(read(*given), to)
                found, row["profile"], row["rounding"] = average_of(run, width)
                row[str(precision).removeprefix("torch.")] = distance(found, average.weights) / apart
            row["model file"] = distance(rounded(average.weights, torch.float16), average.weights) / apart
            rows.append(row)
    weights = sum(tensor.numel() for tensor in live.values())
    print(f"{arguments.steps} steps of a U-Net with {weights:,} weights on the CPU, float32, {count} snapshots")
    print("  ".join(f"{name:>10}" for name in rows[0]))
    for row in rows:
        print("  ".join(f"{value:10.2g}" for value in row.values()))
    print(json.dumps({"steps": arguments.steps, "snapshots": count, "weights": weights, "rows": rows}))


def train(place: Path, steps: int, every: int) -> dict[float, PowerEma]:
    """Run the diffusion stage in a folder with float32 snapshots, and return averages that were kept all along."""
    pictures(place / "pictures", 8)
    cli_train(recipe(place, "autoencoder", run__steps=100, run__save_every=100), [], False, None)
    kept: dict[float, PowerEma] = {}
    average = RunState.average

    def also(state: RunState, model: Any) -> None:
        average(state, model)
        for width in WIDTHS:
            kept.setdefault(width, PowerEma(model, width)).update(model)

    posthoc_ema.STORED, RunState.average = torch.float32, also  # type: ignore[method-assign]
    length: dict[str, Any] = {"run__steps": steps, "run__save_every": steps, "run__ema_snapshots": every}
    cli_train(recipe(place, "diffusion", **length), [], False, None)
    return kept


def rounded(weights: dict[str, Tensor], precision: torch.dtype) -> dict[str, Tensor]:
    """Return weights as they come back from a file of some precision."""
    return {name: weight.to(precision).float() for name, weight in weights.items()}


def distance(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    """Return the norm of the difference of all weights."""
    return float(torch.stack([(weight - second[name]).norm() for name, weight in first.items()]).norm())


if __name__ == "__main__":
    main()
