"""The commands that look at a model or a sampler, convert a model or measure it."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from latentdiff.commands.shared import load, parse_loras, warnings_as_lines
from latentdiff.errors import InputError, suggest

__all__ = ["convert", "evaluate", "inspect", "plan"]


def plan(options: argparse.Namespace) -> None:
    """Print a sampler's table."""
    from latentdiff.checkpoints import find_model, load_schedule
    from latentdiff.diffusion import make_plan

    folder, _ = find_model(options.model)
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


def _sum(weights: list[float], noise: float) -> str:
    names = [*(f"s{k}" for k in range(len(weights) - 1)), "D"]
    terms = [f"{weight:+.6g} {name}" for weight, name in zip(weights, names) if weight] or ["0"]
    return " ".join([*terms, *([f"{noise:+.6g} noise"] if noise else [])])


def inspect(options: argparse.Namespace) -> None:
    """Say what a model folder, weight file or drawn picture is."""
    path = Path(options.path) if options.path else None
    if path and path.suffix.lower() == ".png":
        from latentdiff.generation.result import read_record

        described = {"kind": "picture", **read_record(path)}
    else:
        from latentdiff.checkpoints import find_model
        from latentdiff.checkpoints.inspect import describe_file, describe_folder

        described = describe_file(path) if path and path.is_file() else describe_folder(find_model(options.path)[0])
    if options.json:
        print(json.dumps(described))
        return
    for key, value in described.items():
        print(f"{key}: {json.dumps(value) if isinstance(value, dict) else value}")


def convert(options: argparse.Namespace) -> None:
    """Write a model in another layout."""
    from latentdiff.checkpoints import load_pipeline, save_pipeline
    from latentdiff.checkpoints.lora import apply_loras
    from latentdiff.checkpoints.single_file import save_single_file
    from latentdiff.checkpoints.variant import save_variant
    from latentdiff.checkpoints.weights import storage_dtype
    from latentdiff.engine.place import DTYPES
    from latentdiff.generation.request import check_integer

    if options.rank is not None:
        check_integer("--rank", options.rank, 1, 4096, "try 32")
        if options.variant_of is None:
            raise InputError("--rank is of a difference from another model, got no --variant-of; add it")
    single = options.target.endswith(".safetensors")
    if single and options.variant_of is not None:
        raise InputError(f"a variant is a folder beside its base, got {options.target}; leave .safetensors out")
    dtype, loras = storage_dtype(options.dtype or "float16"), parse_loras(options.lora)
    # What is added to weights, or is to be stored as float8, is rounded once.
    computed = DTYPES["float32"] if loras or dtype not in DTYPES.values() else dtype
    with warnings_as_lines():
        components = load_pipeline(options.source, computed, prediction_type=options.prediction_type)
    components = apply_loras(components, loras)
    if options.variant_of is not None:
        save_variant(components, options.target, options.variant_of, dtype, options.rank)
    else:
        (save_single_file if single else save_pipeline)(components, options.target, dtype)
    print(options.target)


def evaluate(options: argparse.Namespace) -> None:
    """Measure how good a model is."""
    from latentdiff.evaluate import METRICS
    from latentdiff.generation.request import check_integer
    from latentdiff.images import to_tensor

    wanted = options.metrics.split(",")
    for name in wanted:
        if name not in METRICS:
            raise InputError(f"metric {name!r} is unknown{suggest(name, METRICS)}")
    count = check_integer("--images", options.images, 1, 1_000_000, "try 32")
    pipe = load(options.model, options.device, options.dtype)
    height, width = pipe.native_size
    if height != width:
        raise InputError(f"only models of square pictures can be measured, got {width}x{height}")
    from latentdiff.training.config import DataConfig
    from latentdiff.training.data.dataset import composite, load_images

    data = load_images(DataConfig(folder=options.data, size=height), options.split)
    images = to_tensor(composite(data.images[:count], (255, 255, 255))).to(pipe.device)
    captions = [row["captions"][0] for row in data.rows[:count]]
    figures = {name: METRICS[name](pipe.components, images, captions, progress=sys.stderr.isatty()) for name in wanted}
    if options.json:
        print(json.dumps({"model": pipe.components.name, "model_hash": pipe.components.model_hash, **figures}))
        return
    for name, values in figures.items():
        print("\n".join(_lines(values, name)))


def _lines(tree: dict[str, Any], name: str) -> list[str]:
    """Return one line for each figure of a tree: its path, mean and standard error."""
    lines = []
    for key, value in tree.items():
        if isinstance(value, dict) and "mean" in value:
            lines.append(f"{name}.{key}: {value['mean']:.4f} +- {value['standard_error']:.4f}")
        elif isinstance(value, dict):
            lines += _lines(value, f"{name}.{key}")
        else:
            lines.append(f"{name}.{key}: {value}")
    return lines
