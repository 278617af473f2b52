"""`latentdiff generate`: pictures of prompts."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from latentdiff.commands.shared import draw, file_and_rest, load, output_paths, parse_loras, report
from latentdiff.commands.upscaling import enlarge, load_upscaler
from latentdiff.errors import InputError

__all__ = ["generate"]

# What options mean that need --image.
SAYS = {
    "strength": "how much of",
    "mask": "which part of",
    "outpaint": "how much around",
    "feather": "how softly what is around",
}


def generate(options: argparse.Namespace) -> None:
    """Draw pictures of prompts."""
    from latentdiff.generation.request import Settings
    from latentdiff.prompts import check_prompts

    chosen = {
        "negative_prompt": options.negative,
        "num_inference_steps": options.steps,
        "guidance_scale": options.guidance,
        "sampler": options.sampler,
        "seed": options.seed,
        "num_images": options.num_images,
        "strength": options.strength,
        "feather": options.feather,
        "hires": options.hires,
        "hires_strength": options.hires_strength,
    }
    chosen = {name: value for name, value in chosen.items() if value is not None}
    chosen["width"], chosen["height"] = _size(options.size)
    chosen |= {} if options.outpaint is None else {"outpaint": _sides(options.outpaint)}
    for name, says in SAYS.items():
        if getattr(options, name) is not None and options.image is None:
            raise InputError(f"--{name} says {says} --image is drawn anew, got no --image; add it")
    if options.hires_strength is not None and options.hires is None:
        raise InputError("--hires-strength says how much is drawn anew, got no --hires; add it")
    if options.upscale_model is not None and not options.upscale:
        raise InputError("--upscale-model says what enlarges the pictures, got no --upscale; add it")
    # Everything that can be wrong without a model is found before one is loaded.
    settings = Settings(prompts=tuple(options.prompts), **chosen)
    if options.image is None:
        check_prompts(options.prompts)
    embeddings, loras = _embeddings(options.embedding), parse_loras(options.lora)
    paths = output_paths(options.out, [settings.record(index)["prompt"] for index in range(settings.count)])
    started = time.perf_counter()
    how = {name: getattr(options, name) for name in ("prediction_type", "attention", "offload")}
    pipe = load(options.model, options.device, options.dtype, **how)
    for file, word in embeddings:
        pipe = pipe.with_embedding(file, word)
    pipe = pipe.with_loras(loras) if loras else pipe
    upscaler = load_upscaler(options.upscale_model, options.device, options.dtype) if options.upscale else None
    result = draw(pipe, options.prompts, image=options.image, mask=_mask(options.mask), **chosen)
    drawn = [(path, result, index) for index, path in enumerate(paths)]
    if upscaler is not None:
        drawn = [
            (path, enlarge(upscaler, result.images[index], result.own[index]["prompt"], seed=result.seeds[index]), 0)
            for index, path in enumerate(paths)
        ]
    for path, one, index in drawn:
        one.write(index, path)
    report(options, drawn, seconds=round(time.perf_counter() - started, 3))


def _embeddings(given: Sequence[str]) -> list[tuple[str, str | None]]:
    """Return files with the words for them of "FILE" and "FILE:WORD"."""
    found: list[tuple[str, str | None]] = []
    for text in given:
        file, word = file_and_rest(text)
        if not Path(file).is_file():
            raise InputError(
                f"--embedding must be a file and maybe a word for it, got {text!r}; try toy.safetensors:toy"
            )
        found.append((file, word))
    return found


def _sides(text: str) -> dict[str, int]:
    """Return the pixels of each side of "left=16,top=8"."""
    pairs = [part.partition("=") for part in text.split(",")]
    if not all(equals and value.strip().isdecimal() for _, equals, value in pairs):
        raise InputError(f"--outpaint must be sides with pixels, got {text!r}; try left=16,right=16")
    return {side.strip(): int(value) for side, _, value in pairs}


def _mask(text: str | None) -> str | list[int] | None:
    """Return the box of "10,20,40,50", or what else stands for a mask."""
    numbers = [] if text is None or Path(text).exists() else text.split(",")
    if len(numbers) > 1 and all(number.strip().isdecimal() for number in numbers):
        return [int(number) for number in numbers]
    return text


def _size(text: str | None) -> tuple[int | None, int | None]:
    """Return (width, height) of "64x48", or (None, None)."""
    if text is None:
        return None, None
    width, cross, height = text.lower().partition("x")
    if not cross or not width.isdecimal() or not height.isdecimal():
        raise InputError(f"--size must be WIDTHxHEIGHT in pixels, got {text!r}; try 64x64")
    return int(width), int(height)
