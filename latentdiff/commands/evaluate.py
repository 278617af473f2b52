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
    from latentdiff.evaluate import Reference
    from latentdiff.pipeline import Pipeline

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
    parser.add_argument("--out", default="evaluation", help="folder of the report and of the pictures")
    parser.add_argument("--batch-size", type=int, default=4, help="pictures drawn together (default 4)")
    add_machine(parser)


def run(options: argparse.Namespace) -> None:
    """Measure a model and write the report."""
    from latentdiff.evaluate import Evaluation, Request, measure
    from latentdiff.evaluate.report import lines, report_tree, write_report
    from latentdiff.evaluate.run import check_metrics
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
        batch_size=check_integer("--batch-size", options.batch_size, 1, 1024, "try 4"),
        progress=on_terminal(),
    )
    figures = measure(Evaluation(request, pipe, open_references(options.data, options.split, pipe)), names)
    subject = {"model": pipe.components.name, "model_hash": pipe.components.model_hash}
    write_report(figures, subject, request.out)
    if options.json:
        print(json.dumps(report_tree(figures, subject)))
        return
    for line in lines(figures):
        print(line)


def open_references(folder: str, split: str, pipe: Pipeline) -> Mapping[str, Reference]:
    """Return the real pictures of a folder, by what they are used for: "test", and those trained on where they are.

    Raises:
        InputError: the folder or the split cannot be used, or the model's pictures are not square.
    """
    height, width = pipe.native_size
    if height != width:
        raise InputError(f"only models of square pictures can be measured, got {width}x{height}")
    return {"test": open_reference(folder, split, height)}


def open_reference(folder: str, split: str, size: int) -> Reference:
    """Return the real pictures of one split, squares of `size` on white."""
    from latentdiff.evaluate import Reference
    from latentdiff.images import to_tensor
    from latentdiff.training.config import DataConfig
    from latentdiff.training.data.dataset import composite, load_images

    data = load_images(DataConfig(folder=folder, size=size), split)

    def load_some(numbers: Sequence[int]) -> object:
        return to_tensor(composite(data.images[list(numbers)], (255, 255, 255)))

    captions = [row["captions"][0] for row in data.rows]
    return Reference(Path(folder).name, split, captions, data.rows, load_some)
