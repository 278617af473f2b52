"""Train on a Ray cluster: `latentdiff train` in processes that Ray Train starts, and starts again when one is lost.

    python examples/training_nodes/ray_train.py recipe.yaml --workers 16 --address auto --out /disk/run
    python examples/training_nodes/ray_train.py configs/emoji-diffusion.yaml --workers 2 --cpu --out runs/emoji
    python examples/training_nodes/ray_train.py recipe.yaml --encode --workers 64 --address auto --out /disk/run

The loop is that of the command: every worker reads the pictures itself and takes its share of each batch, and the first
one writes the run folder, which all machines must see under one path. When a worker or a machine is lost, Ray ends the
others and begins again with as many, from the newest checkpoint. Its weights are those of a run without loss. With
--encode they share out the latents and text states of the run, and train nothing.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

LONGEST_WAIT = 2 * 24 * 3600  # seconds in which the first process may examine pictures while the others wait


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="as of latentdiff train")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="A.B=VALUE")
    parser.add_argument("--out", required=True, help="run folder, on a disk that all machines see")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")
    parser.add_argument("--encode", action="store_true", help="as of latentdiff train")
    parser.add_argument("--workers", type=int, required=True, metavar="N", help="processes, each with a GPU")
    parser.add_argument("--cpu", action="store_true", help="processes with a core each instead")
    parser.add_argument("--address", help="of the cluster, such as auto; one on this machine by default")
    parser.add_argument("--failures", type=int, default=100, metavar="N", help="losses after which it ends")
    options = parser.parse_args()
    out = Path(options.out).resolve()
    if not (options.resume or options.encode) and any(out.glob("checkpoints/step-*")):
        parser.error(f"{out} has a checkpoint; add --resume to go on, or choose another --out")
    recipe: dict[str, Any] = {"config": str(Path(options.config).resolve()), "overrides": options.overrides}
    recipe |= {"out": str(out), "encode": options.encode}
    ray.init(address=options.address, log_to_driver=True)
    result = TorchTrainer(
        train,
        train_loop_config={**recipe, "cpu": options.cpu, "folder": os.getcwd()},
        torch_config=TorchConfig(timeout_s=LONGEST_WAIT),
        scaling_config=ScalingConfig(num_workers=options.workers, use_gpu=not options.cpu),
        run_config=RunConfig(
            name=out.name,
            storage_path=str(out.parent / ".ray_train"),  # what Ray notes for itself
            failure_config=FailureConfig(max_failures=options.failures),
        ),
    ).fit()
    print(json.dumps({"out": str(out), "error": None if result.error is None else str(result.error)}))


def train(recipe: dict[str, Any]) -> None:
    """Be one of the processes; Ray has told each its rank, and where the first one is."""
    if recipe["cpu"]:
        os.environ["ACCELERATE_USE_CPU"] = "true"
    os.chdir(recipe["folder"])  # which relative paths of the recipe begin at
    from latentdiff.commands import train as command

    if recipe["encode"]:
        command.encode(recipe["config"], recipe["overrides"], recipe["out"])
    else:  # from a checkpoint, where there is one
        command.train(recipe["config"], recipe["overrides"], True, recipe["out"])


if __name__ == "__main__":
    main()
