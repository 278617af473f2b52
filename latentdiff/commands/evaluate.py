"""`latentdiff evaluate`: how good a model is, in figures that carry their protocol."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from latentdiff.commands.shared import add_machine, load, on_terminal
from latentdiff.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from latentdiff.evaluate import Reference
    from latentdiff.pipeline import Pipeline
    from latentdiff.training.data.dataset import CaptionedImages

HELP = "Measure how good a model is, by pictures it draws and by captioned real ones."
SPLITS = ("train", "validation", "test")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("model", help="model folder, or `embedded`")
    parser.add_argument("--data", required=True, help="folder of captioned pictures, or of splits with such")
    parser.add_argument("--metrics", default="kid,clip,retrieval", help="comma-separated; see docs/evaluation.md")
    parser.add_argument("--split", default="test", choices=SPLITS, metavar="SPLIT", help="train, validation or test")
    parser.add_argument("--n", type=int, help="pictures of each metric; unless given, what each takes by itself")
    parser.add_argument("--seed", type=int, default=0, help="picture i is drawn with SEED + i")
    parser.add_argument("--features", default="image-text", help="network of distances (default image-text)")
    parser.add_argument("--judge", metavar="FOLDER", help="image-text model, in place of the one of the package")
    parser.add_argument("--lpips-weights", metavar="FILE", help="of `python -m latentdiff.training.losses.lpips FILE`")
    parser.add_argument("--out", default="evaluation", help="folder of the report and of the pictures")
    parser.add_argument("--batch-size", type=int, default=4, help="pictures drawn together (default 4)")
    add_machine(parser)


def run(options: argparse.Namespace) -> None:
    """Measure a model and write the report."""
    from latentdiff.evaluate import Evaluation, Request, measure
    from latentdiff.evaluate.report import lines, report_tree, write_report
    from latentdiff.evaluate.run import OF_TRAINING_TOO, check_metrics
    from latentdiff.generation.options import check_integer

    names = options.metrics.split(",")
    check_metrics(names)
    if options.n is not None:
        check_integer("--n", options.n, 1, 1_000_000, "try 1000")
    pipe = load(options.model, options.device, options.dtype)
    request = Request(
        out=Path(options.out),
        n=options.n,
        seed=check_integer("--seed", options.seed, 0, 2**62, "try 0"),
        features=options.features,
        judge=None if options.judge is None else Path(options.judge),
        lpips_weights=None if options.lpips_weights is None else Path(options.lpips_weights),
        batch_size=check_integer("--batch-size", options.batch_size, 1, 1024, "try 4"),
        progress=on_terminal(),
    )
    found = None if OF_TRAINING_TOO.isdisjoint(names) else request.out / "cache"
    references = open_references(options.data, options.split, pipe, found)
    figures = measure(Evaluation(request, pipe, references), names)
    subject = {"model": pipe.components.name, "model_hash": pipe.components.model_hash}
    write_report(figures, subject, request.out)
    if options.json:
        print(json.dumps(report_tree(figures, subject)))
        return
    for line in lines(figures):
        print(line)


def open_references(folder: str, split: str, pipe: Pipeline, found: Path | None = None) -> Mapping[str, Reference]:
    """Return the real pictures of a folder, by what they are used for: "test", and "train" where it is asked for.

    Args:
        split: of the pictures that are measured by.
        found: where to keep what is found of the pictures trained on; None to leave these out.

    Raises:
        InputError: the folder or the split cannot be used, or the model's pictures are not square.
    """
    height, width = pipe.native_size
    if height != width:
        raise InputError(f"only models of square pictures can be measured, got {width}x{height}")
    references = {"test": open_reference(folder, split, height)}
    if found is not None and split != "train":
        references |= open_training(folder, height, found)
    return references


def open_reference(folder: str, split: str, size: int) -> Reference:
    """Return the real pictures of one split, squares of `size` on white."""
    from latentdiff.training.config import DataConfig
    from latentdiff.training.data.dataset import load_images

    return _reference(folder, split, load_images(DataConfig(folder=folder, size=size), split))


def open_training(folder: str, size: int, found: Path) -> dict[str, Reference]:
    """Return the pictures that a model was trained on, which are read whenever they are asked for; empty if none are.

    Args:
        found: folder in which is kept what is found of them.
    """
    from latentdiff.training.config import DataConfig
    from latentdiff.training.data.dataset import open_lazily

    data = open_lazily(DataConfig(folder=folder, size=size), "train", found)
    return {} if data is None else {"train": _reference(folder, "train", data)}


def _reference(folder: str, split: str, data: CaptionedImages) -> Reference:
    import numpy as np

    from latentdiff.evaluate import Reference
    from latentdiff.images import to_tensor
    from latentdiff.training.data.dataset import composite

    def load_some(numbers: Sequence[int]) -> Tensor:
        return to_tensor(composite(np.stack([data.images[number] for number in numbers]), (255, 255, 255)))

    captions = [row["captions"][0] for row in data.rows]
    return Reference(Path(folder).name, split, captions, data.rows, load_some)
