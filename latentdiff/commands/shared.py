"""What the commands share: models loaded, files named, options parsed, results reported."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentdiff.errors import InputError

if TYPE_CHECKING:
    from latentdiff.generation.result import Result
    from latentdiff.pipeline import Pipeline

__all__ = ["draw", "load", "output_paths", "parse_loras", "report", "warnings_as_lines"]


def output_paths(out: str | None, prompts: list[str]) -> list[Path]:
    """Return where each picture goes, all of them writable; names made from prompts never hit an existing file."""
    from latentdiff.images import check_writable, numbered
    from latentdiff.prompts import slug

    folder = Path(out or ".")
    if out is not None and not folder.is_dir():
        if folder.suffix.lower() != ".png":
            raise InputError(f"-o must name a PNG file or a folder, got {out!r}; try {folder.stem or 'picture'}.png")
        paths = list(islice(numbered(folder), len(prompts)))
    else:
        paths = []
        for prompt in prompts:
            names = numbered(folder / f"{slug(prompt)}.png")
            paths.append(next(path for path in names if path not in paths and not path.exists()))
    for path in paths:
        check_writable(path)
    return paths


def load(model: str | None, device: str | None, dtype: str | None, **how: Any) -> Pipeline:
    from latentdiff.pipeline import Pipeline

    with warnings_as_lines():
        return Pipeline.from_pretrained(model, device=device, dtype=dtype, **how)


@contextmanager
def warnings_as_lines() -> Iterator[None]:
    """Print what is warned of inside as a line each, without the place in the source."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for warning in caught:
        print(f"latentdiff: {warning.message}", file=sys.stderr)


def draw(pipe: Pipeline, prompts: Sequence[str], **settings: Any) -> Result:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the result's notes say the same in one line
        result = pipe(prompts, progress=sys.stderr.isatty(), **settings)
    for note in result.notes:
        print(f"latentdiff: {note}", file=sys.stderr)
    return result


def report(options: argparse.Namespace, drawn: Sequence[tuple[Path, Result, int]], **more: Any) -> None:
    """Say which images, each by its result and number there, went where."""
    if options.json:
        pictures = {
            "files": [str(path) for path, _, _ in drawn],
            "prompts": [result.own[index]["prompt"] for _, result, index in drawn],
            "seeds": [result.seeds[index] for _, result, index in drawn],
            "token_counts": [result.token_counts[index] for _, result, index in drawn],
            "window_counts": [result.window_counts[index] for _, result, index in drawn],
        }
        first = drawn[0][1]
        print(json.dumps({**pictures, "settings": first.settings, "notes": first.notes, **more}))
    else:
        print("\n".join(str(path) for path, _, _ in drawn))


def parse_loras(given: Sequence[str]) -> dict[str, Any]:
    """Return files with their weights of "FILE", "FILE:0.8" and "FILE:1,0.5" (U-Net, text encoders)."""
    loras: dict[str, Any] = {}
    for text in given:
        file, weight = file_and_rest(text)
        try:
            numbers = [float(number) for number in ("1" if weight is None else weight).split(",")]
        except ValueError:
            numbers = []
        if not Path(file).is_file() or len(numbers) not in (1, 2) or file in loras:
            raise InputError(
                f"--lora must be a file and maybe its weight, once, got {text!r}; try style.safetensors:0.8"
            )
        loras[file] = tuple(numbers) if numbers[1:] else numbers[0]
    return loras


def file_and_rest(text: str) -> tuple[str, str | None]:
    """Split "FILE:REST"; there is no rest where all of it is the name of a file."""
    file, _, rest = text.rpartition(":")
    return (text, None) if not file or Path(text).is_file() else (file, rest)
