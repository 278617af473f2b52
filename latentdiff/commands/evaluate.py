"""`latentdiff evaluate`: how good a model is on captioned pictures."""

from __future__ import annotations

import argparse
import json
from typing import Any

from latentdiff.commands.shared import add_machine, load, on_terminal
from latentdiff.errors import InputError, suggest

HELP = "Measure how good a model is on captioned pictures."


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("model", help="model folder, or `embedded`")
    parser.add_argument("--data", required=True, help="folder of captioned pictures, or of splits with such")
    parser.add_argument("--metrics", default="nll", help="nll: bits per dimension (the only one so far)")
    parser.add_argument(
        "--split",
        default="test",
        choices=["train", "validation", "test"],
        metavar="SPLIT",
        help="train, validation or test (default)",
    )
    parser.add_argument("--images", type=int, default=32, help="how many pictures are measured (default 32)")
    add_machine(parser)


def run(options: argparse.Namespace) -> None:
    """Measure how good a model is."""
    from latentdiff.evaluate import METRICS
    from latentdiff.generation.options import check_integer
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
    from latentdiff.training.config import data_config
    from latentdiff.training.data.dataset import composite, load_images

    data = load_images(data_config(options.data, height), options.split)
    images = to_tensor(composite(data.images[:count], (255, 255, 255))).to(pipe.device)
    captions = [row["captions"][0] for row in data.rows[:count]]
    figures = {name: METRICS[name](pipe.components, images, captions, progress=on_terminal()) for name in wanted}
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
