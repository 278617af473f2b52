"""`latentdiff generate`: pictures of prompts."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentdiff.commands.shared import (
    Output,
    add_engine,
    add_lora_dir,
    add_machine,
    add_model,
    add_settings,
    add_size,
    add_writing,
    file_and_rest,
    flags,
    given_settings,
    load,
    on_terminal,
    parse_loras,
    print_report,
    read_size,
    say,
    write_all,
    writing,
)
from latentdiff.commands.upscale import UPSCALER, load_upscaler, upscaled
from latentdiff.errors import InputError, StorageError, shown
from latentdiff.files import is_file, require_path
from latentdiff.generation.options import GENERATE, check_integer, options_of
from latentdiff.generation.recipe import FREE, recipe_place
from latentdiff.generation.request import Settings
from latentdiff.generation.rules import check_inputs
from latentdiff.interrupts import ending_at_once
from latentdiff.lora_tags import Weight, take_loras

if TYPE_CHECKING:
    from latentdiff.generation.result import GeneratedImage
    from latentdiff.generation.without_torch import Drawer
    from latentdiff.pipeline import Pipeline

HELP = "Generate pictures of one or more prompts."
AUTO = "auto"
# Besides those of `Settings`, what is heeded without torch too.
HEEDED = ("prompts", "out", "model", "size", "device", "dtype", "engine", "json", "metadata", "mark", "sign")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="text; none for a model that knows none")
    parser.add_argument(
        "-o",
        "--out",
        help="PNG, JPEG or WebP to write (several are fox.png, fox-2.png, ...) or folder; "
        "a PNG named by the prompt otherwise",
    )
    add_model(parser)
    add_lora_dir(parser)
    parser.add_argument(
        "--fast",
        action="store_true",
        help="draw in few calls, by the LoRA for that in the model's folder; options that are given count more",
    )
    parser.add_argument("--image", help="PNG, JPEG or WebP to start from")
    parser.add_argument(
        "--mask",
        metavar="FILE|alpha|L,T,R,B",
        help="part of --image to generate, while the rest stays: white in a picture of its size, transparent in it "
        "(alpha), or a box of its pixels",
    )
    add_size(parser)
    add_settings(parser, *GENERATE)
    parser.add_argument(
        "--best-of",
        type=int,
        default=1,
        metavar="N",
        help="generate N for each picture and keep the one that fits its prompt best, by the image-text model",
    )
    parser.add_argument(
        "--judge", metavar="FOLDER", help="image-text model of --best-of; that of the package otherwise"
    )
    parser.add_argument("--upscale", action="store_true", help="enlarge each picture, with its prompt and seed")
    parser.add_argument("--upscale-model", metavar="M", help=f"model that --upscale uses; {UPSCALER} by default")
    parser.add_argument("--attention", default="sdpa", help="sdpa (torch's own, default) or xformers (CUDA only)")
    parser.add_argument("--offload", action="store_true", help="keep networks in CPU memory while they do not run")
    add_writing(parser)
    add_machine(parser)
    add_engine(parser)


def run(options: argparse.Namespace) -> None:
    """Generate pictures of prompts."""
    chosen, prompts = given_settings(options) | read_size(options.size), options.prompts or [""]
    # Everything that can be refused without the model is, before it loads.
    check_inputs(chosen, image=options.image is not None, mask=options.mask is not None, names=flags(), asked=True)
    if options.upscale_model is not None and not options.upscale:
        raise InputError("--upscale-model says what enlarges the pictures, got no --upscale; add it")
    if not options.prompts and options.image is None and options.model is None:
        raise InputError('PROMPT is missing; say what to draw, as in latentdiff generate "a red fox"')
    among = check_integer("--best-of", options.best_of, 1, 100, "try 4")
    if options.judge is not None and among == 1:
        raise InputError("--judge says what chooses among pictures, got no --best-of; add it")
    prompts, named = _taken_loras(prompts, options.lora_dir)
    started, recipe = time.perf_counter(), _recipe_place(options, chosen)
    drawer = None if recipe is None else _find_drawer(recipe, prompts, chosen)
    if drawer is not None:
        _draw_without_torch(drawer, options, started)
        return
    with ending_at_once():  # some checks load torch
        settings = Settings(prompts=tuple(prompts), **chosen)
    fast = _fast_lora(options.model) if options.fast else {}
    embeddings, loras = _embeddings(options.embedding), {**fast, **parse_loras(options.lora), **named}
    if len(loras) < len(fast) + len(options.lora) + len(named):
        raise InputError("a LoRA must be given once, by --lora or in the prompt, got one twice; leave one of them out")
    output = _output(settings, options)
    started = time.perf_counter()
    pipe = _load(options, embeddings, loras)
    if not options.prompts and options.image is None and pipe.components.reads_text:
        raise InputError('this model needs a PROMPT, got none; say what to draw, as in "a red fox"')
    upscaler = load_upscaler(options.upscale_model, options) if options.upscale else None
    asked = chosen | ({"num_images": settings.num_images * among} if among > 1 else {})
    images = pipe.stream(prompts, image=options.image, mask=_mask(options.mask), progress=on_terminal(), **asked)
    if among > 1:
        images = _best(images, among, options, pipe)
    if upscaler is not None:
        images = _each_upscaled(upscaler, images)
    report = write_all(images, output, settings.count, options)
    print_report(report, options, seconds=round(time.perf_counter() - started, 3))
    if recipe is not None:
        _keep_recipe(pipe, recipe, chosen)


def _recipe_place(options: argparse.Namespace, chosen: Mapping[str, Any]) -> Path | None:
    """Return where the recipe is by which a request is drawn without torch; None for one that takes torch."""
    if options.engine not in ("openvino", AUTO) or not options.prompts:
        return None
    parser = argparse.ArgumentParser()
    add_options(parser)
    heeded = {*HEEDED, *options_of(Settings)}  # the others must be left at their defaults
    usual = {name: value for name, value in vars(parser.parse_args([])).items() if name not in heeded}
    if any(getattr(options, name) != value for name, value in usual.items()):
        return None
    how = {"device": options.device, "dtype": options.dtype, "engine": options.engine}
    return recipe_place(options.model, how, chosen)


def _find_drawer(recipe: Path, prompts: Sequence[str], chosen: Mapping[str, Any]) -> Drawer | None:
    with ending_at_once():  # it loads OpenVINO
        from latentdiff.generation.without_torch import find_drawer

        return find_drawer(recipe, prompts, chosen)


def _draw_without_torch(drawer: Drawer, options: argparse.Namespace, started: float) -> None:
    output = _output(drawer.settings, options)
    report = write_all(drawer.images(on_terminal()), output, drawer.settings.count, options)
    print_report(report, options, seconds=round(time.perf_counter() - started, 3))
    with _saying_what_is_not_kept():
        drawer.keep()


def _keep_recipe(pipe: Pipeline, place: Path, chosen: Mapping[str, Any]) -> None:
    from latentdiff.generation.make_recipe import keep_recipe

    with _saying_what_is_not_kept():
        keep_recipe(pipe.make_job("", **{name: value for name, value in chosen.items() if name not in FREE}), place)


@contextmanager
def _saying_what_is_not_kept() -> Iterator[None]:
    """Print a line where something that only saves time later cannot be written."""
    try:
        yield
    except StorageError as error:
        say(error)


def _output(settings: Settings, options: argparse.Namespace) -> Output:
    return Output(options.out, [settings.prompt(index) for index in range(settings.count)], writing(options))


def _load(
    options: argparse.Namespace, embeddings: Sequence[tuple[str, str | None]], loras: Mapping[str, Weight]
) -> Pipeline:
    pipe = load(
        options.model,
        options.device,
        options.dtype,
        prediction_type=options.prediction_type,
        vae=options.vae,
        attention=options.attention,
        offload=options.offload,
        engine=options.engine or "eager",
    )
    for file, word in embeddings:
        pipe = pipe.with_embedding(file, word)
    return pipe.with_loras(loras) if loras else pipe


def _fast_lora(model: str | None) -> dict[str, Weight]:
    """Return the file that makes a model draw in few calls, with its weight."""
    if model is not None and is_file(model):
        raise InputError(f"--fast takes what is in a model's folder, got the file {shown(model)}; give --lora FILE")
    from latentdiff.checkpoints.find import find_fast_lora

    return {str(find_fast_lora(model)): 1.0}


def _best(
    images: Iterator[GeneratedImage], among: int, options: argparse.Namespace, pipe: Pipeline
) -> Iterator[GeneratedImage]:
    from latentdiff.evaluate.best_of import keep_best
    from latentdiff.evaluate.judge import load_judge

    return keep_best(load_judge(options.judge, pipe.device), images, among)


def _each_upscaled(upscaler: Pipeline, images: Iterator[GeneratedImage]) -> Iterator[GeneratedImage]:
    for one in images:
        yield from upscaled(upscaler, one.image, one.prompt, seed=one.seed)


def _embeddings(given: Sequence[str]) -> list[tuple[str, str | None]]:
    """Return files with the words for them of "FILE" and "FILE:WORD"."""
    found: list[tuple[str, str | None]] = []
    for text in given:
        file, word = file_and_rest(text)
        if not is_file(file):
            raise InputError(f"--embedding names {shown(file)}, and there is no such file; check the path")
        found.append((file, word))
    return found


def _taken_loras(prompts: Sequence[str], folder: str | None) -> tuple[list[str], dict[str, Weight]]:
    """Return prompts without the LoRAs that they name, and these, where there is a folder of them."""
    if folder is None:
        return [*prompts], {}
    plain, loras = take_loras(prompts, require_path(folder, "a folder of LoRAs"))
    return plain, {str(file): weight for file, weight in loras.items()}


def _mask(text: str | None) -> str | list[int] | None:
    """Return the box of "10,20,40,50", or what else stands for a mask."""
    numbers = [] if text is None or is_file(text) else text.split(",")
    if len(numbers) > 1 and all(number.strip().isdecimal() and len(number) < 9 for number in numbers):
        return [int(number) for number in numbers]
    return text
