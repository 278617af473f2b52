"""`latentdiff replay`: a picture once more, from what is written in its file."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from latentdiff.commands.shared import draw, load, output_paths, report
from latentdiff.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

    from latentdiff.generation.request import Settings
    from latentdiff.generation.result import Result
    from latentdiff.pipeline import Pipeline

__all__ = ["replay"]

NOT_REPLAYED = ("prompts", "seed", "variation_seed", "num_images", "strength")  # as they are, that is


def replay(options: argparse.Namespace) -> None:
    """Draw a picture again from the settings in its file."""
    from latentdiff.generation.result import read_record
    from latentdiff.images import open_rgba, pixel_hash, to_rgba

    record, source = read_record(options.image), Path(options.image)
    request = _Request.of(record)
    name = str(source.with_name(f"{source.stem}-replay.png"))
    (path,) = output_paths(options.out or name, [request.settings.prompts[0]])
    started = time.perf_counter()
    recorded = {key: str(record.get(key)) for key in ("model", "device", "dtype", "torch")}
    chosen = {key: getattr(options, key) or recorded[key] for key in ("model", "device", "dtype")}
    result, row = _draw_again(record, request, str(source), chosen, options.force)
    result.write(row, path)
    identical = pixel_hash(to_rgba(result.images[row])) == pixel_hash(open_rgba(source))
    if not identical:
        now = f"torch {result.settings['torch']} on {result.settings['device']}"
        then = f"torch {recorded['torch']} on {recorded['device']}"
        print(f"latentdiff: the pixels differ from {source}, which {then} drew; this is {now}", file=sys.stderr)
    report(options, [(path, result, row)], seconds=round(time.perf_counter() - started, 3), identical=identical)


class _Request(NamedTuple):
    """What a record asks for: settings, the seeds of its batch, how many rows that had, and which of them it was."""

    settings: Settings
    seeds: dict[str, int]
    size: int
    row: int

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> _Request:
        """Return the request of a record, checked."""
        from latentdiff.generation.request import Settings, check_integer

        settings, remedy = Settings.from_record(record), "use the file as latentdiff wrote it"
        size = check_integer("batch_size", record.get("batch_size"), 1, 1024, remedy)
        counted = "variation_seed" if settings.variation_strength else "seed"  # what differs from image to image
        seeds = {"seed": settings.seed, "variation_seed": settings.variation_seed}
        row = check_integer("batch_index", record.get("batch_index"), 0, min(size, seeds[counted] + 1) - 1, remedy)
        seeds[counted] -= row
        return cls(settings, seeds, size, row)


def _draw_again(
    record: dict[str, Any], request: _Request, name: str, chosen: dict[str, str], force: bool
) -> tuple[Result, int]:
    """Draw what a record tells of with the model, device and dtype that were chosen; return it and its number."""
    settings = request.settings
    initial = _initial_image(record, settings.strength, force)
    pipe = load(**chosen, prediction_type=record.get("prediction_type"))
    expected = str(record.get("model_hash"))
    if pipe.components.model_hash != expected and not force:
        raise InputError(
            f"{name} was made by model {expected[:10]}, got {pipe.components.model_hash[:10]}; "
            "pass that one as --model, or add --force"
        )
    pipe = _replay_embeddings(pipe, record.get("embeddings") or [], force)
    pipe = _replay_loras(pipe, record.get("loras") or [], force)
    _use_threads(record.get("threads"))
    # The batch it was drawn in had this many rows; what was in the others does not matter, how many does.
    result = draw(
        pipe,
        settings.prompts,
        num_images=request.size,
        batch_size=request.size,
        **request.seeds,
        **initial,
        **{name: value for name, value in vars(settings).items() if name not in NOT_REPLAYED},
    )
    return result, request.row


def _earlier(record: dict[str, Any], force: bool) -> Image.Image:
    """Return a picture that another was drawn of, drawn again on its own model."""
    chosen = {key: str(record.get(key)) for key in ("model", "device", "dtype")}
    result, row = _draw_again(record, _Request.of(record), "the picture it was drawn of", chosen, force)
    picture: Image.Image = result.images[row]
    return picture


def _replay_embeddings(pipe: Pipeline, records: Any, force: bool) -> Pipeline:
    """Return a pipeline with the learned words of a record, if their files are still what they were."""
    for record in records if isinstance(records, list) else [records]:
        path, word = (record.get(key) if isinstance(record, dict) else None for key in ("path", "word"))
        if not isinstance(path, str) or not isinstance(word, str):
            raise InputError("the record of an embedding must have path and word; use the file as latentdiff wrote it")
        pipe = pipe.with_embedding(path, word)
        if pipe.components.embeddings[-1]["hash"] != record.get("hash") and not force:
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
        lora = load_lora(path, pipe.components)
        if lora.hash != record.get("hash") and not force:
            raise InputError(f"{path} is no longer the LoRA this picture was made with; restore it, or add --force")
        loras[lora] = record.get("weight")
    return pipe.with_loras(loras) if loras else pipe


def _initial_image(record: dict[str, Any], strength: float, force: bool) -> dict[str, Any]:
    """Return the arguments that replay what was drawn from pictures, if those are still what they were."""
    from PIL import Image

    from latentdiff.generation.masks import ALPHA, open_mask, open_picture
    from latentdiff.images import pixel_hash, to_rgb

    if record.get("latents_given"):
        raise InputError(
            "the picture was drawn from latents that were passed in, which no file keeps; draw it in Python"
        )
    pictures = {name: record[name] for name in ("image", "mask") if record.get(name) is not None}
    for name, used in pictures.items():
        used = used if isinstance(used, dict) else {}
        if isinstance(used.get("box"), list):
            pictures[name] = used["box"]
            continue
        alpha, given = used.get("alpha") is True, used.get("path")
        if alpha:
            given = pictures["image"]
        elif isinstance(used.get("record"), dict):
            given = _earlier(used["record"], force)
        if not isinstance(given, (str, Image.Image)):
            raise InputError("the picture was drawn from an image in memory, which no file keeps; draw it in Python")
        opened = open_picture(given, name)
        assert opened is not None
        now = open_mask(ALPHA, opened).given["hash"] if alpha else pixel_hash(to_rgb(opened))
        if now != used.get("hash") and not force:
            what = given if isinstance(given, str) else "the picture it was drawn of, drawn again,"
            raise InputError(f"{what} is no longer the {name} this one was made from; restore it, or add --force")
        pictures[name] = ALPHA if alpha else given
    return {**pictures, "strength": strength} if pictures else {}


def _use_threads(count: object) -> None:
    """Compute with as many threads as a picture was drawn with, where this machine has them: sums depend on it."""
    import torch

    if isinstance(count, int) and 1 <= count <= (os.cpu_count() or 1):
        torch.set_num_threads(count)
