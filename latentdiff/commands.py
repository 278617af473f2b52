"""What the commands do that draw with a model or look at one; `cli.py` says what their options are."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentdiff.errors import InputError, suggest

if TYPE_CHECKING:
    from latentdiff.pipeline import Pipeline
    from latentdiff.result import Result

__all__ = ["convert", "evaluate", "generate", "inspect", "plan", "replay"]

NOT_REPLAYED = ("prompts", "seed", "variation_seed", "num_images", "strength")  # as they are, that is


def generate(options: argparse.Namespace) -> None:
    """Draw pictures of prompts."""
    from latentdiff.settings import Settings

    chosen = {
        "negative_prompt": options.negative,
        "num_inference_steps": options.steps,
        "guidance_scale": options.guidance,
        "sampler": options.sampler,
        "seed": options.seed,
        "num_images": options.num_images,
        "strength": options.strength,
    }
    chosen = {name: value for name, value in chosen.items() if value is not None}
    chosen["width"], chosen["height"] = _size(options.size)
    chosen |= {} if options.outpaint is None else {"outpaint": _sides(options.outpaint)}
    for name, says in {"strength": "how much of", "mask": "which part of", "outpaint": "how much around"}.items():
        if getattr(options, name) is not None and options.image is None:
            raise InputError(f"--{name} says {says} --image is drawn anew, got no --image; add it")
    # Everything that can be wrong without a model is found before one is loaded.
    settings = Settings(prompts=tuple(options.prompts), **chosen)
    embeddings, loras = _embeddings(options.embedding), _loras(options.lora)
    paths = _output_paths(options.out, [settings.record(index)["prompt"] for index in range(settings.count)])
    started = time.perf_counter()
    how = {name: getattr(options, name) for name in ("prediction_type", "attention", "offload")}
    pipe = _load(options.model, options.device, options.dtype, **how)
    for file, word in embeddings:
        pipe = pipe.with_embedding(file, word)
    pipe = pipe.with_loras(loras) if loras else pipe
    result = _draw(pipe, options.prompts, image=options.image, mask=options.mask, **chosen)
    for index, path in enumerate(paths):
        result.write(index, path)
    _report(options, result, dict(enumerate(paths)), seconds=round(time.perf_counter() - started, 3))


def _output_paths(out: str | None, prompts: list[str]) -> list[Path]:
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


def replay(options: argparse.Namespace) -> None:
    """Draw a picture again from the settings in its file."""
    from latentdiff.images import open_image, pixel_hash
    from latentdiff.result import read_record
    from latentdiff.settings import Settings, check_integer

    record = read_record(options.image)
    settings = Settings.from_record(record)
    remedy = "use the file as latentdiff wrote it"
    size = check_integer("batch_size", record.get("batch_size"), 1, 1024, remedy)
    counted = "variation_seed" if settings.variation_strength else "seed"  # what differs from image to image
    seeds = {"seed": settings.seed, "variation_seed": settings.variation_seed}
    row = check_integer("batch_index", record.get("batch_index"), 0, min(size, seeds[counted] + 1) - 1, remedy)
    seeds[counted] -= row
    initial = _initial_image(record, settings.strength, options.force)
    source = Path(options.image)
    (path,) = _output_paths(options.out or str(source.with_name(f"{source.stem}-replay.png")), [settings.prompts[0]])
    started = time.perf_counter()
    recorded = {key: str(record.get(key)) for key in ("model", "model_hash", "device", "dtype", "torch")}
    chosen = {key: getattr(options, key) or recorded[key] for key in ("model", "device", "dtype")}
    pipe = _load(**chosen, prediction_type=record.get("prediction_type"))
    if pipe.parts.model_hash != recorded["model_hash"] and not options.force:
        raise InputError(
            f"{source} was made by model {recorded['model_hash'][:10]}, got {pipe.parts.model_hash[:10]}; "
            "pass that one as --model, or add --force"
        )
    pipe = _replay_embeddings(pipe, record.get("embeddings") or [], options.force)
    pipe = _replay_loras(pipe, record.get("loras") or [], options.force)
    _use_threads(record.get("threads"))
    # The batch it was drawn in had this many rows; what was in the others does not matter, how many does.
    result = _draw(
        pipe,
        settings.prompts,
        num_images=size,
        batch_size=size,
        **seeds,
        **initial,
        **{name: value for name, value in vars(settings).items() if name not in NOT_REPLAYED},
    )
    result.write(row, path)
    identical = pixel_hash(result.images[row]) == pixel_hash(open_image(source))
    if not identical:
        now = f"torch {result.settings['torch']} on {result.settings['device']}"
        then = f"torch {recorded['torch']} on {recorded['device']}"
        print(f"latentdiff: the pixels differ from {source}, which {then} drew; this is {now}", file=sys.stderr)
    _report(options, result, {row: path}, seconds=round(time.perf_counter() - started, 3), identical=identical)


def _replay_embeddings(pipe: Pipeline, records: Any, force: bool) -> Pipeline:
    """Return a pipeline with the learned words of a record, if their files are still what they were."""
    for record in records if isinstance(records, list) else [records]:
        path, word = (record.get(key) if isinstance(record, dict) else None for key in ("path", "word"))
        if not isinstance(path, str) or not isinstance(word, str):
            raise InputError("the record of an embedding must have path and word; use the file as latentdiff wrote it")
        pipe = pipe.with_embedding(path, word)
        if pipe.parts.embeddings[-1]["hash"] != record.get("hash") and not force:
            raise InputError(
                f"{path} is no longer the embedding this picture was made with; restore it, or add --force"
            )
    return pipe


def _replay_loras(pipe: Pipeline, records: Any, force: bool) -> Pipeline:
    """Return a pipeline with the LoRAs of a record, if their files are still what they were."""
    from latentdiff.checkpoints.lora import load_lora

    loras: dict[Any, Any] = {}
    for record in records if isinstance(records, list) else [records]:
        path = record.get("path") if isinstance(record, dict) else None
        if not isinstance(path, str):
            raise InputError("the picture was drawn with a LoRA in memory, which no file keeps; draw it in Python")
        lora = load_lora(path, pipe.parts)
        if lora.hash != record.get("hash") and not force:
            raise InputError(f"{path} is no longer the LoRA this picture was made with; restore it, or add --force")
        loras[lora] = record.get("weight")
    return pipe.with_loras(loras) if loras else pipe


def _initial_image(record: dict[str, Any], strength: float, force: bool) -> dict[str, Any]:
    """Return the arguments that replay what was drawn from pictures, if those are still what they were."""
    from latentdiff.images import open_image, pixel_hash

    if record.get("latents_given"):
        raise InputError(
            "the picture was drawn from latents that were passed in, which no file keeps; draw it in Python"
        )
    pictures = {name: record[name] for name in ("image", "mask") if record.get(name) is not None}
    for name, used in pictures.items():
        path = used.get("path") if isinstance(used, dict) else None
        if not isinstance(path, str):
            raise InputError("the picture was drawn from an image in memory, which no file keeps; draw it in Python")
        if pixel_hash(open_image(path)) != used.get("hash") and not force:
            raise InputError(f"{path} is no longer the {name} this one was made from; restore it, or add --force")
        pictures[name] = path
    return {**pictures, "strength": strength} if pictures else {}


def _embeddings(given: Sequence[str]) -> list[tuple[str, str | None]]:
    """Return files with the words for them of "FILE" and "FILE:WORD"."""
    found: list[tuple[str, str | None]] = []
    for text in given:
        file, word = _file_and_rest(text)
        if not Path(file).is_file():
            raise InputError(
                f"--embedding must be a file and maybe a word for it, got {text!r}; try toy.safetensors:toy"
            )
        found.append((file, word))
    return found


def _loras(given: Sequence[str]) -> dict[str, Any]:
    """Return files with their weights of "FILE", "FILE:0.8" and "FILE:1,0.5" (U-Net, text encoders)."""
    loras: dict[str, Any] = {}
    for text in given:
        file, weight = _file_and_rest(text)
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


def _file_and_rest(text: str) -> tuple[str, str | None]:
    """Split "FILE:REST"; there is no rest where all of it is the name of a file."""
    file, _, rest = text.rpartition(":")
    return (text, None) if not file or Path(text).is_file() else (file, rest)


def _use_threads(count: object) -> None:
    """Compute with as many threads as a picture was drawn with, where this machine has them: sums depend on it."""
    import torch

    if isinstance(count, int) and 1 <= count <= (os.cpu_count() or 1):
        torch.set_num_threads(count)


def _load(model: str | None, device: str | None, dtype: str | None, **how: Any) -> Pipeline:
    from latentdiff.pipeline import Pipeline

    with _warnings_as_lines():
        return Pipeline.from_pretrained(model, device=device, dtype=dtype, **how)


@contextmanager
def _warnings_as_lines() -> Iterator[None]:
    """Print what is warned of inside as a line each, without the place in the source."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for warning in caught:
        print(f"latentdiff: {warning.message}", file=sys.stderr)


def _draw(pipe: Pipeline, prompts: Sequence[str], **settings: Any) -> Result:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the result's notes say the same in one line
        result = pipe(prompts, progress=sys.stderr.isatty(), **settings)
    for note in result.notes:
        print(f"latentdiff: {note}", file=sys.stderr)
    return result


def _report(options: argparse.Namespace, result: Result, written: dict[int, Path], **more: Any) -> None:
    """Say which images, by number, went where."""
    if options.json:
        pictures = {
            "files": [str(path) for path in written.values()],
            "prompts": [result.own[index]["prompt"] for index in written],
            "seeds": [result.seeds[index] for index in written],
            "token_counts": [result.token_counts[index] for index in written],
            "window_counts": [result.window_counts[index] for index in written],
        }
        print(json.dumps({**pictures, "settings": result.settings, "notes": result.notes, **more}))
    else:
        print("\n".join(map(str, written.values())))


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
        from latentdiff.result import read_record

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
    from latentdiff.checkpoints.weights import storage_dtype
    from latentdiff.devices import DTYPES

    dtype, loras = storage_dtype(options.dtype or "float16"), _loras(options.lora)
    single = options.target.endswith(".safetensors")
    # What is added to weights, or is to be stored as float8, is rounded once.
    computed = DTYPES["float32"] if loras or dtype not in DTYPES.values() else dtype
    with _warnings_as_lines():
        parts = load_pipeline(options.source, computed, prediction_type=options.prediction_type)
    parts = apply_loras(parts, loras)
    (save_single_file if single else save_pipeline)(parts, options.target, dtype)
    print(options.target)


def evaluate(options: argparse.Namespace) -> None:
    """Measure how good a model is."""
    from latentdiff.evaluate import METRICS
    from latentdiff.images import to_tensor
    from latentdiff.settings import check_integer

    wanted = options.metrics.split(",")
    for name in wanted:
        if name not in METRICS:
            raise InputError(f"metric {name!r} is unknown{suggest(name, METRICS)}")
    count = check_integer("--images", options.images, 1, 1_000_000, "try 32")
    pipe = _load(options.model, options.device, options.dtype)
    height, width = pipe.native_size
    if height != width:
        raise InputError(f"only models of square pictures can be measured, got {width}x{height}")
    from training.config import DataConfig
    from training.dataset import composite, load_images

    data = load_images(DataConfig(folder=options.data, size=height), options.split)
    images = to_tensor(composite(data.images[:count], (255, 255, 255))).to(pipe.device)
    captions = [row["captions"][0] for row in data.rows[:count]]
    figures = {name: METRICS[name](pipe.parts, images, captions, progress=sys.stderr.isatty()) for name in wanted}
    if options.json:
        print(json.dumps({"model": pipe.parts.name, "model_hash": pipe.parts.model_hash, **figures}))
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


def _sides(text: str) -> dict[str, int]:
    """Return the pixels of each side of "left=16,top=8"."""
    pairs = [part.partition("=") for part in text.split(",")]
    if not all(equals and value.strip().isdecimal() for _, equals, value in pairs):
        raise InputError(f"--outpaint must be sides with pixels, got {text!r}; try left=16,right=16")
    return {side.strip(): int(value) for side, _, value in pairs}


def _size(text: str | None) -> tuple[int | None, int | None]:
    """Return (width, height) of "64x48", or (None, None)."""
    if text is None:
        return None, None
    width, cross, height = text.lower().partition("x")
    if not cross or not width.isdecimal() or not height.isdecimal():
        raise InputError(f"--size must be WIDTHxHEIGHT in pixels, got {text!r}; try 64x64")
    return int(width), int(height)
