"""`latentdiff upscale`: a picture enlarged by a model trained for it, as `generate --upscale` does too."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentdiff.commands.shared import (
    Output,
    add_engine,
    add_lora,
    add_machine,
    add_settings,
    add_writing,
    given_settings,
    load,
    on_terminal,
    parse_loras,
    print_report,
    say,
    write_all,
    writing,
)
from latentdiff.errors import InputError, shown
from latentdiff.generation.options import UPSCALE
from latentdiff.generation.request import Settings
from latentdiff.interrupts import ending_at_once

if TYPE_CHECKING:
    from PIL import Image

    from latentdiff.generation.result import GeneratedImage
    from latentdiff.pipeline import Pipeline

HELP = "Enlarge a picture, by a model trained for it."
UPSCALER = "embedded-upscale"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("image", help="PNG, JPEG or WebP of any size; the result is transparent where it is")
    parser.add_argument(
        "-o", "--out", help="PNG, JPEG or WebP to write, or folder; IMAGE-x4.png beside IMAGE by default"
    )
    parser.add_argument(
        "--prompt", default="", metavar="TEXT", help="text that describes it; may help, may be left out"
    )
    parser.add_argument("--model", help=f"folder, or owner/name on a hub; {UPSCALER} by default")
    add_lora(parser)
    add_settings(parser, *UPSCALE, leave_out=("num_images",))
    add_writing(parser)
    add_machine(parser)
    add_engine(parser)


def run(options: argparse.Namespace) -> None:
    """Enlarge a picture."""
    chosen = given_settings(options)
    with ending_at_once():  # some checks load torch
        Settings(prompts=(options.prompt,), **chosen)  # what can be refused without the model is, before it loads
        from latentdiff.generation.masks import open_picture
    loras = parse_loras(options.lora)
    open_picture(options.image, "image")
    source = Path(options.image)
    default = source.with_name(f"{source.stem}-x{options.scale or 4}.png")
    output = Output(options.out, [options.prompt], writing(options), default)
    started = time.perf_counter()
    pipe = load_upscaler(options.model, options)
    pipe = pipe.with_loras(loras) if loras else pipe
    report = write_all(upscaled(pipe, options.image, options.prompt, **chosen), output, 1, options)
    print_report(report, options, seconds=round(time.perf_counter() - started, 3))


def load_upscaler(model: str | None, options: argparse.Namespace) -> Pipeline:
    """Load a model that upscales pictures, where the options of the command say."""
    pipe = load(model or UPSCALER, options.device, options.dtype, engine=options.engine or "eager")
    if not pipe.components.upscales:
        raise InputError(f"{shown(model)} draws pictures and enlarges none; pass a model that does, such as {UPSCALER}")
    return pipe


def upscaled(pipe: Pipeline, image: str | Image.Image, prompt: str, **chosen: Any) -> Iterator[GeneratedImage]:
    """Yield a picture enlarged; say first how, where that is in several windows."""
    plan = pipe.upscale_plan(image)
    if len(plan.windows) > 1:
        say(plan)
    return pipe.stream(prompt, image=image, progress=on_terminal(), **chosen)
