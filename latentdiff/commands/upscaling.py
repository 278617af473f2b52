"""`latentdiff upscale`: a picture made larger by a model trained for it, as `generate --upscale` does too."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentdiff.commands.shared import draw, load, output_paths, parse_loras, report
from latentdiff.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

    from latentdiff.generation.result import Result
    from latentdiff.pipeline import Pipeline

__all__ = ["enlarge", "load_upscaler", "upscale"]

UPSCALER = "embedded-upscale"
# By default; what a small picture leaves open is little, so it takes few steps and is not steered far.
DEFAULTS = {"num_inference_steps": 5, "guidance_scale": 1.0, "correction": "colour"}


def upscale(options: argparse.Namespace) -> None:
    """Make a picture larger."""
    from latentdiff.generation.masks import open_picture
    from latentdiff.generation.request import Settings

    chosen = {
        "seed": options.seed,
        "scale": options.scale,
        "noise_level": options.noise_level,
        "correction": options.correction,
        "num_inference_steps": options.steps,
        "guidance_scale": options.guidance,
    }
    chosen = {name: value for name, value in chosen.items() if value is not None}
    # Everything that can be wrong without a model is found before one is loaded.
    Settings(prompts=(options.prompt,), **chosen)
    loras = parse_loras(options.lora)
    open_picture(options.image, "image")
    source = Path(options.image)
    name = f"{source.stem}-x{options.scale or 4}"
    (path,) = output_paths(options.out or str(source.with_name(f"{name}.png")), [name])
    started = time.perf_counter()
    pipe = load_upscaler(options.model, options.device, options.dtype)
    pipe = pipe.with_loras(loras) if loras else pipe
    result = enlarge(pipe, options.image, options.prompt, **chosen)
    result.write(0, path)
    report(options, [(path, result, 0)], seconds=round(time.perf_counter() - started, 3))


def load_upscaler(model: str | None, device: str | None, dtype: str | None) -> Pipeline:
    """Load a model that enlarges pictures."""
    pipe = load(model or UPSCALER, device, dtype)
    if not pipe.components.upscales:
        raise InputError(f"{model} draws pictures and enlarges none; pass a model that does, such as {UPSCALER}")
    return pipe


def enlarge(pipe: Pipeline, image: str | Image.Image, prompt: str, **chosen: Any) -> Result:
    """Draw a picture larger; say first how, where that is in several windows."""
    plan = pipe.upscale_plan(image)
    if len(plan.windows) > 1:
        print(f"latentdiff: {plan}", file=sys.stderr)
    return draw(pipe, [prompt], image=image, **{**DEFAULTS, **chosen})
