"""`latentdiff plan`: the table of numbers that a sampler is."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from latentdiff.commands.shared import load_torch
from latentdiff.errors import InputError, shown
from latentdiff.generation.options import check_integer

if TYPE_CHECKING:
    from latentdiff.diffusion import Plan

HELP = "Print a sampler's table."


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("--sampler", default="euler_a")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--model", help="model folder whose noise schedule is used; the embedded one by default")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(options: argparse.Namespace) -> None:
    """Print a sampler's table."""
    check_integer("--steps", options.steps, 1, 1000, "try 25")
    load_torch()
    from latentdiff.checkpoints import find_model, load_schedule
    from latentdiff.diffusion import make_plan
    from latentdiff.diffusion.tuned import TUNED

    folder, name = find_model(options.model)
    if options.sampler == TUNED:
        table = _tuned(folder, name, options.steps)
    else:
        table = make_plan(load_schedule(folder), options.sampler, options.steps)
    if options.json:
        numbers = {
            "timesteps": table.timesteps,
            "sigmas": table.sigmas,
            "matrices": table.matrices,
            "noise": table.noise,
        }
        print(json.dumps({name: value.tolist() for name, value in numbers.items()}))
        return
    slots = table.noise.shape[1]
    counted = f"{len(table)} rows, {slots} slot{'s' * (slots > 1)}"
    print(f"{options.sampler}, {counted}; initial noise x {table.init_noise_sigma:.6g}")
    print("  i  timestep       sigma  new slots as sums of the old ones and D = denoise(slot 0, sigma)")
    for i in range(len(table)):
        rows = [_sum(table.matrices[i, k].tolist(), float(table.noise[i, k])) for k in range(slots)]
        print(f"{i:3d} {table.timesteps[i]:9.2f} {table.sigmas[i]:11.5g}  " + "   ".join(rows))


def _tuned(folder: Path, name: str, steps: int) -> Plan:
    """Return the table of a model's own sampler."""
    from latentdiff.checkpoints import load_schedule
    from latentdiff.checkpoints.tuned_sampler import read_tuned

    found = read_tuned(folder)
    if found is None:
        raise InputError(f"{shown(name)} has no tuned sampler; make one with latentdiff distill")
    return found.table(load_schedule(folder), steps).plan()


def _sum(weights: list[float], noise: float) -> str:
    names = [*(f"s{k}" for k in range(len(weights) - 1)), "D"]
    terms = [f"{weight:+.6g} {name}" for weight, name in zip(weights, names) if weight] or ["0"]
    return " ".join([*terms, *([f"{noise:+.6g} noise"] if noise else [])])
