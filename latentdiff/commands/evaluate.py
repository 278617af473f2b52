"""`latentdiff evaluate`: how good a model is, in figures that carry their protocol."""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentdiff.commands.shared import (
    add_engine,
    add_lora,
    add_machine,
    add_settings,
    add_size,
    flags,
    given_settings,
    load,
    on_terminal,
    parse_loras,
    read_setting,
    read_size,
    warnings_as_lines,
)
from latentdiff.errors import InputError, shown
from latentdiff.generation.options import BOTH, check_integer
from latentdiff.generation.request import Settings
from latentdiff.generation.rules import check_inputs

if TYPE_CHECKING:
    from torch import Tensor

    from latentdiff.evaluate import Figure, Reference, Request
    from latentdiff.evaluate.processes import Processes, Way
    from latentdiff.pipeline import Pipeline
    from latentdiff.training.data.dataset import CaptionedImages

HELP = "Measure how good a model is, by pictures it draws and by captioned real ones."
SPLITS = ("train", "validation", "test")
# What `latentdiff.evaluate` has, which is not loaded to show the help.
METRICS = (
    *(
        "fid",
        "kid",
        "mmd",
        "precision_recall",
        "clip",
        "retrieval",
        "neighbours",
        "rfid",
        "psnr",
        "ssim",
        "lpips",
        "nll",
        "compose",
    ),
    *("inpainting", "upscaling", "memorised", "speed"),
)
FEATURES = ("image-text", "latents", "efficientnet-lite0", "inception", "dinov2", "clip")

LOADED = ("dtype", "engine")  # what is said where the model is loaded, and not in each call

# Settings that pictures of captions alone have no use for, or that say what the command says by itself.
LEFT_OUT = (
    *("seed", "num_images", "strength", "outpaint", "feather", "resampling", "scale"),
    *("variation_strength", "variation_seed", "blend_prompt", "blend"),
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("model", nargs="?", help="model folder, or `embedded`")
    parser.add_argument("--data", help="folder of captioned pictures, or of splits with such")
    parser.add_argument(
        "--recipe", metavar="FILE", help="config of a training, whose keep and drop choose among --data"
    )
    parser.add_argument("--pictures", metavar="FOLDER", help="pictures of any other model, measured in place of one")
    parser.add_argument("--prompts", metavar="FILE", help="JSON lines: what each of --pictures was to show")
    parser.add_argument("--metrics", default="kid,clip,retrieval", help=f"comma-separated, of {', '.join(METRICS)}")
    parser.add_argument(
        "--split", default="test", choices=SPLITS, metavar="SPLIT", help="train, validation or test (default)"
    )
    parser.add_argument("--n", type=int, help="pictures of each metric; unless given, what each takes by itself")
    parser.add_argument("--seed", type=int, default=0, help="picture i is drawn with SEED + i")
    parser.add_argument(
        "--features",
        default="image-text",
        help=f"network of distances: {', '.join(FEATURES)}; a folder may follow a colon",
    )
    parser.add_argument("--judge", metavar="FOLDER", help="image-text model, in place of the one of the package")
    parser.add_argument("--lpips-weights", metavar="FILE", help="of `python -m latentdiff.training.losses.lpips FILE`")
    parser.add_argument("--out", default="evaluation", help="folder of the report and of the pictures")
    parser.add_argument("--batch-size", type=int, help="pictures drawn together (default 16, 4 of over 128x128)")
    parser.add_argument(
        "--best-of", type=int, default=1, metavar="N", help="measure of N pictures the one that fits its text best"
    )
    parser.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="NAME=V,V,...",
        help="measure with each of several values of a setting, as in steps=4,8,25, or of dtype or engine; all "
        "combinations of several",
    )
    parser.add_argument("--compare", nargs=2, metavar=("A", "B"), help="two reports, in place of a model")
    parser.add_argument("--across", metavar="NAMES", help="settings that may differ between the reports of --compare")
    add_size(parser)
    add_settings(parser, *BOTH, leave_out=LEFT_OUT)
    add_lora(parser)
    add_engine(parser)
    add_machine(parser)


def run(options: argparse.Namespace) -> None:
    """Measure a model or pictures and write the report, or compare two reports."""
    if options.compare is not None:
        compare_reports(options)
        return
    from latentdiff.evaluate.features import check_features
    from latentdiff.evaluate.run import check_metrics

    names = options.metrics.split(",")
    settings = {name: value for name, value in given_settings(options).items() if name not in LEFT_OUT}
    settings |= read_size(options.size)
    _check_subject(options, settings)
    check_metrics(names)
    check_features(options.features)
    check_inputs(settings, image=False, mask=False, names=flags(), asked=True)
    combinations = _combinations(options.sweep)
    for one in combinations:
        Settings(prompts=("",), **{**settings, **_drawn_with(one)})
    if options.n is not None:
        check_integer("--n", options.n, 1, 1_000_000, "try 1000")
    loras, request = parse_loras(options.lora), _request(options, settings)
    if options.pictures is not None:
        _print(options, *_measured(options, request, None, None, names))
        return
    from latentdiff.evaluate.processes import joined, own_device

    model = _Model(options.model, own_device(options.device), loras)
    ways = [_way(options, one) for one in combinations]
    with joined() as processes, warnings_as_lines():
        if processes is not None and processes.number:
            processes.serve(model.load)
            return
        with processes.led() if processes is not None else nullcontext():
            if options.sweep:
                _sweep(options, request, list(zip(combinations, ways)), model, processes, names)
            else:
                _print(options, *_measured(options, request, model.load(*ways), processes, names))


class _Model:
    """The model, run in one way after another, of which one is held at a time."""

    def __init__(self, name: str, device: str | None, loras: Mapping[str, Any]) -> None:
        self.name, self.device, self.loras = name, device, loras
        self.held: Pipeline | None = None
        self.way: Way | None = None

    def load(self, way: Way) -> Pipeline:
        """Return the model, run in a way."""
        if self.held is None or self.way != way:
            self.held = None  # before the next takes its memory
            pipe = load(self.name, self.device, way.dtype, engine=way.engine)
            self.held, self.way = pipe.with_loras(self.loras) if self.loras else pipe, way
        return self.held


def _way(options: argparse.Namespace, combination: Mapping[str, Any]) -> Way:
    """Return how the model is run in a combination of a sweep.

    Raises:
        InputError, MissingDependencyError: it cannot be, here.
    """
    from latentdiff.devices import resolve_dtype
    from latentdiff.engine.execution import settle
    from latentdiff.evaluate.processes import Way

    chosen = {name: combination.get(name, getattr(options, name)) for name in LOADED}
    way = Way(resolve_dtype(chosen["dtype"]), chosen["engine"] or "eager")
    settle(options.device, way.dtype, way.engine)
    return way


def compare_reports(options: argparse.Namespace) -> None:
    """Print a table of two reports.

    Raises:
        InputError: nothing in them can be compared.
    """
    from latentdiff.evaluate.compare import ALONE, compare, comparison_lines
    from latentdiff.evaluate.report import read_report

    if options.model is not None or options.pictures is not None or options.sweep:
        raise InputError("--compare is of two reports, got something to measure besides; leave one of them out")
    (_, first), (_, second) = (read_report(Path(place)) for place in options.compare)
    called = {flag[2:]: name for name, flag in flags().items() if flag.startswith("--")}
    across = [called.get(name, name) for name in options.across.split(",")] if options.across else []
    found = compare(first, second, across)
    if options.json:
        print(json.dumps({"comparisons": [one.to_json() for one in found]}))
    else:
        for line in comparison_lines(found):
            print(line)
    if all(one.refused for one in found):
        reasons = "; ".join(f"{one.name}: {one.refused}" for one in found if one.refused not in ALONE)
        reasons = reasons or "no figure is in both"
        raise InputError(f"nothing in these reports can be compared ({reasons}); evaluate both in one way")


def _check_subject(options: argparse.Namespace, settings: Mapping[str, object]) -> None:
    if options.across is not None:
        raise InputError("--across is for --compare, got none; leave it out")
    if (options.model is None) == (options.pictures is None):
        got = "neither" if options.model is None else "both"
        raise InputError(f"a MODEL is measured, or a folder of --pictures, got {got}; pass one of them")
    if options.data is None and options.recipe is not None:
        raise InputError("--recipe chooses among the pictures of --data, got no --data; add it")
    if options.pictures is None and options.prompts is not None:
        raise InputError("--prompts says what --pictures show, got no --pictures; leave it out")
    if options.pictures is not None and (settings or options.lora or options.sweep or options.best_of != 1):
        raise InputError("--pictures are drawn already, got settings to draw with; leave them out")


def _request(options: argparse.Namespace, settings: Mapping[str, Any]) -> Request:
    from latentdiff.evaluate import Request

    together = options.batch_size
    return Request(
        out=Path(options.out),
        n=options.n,
        seed=check_integer("--seed", options.seed, 0, 2**62, "try 0"),
        settings=settings,
        features=options.features,
        judge=None if options.judge is None else Path(options.judge),
        lpips_weights=None if options.lpips_weights is None else Path(options.lpips_weights),
        batch_size=None if together is None else check_integer("--batch-size", together, 1, 1024, "try 4"),
        best_of=check_integer("--best-of", options.best_of, 1, 100, "try 4"),
        progress=on_terminal(),
    )


def _measured(
    options: argparse.Namespace,
    request: Request,
    pipe: Pipeline | None,
    processes: Processes | None,
    names: Sequence[str],
) -> tuple[Mapping[str, Any], list[Figure]]:
    """Return what was measured, and its figures, once their report is written."""
    from latentdiff.evaluate import Evaluation
    from latentdiff.evaluate.evaluation import drawn_size
    from latentdiff.evaluate.given import find_pictures
    from latentdiff.evaluate.run import METRICS as TABLE
    from latentdiff.evaluate.run import evaluate
    from latentdiff.images import open_image
    from latentdiff.scale.drawn import drawn_files

    given = None
    if options.pictures is not None:
        folder, prompts = Path(options.pictures), None if options.prompts is None else Path(options.prompts)
        given = find_pictures(folder, prompts, drawn_files(folder))
    references: Mapping[str, Reference] = {}
    if options.data is not None:
        size = open_image(given[0][0]).size if given else (0, 0)
        if pipe is not None:
            size = drawn_size(pipe, request.settings)
        found = request.out / "cache" if any(TABLE[name].of_training for name in names) else None
        references = open_references(options.data, options.split, size, found, options.recipe)
    return evaluate(Evaluation(request, pipe, references, given, processes), names)


def _print(options: argparse.Namespace, subject: Mapping[str, Any], figures: Sequence[Figure]) -> None:
    from latentdiff.evaluate.report import lines, report_tree

    if options.json:
        print(json.dumps(report_tree(figures, subject)))
        return
    for line in lines(figures):
        print(line)


def _combinations(sweeps: Sequence[str]) -> list[dict[str, Any]]:
    """Return all combinations of "steps=4,8" and others.

    Each has generation options by name, and what of `LOADED` is swept; that of no sweep is empty.
    """
    axes: list[list[tuple[str, Any]]] = []
    for text in sweeps:
        flag, equals, values = text.partition("=")
        if not equals or not values:
            raise InputError(f"--sweep must be a setting with values, got {shown(text)}; try steps=4,8,25")
        others: Mapping[str, Callable[[str], Any]] = {"dtype": _dtype, "engine": str}
        axis = [read_setting(flag, one, *BOTH, leave_out=LEFT_OUT, others=others) for one in values.split(",")]
        if any(axis[0][0] == other[0][0] for other in axes) or any(axis.count(one) > 1 for one in axis):
            raise InputError(f"--sweep names something twice, got {shown(text)}; leave that out")
        axes.append(axis)
    axes.sort(key=lambda axis: axis[0][0] not in LOADED)  # first, so that the model is loaded once for each
    return [dict(one) for one in itertools.product(*axes)]


def _dtype(text: str) -> str:
    from latentdiff.devices import resolve_dtype

    return str(resolve_dtype(text)).removeprefix("torch.")


def _drawn_with(combination: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of a combination is said in each call, and not where the model is loaded."""
    return {name: value for name, value in combination.items() if name not in LOADED}


def _check_tuned(pipe: Pipeline, settings: Mapping[str, Any]) -> None:
    """Raise InputError where settings ask for a tuned sampler of steps that the model has none of."""
    from latentdiff.diffusion.tuned import TUNED

    whole = Settings(prompts=("",), **{**pipe.components.defaults, **settings})
    if whole.sampler == TUNED:
        pipe.components.tuned_table(whole.num_inference_steps)


def _sweep(
    options: argparse.Namespace,
    request: Request,
    combinations: Sequence[tuple[Mapping[str, Any], Way]],
    model: _Model,
    processes: Processes | None,
    names: Sequence[str],
) -> None:
    from latentdiff.evaluate.report import report_tree
    from latentdiff.evaluate.sweep import Setting, folder_name, sweep_lines, write_sweep

    called, trees, found = flags(), [], []
    first = model.load(combinations[0][1])
    for one, _ in combinations:  # before any of them is drawn
        _check_tuned(first, {**request.settings, **_drawn_with(one)})
    for one, way in combinations:
        chosen = {called.get(name, name).lstrip("-"): value for name, value in one.items()}
        settings = {**request.settings, **_drawn_with(one)}
        own = replace(request, settings=settings, out=request.out / folder_name(chosen))
        subject, figures = _measured(options, own, model.load(way), processes, names)
        found.append(Setting(chosen, figures))
        trees.append({"sweep": chosen, **report_tree(figures, subject)})
    write_sweep(found, request.out)
    if options.json:
        print(json.dumps({"sweep": trees}))
        return
    for line in sweep_lines(found):
        print(line)


def open_references(
    folder: str, split: str, size: tuple[int, int], found: Path | None = None, recipe: str | None = None
) -> Mapping[str, Reference]:
    """Return the real pictures of a folder, by what they are used for: "test", and "train" where it is asked for.

    Args:
        split: of the pictures that are measured by.
        found: where to keep what is found of the pictures trained on; None to leave these out.
        recipe: see `training.config.data_config`.

    Raises:
        InputError: the folder or the split cannot be used, or pictures of the size are not square.
    """
    height, width = size
    if height != width:
        raise InputError(f"only square pictures can be measured beside real ones, got {width}x{height}")
    from latentdiff.training.config import data_config
    from latentdiff.training.data.dataset import load_images, open_lazily

    config = data_config(folder, height, recipe)
    references = {"test": _reference(folder, split, load_images(config, split))}
    if found is not None and split != "train":
        training = open_lazily(config, "train", found)  # read whenever they are asked for
        if training is not None:
            references["train"] = _reference(folder, "train", training)
    return references


def _reference(folder: str, split: str, data: CaptionedImages) -> Reference:
    """Return real pictures as they are measured by: squares on white."""
    import numpy as np

    from latentdiff.evaluate import Reference
    from latentdiff.images import to_tensor
    from latentdiff.training.data.dataset import composite

    def load_some(numbers: Sequence[int]) -> Tensor:
        return to_tensor(composite(np.stack([data.images[number] for number in numbers]), (255, 255, 255)))

    captions = [row["captions"][0] for row in data.rows]
    files = [sample.digest for sample in data.samples]
    return Reference(Path(folder).resolve().name, split, captions, data.rows, files, load_some)
