"""`latentdiff replay`: a picture once more, from the record in its file."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from latentdiff.commands.shared import (
    LoadOptions,
    Output,
    add_engine,
    add_machine,
    add_writing,
    load,
    on_terminal,
    print_report,
    say,
    warnings_as_lines,
    write_all,
    writing,
)
from latentdiff.encoding import FORMATS, encode
from latentdiff.errors import InputError, MissingDependencyError, shown
from latentdiff.files import is_file
from latentdiff.generation.options import check_integer
from latentdiff.generation.request import Settings
from latentdiff.generation.result import GeneratedImage, read_record
from latentdiff.interrupts import ending_at_once

if TYPE_CHECKING:
    from PIL import Image

    from latentdiff.pipeline import Pipeline

HELP = "Generate a picture again from the settings in its file."
MAX_WORK = 20_000  # calls of the network that a record may ask for without --force


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("image", help="PNG, JPEG or WebP written by latentdiff")
    parser.add_argument(
        "-o", "--out", help="PNG, JPEG or WebP to write; IMAGE-replay beside IMAGE, of its format, by default"
    )
    parser.add_argument(
        "--model",
        action="append",
        default=[],
        help="where the recorded model is now, or owner/name on a hub; several, for a picture made of another one",
    )
    for name, what in (
        ("vae", "autoencoder"),
        ("lora", "LoRA"),
        ("embedding", "textual inversion"),
        ("image", "initial image"),
        ("mask", "mask"),
    ):
        parser.add_argument(
            f"--{name}",
            dest=f"new_{name}",
            action="append",
            default=[],
            metavar="FILE",
            help=f"where the recorded {what} is now; it is found by its hash",
        )
    parser.add_argument("--force", action="store_true", help="go on with another model, LoRA or image than recorded")
    add_writing(parser)
    add_machine(parser)
    add_engine(parser)


def run(options: argparse.Namespace) -> None:
    """Generate a picture again from the settings in its file."""
    from latentdiff.images import open_stored, pixel_hash, to_rgba

    record, source = read_record(options.image), Path(options.image)
    with ending_at_once():  # some checks load torch
        request = _Request.of(record)
    _check_work(request.settings, options.force)
    stored = open_stored(source)  # now, as the output may be the same file
    kind, original = stored.format or "PNG", pixel_hash(to_rgba(stored))
    output = Output(options.out, [request.settings.prompt(0)], writing(options), _beside(source))
    started = time.perf_counter()
    with warnings_as_lines():
        one = _Replay(options, source, record.get("model_hash")).generate(record, request, str(source))
    report = write_all([one], output, 1, options)
    identical = pixel_hash(_as_written(one.image, kind)) == original
    if not identical:
        say(f"the pixels differ from {source}, which {_drawn_by(record)} drew; this is {_drawn_by(one.record)}")
    print_report(report, options, seconds=round(time.perf_counter() - started, 3), identical=identical)


def _beside(source: Path) -> Path:
    """Return IMAGE-replay.png, its name cut to what file systems take; of the format of IMAGE by its name."""
    ending = source.suffix if source.suffix.lower() in FORMATS else ".png"
    return source.with_name(f"{source.stem[:200]}-replay{ending}")


def _drawn_by(record: Mapping[str, Any]) -> str:
    """Return what drew the picture of a record, as far as pixels may depend on it."""
    name, torch, device = (str(record.get(key))[:40] for key in ("engine", "torch", "device"))
    return f"torch {torch} on {device}" + ("" if name in ("None", "eager") else f" by {name}")


def _as_written(picture: Image.Image, kind: str) -> Image.Image:
    """Return what is left of a picture in a file of a format; JPEG and WebP lose some of it."""
    from latentdiff.images import decode_rgba, to_rgba

    return to_rgba(picture) if kind == "PNG" else decode_rgba(encode(picture, kind), "the picture")


def _check_work(settings: Settings, force: bool) -> None:
    calls = settings.num_inference_steps * settings.resampling * 2
    if calls > MAX_WORK and not force:
        raise InputError(f"the record asks for about {calls} calls of the network; add --force if that is meant")


class _Request(NamedTuple):
    """Request of a record: settings, the seeds of its batch, how many rows that had, and which of them it was."""

    settings: Settings
    seeds: dict[str, int]
    size: int
    row: int

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> _Request:
        """Return the request of a record, checked."""
        settings, remedy = Settings.from_record(record), "use the file as latentdiff wrote it"
        size = check_integer("batch_size", record.get("batch_size"), 1, 1024, remedy)
        counted = "variation_seed" if settings.variation_strength else "seed"  # what differs from image to image
        seeds = {"seed": settings.seed, "variation_seed": settings.variation_seed}
        row = check_integer("batch_index", record.get("batch_index"), 0, min(size, seeds[counted] + 1) - 1, remedy)
        seeds[counted] -= row
        return cls(settings, seeds, size, row)


@dataclass(frozen=True)
class _Replay:
    """A replay: options of the command, and the picture whose folder is searched for what it was made from."""

    options: argparse.Namespace
    source: Path
    outermost: object  # hash of the model of the picture itself, not of one that it was made of

    def generate(self, record: dict[str, Any], request: _Request, name: str) -> GeneratedImage:
        """Generate the picture of a record with the model, device and dtype chosen, else those recorded."""
        from latentdiff.diffusion.tuned import TUNED

        settings = request.settings
        inputs = self._inputs(record)
        pipe = self._model(record, name)
        pipe = self._with_embeddings(pipe, record.get("embeddings") or [])
        pipe = self._with_loras(pipe, record)
        if settings.sampler == TUNED:
            table = pipe.components.tuned_table(settings.num_inference_steps)
            same = record.get("tuned_sampler") == table.digest
            self._require(same, "the model's table", "tuned sampler", "made with")
        left_out = {"seed", "variation_seed", "num_images", *(() if "image" in inputs else ("strength",))}
        chosen: dict[str, Any] = {
            item.name: getattr(settings, item.name)
            for item in fields(settings)
            if item.name not in left_out and "option" in item.metadata
        }
        chosen |= {"num_images": request.size, **request.seeds}
        # The batch it was in had this many rows; what was in the others does not matter, how many does.
        with _threads(record.get("threads")):
            images = pipe.stream(
                settings.prompts,
                batch_size=request.size,
                progress=on_terminal(),
                **inputs,
                **chosen,
            )
            return list(images)[request.row]

    def _model(self, record: Mapping[str, Any], name: str) -> Pipeline:
        options, model = self.options, self._find_model(record)
        device, dtype = (getattr(options, key) or record.get(key) for key in ("device", "dtype"))
        device, dtype = (str(value)[:80] if value is not None else None for value in (device, dtype))
        how: LoadOptions = {"prediction_type": record.get("prediction_type"), "local": model not in options.model}
        if isinstance(record.get("vae"), str):
            how["vae"] = self._find(record["vae"], "vae", None, str)
        how["engine"] = str(self.options.engine or record.get("engine") or "eager")[:80]
        try:
            pipe = load(model, device, dtype, **how)
        except MissingDependencyError as error:
            raise MissingDependencyError(f"{error}; or draw the picture nearly as it was by --engine eager") from error
        expected, got = str(record.get("model_hash"))[:10], pipe.components.model_hash
        if got != record.get("model_hash") and not options.force:
            raise InputError(
                f"{name} was made by model {expected}, got {got[:10]}; pass that one as --model, or add --force"
            )
        return pipe

    def _find_model(self, record: Mapping[str, Any]) -> str:
        """Return where the model of a record is: one given anew with its hash, else by its name here or beside."""
        from latentdiff.checkpoints import find_model
        from latentdiff.checkpoints.hashes import model_hash

        given, recorded = self.options.model, record.get("model")
        for model in given:
            place = Path(model) if is_file(model) else find_model(model)[0]
            if model_hash(place) == record.get("model_hash"):
                return str(model)
        if given and (self.options.force or record.get("model_hash") == self.outermost):
            return str(given[0])
        if not isinstance(recorded, str):
            raise InputError(f"the record must name its model, got {shown(recorded)}; pass --model")
        beside = self.source.parent / recorded
        elsewhere = not os.path.exists(recorded) and os.path.exists(beside) and recorded not in ("", ".")
        return str(beside) if elsewhere else recorded

    def _with_embeddings(self, pipe: Pipeline, records: object) -> Pipeline:
        """Return a pipeline with the learned words of a record, if their files are still what they were."""
        from latentdiff.checkpoints.hashes import model_hash

        for entry in records if isinstance(records, list) else [records]:
            record = entry if isinstance(entry, dict) else {}
            path, word = record.get("path"), record.get("word")
            if not isinstance(path, str) or not isinstance(word, str):
                raise InputError(
                    "the record of an embedding must have path and word; use the file as latentdiff wrote it"
                )
            file = self._find(path, "embedding", record.get("hash"), lambda one: model_hash(Path(one)))
            pipe = pipe.with_embedding(file, word)
            self._require(pipe.components.embeddings[-1]["hash"] == record.get("hash"), file, "embedding", "made with")
        return pipe

    def _with_loras(self, pipe: Pipeline, made: Mapping[str, Any]) -> Pipeline:
        """Return a pipeline with the LoRAs of a record, if their files are still what they were."""
        from latentdiff.checkpoints.find import find_model
        from latentdiff.checkpoints.folder import FAST_LORA
        from latentdiff.checkpoints.hashes import model_hash
        from latentdiff.checkpoints.lora import load_lora

        records, loras = made.get("loras") or [], dict[Any, Any]()
        for entry in records if isinstance(records, list) else [records]:
            record = entry if isinstance(entry, dict) else {}
            path = record.get("path")
            if not isinstance(path, str):
                raise InputError("the picture was drawn with a LoRA in memory, which no file keeps; draw it in Python")
            home = find_model(self._find_model(made))[0] if path == FAST_LORA else None
            file = self._find(path, "lora", record.get("hash"), lambda one: model_hash(Path(one)), home)
            lora = load_lora(file, pipe.components)
            self._require(lora.hash == record.get("hash"), file, "LoRA", "made with")
            loras[lora] = record.get("weight")
        return pipe.with_loras(loras) if loras else pipe

    def _inputs(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Return image and mask of a record, if they are still what they were."""
        from PIL import Image, ImageOps

        from latentdiff.generation.masks import ALPHA, hard_mask, open_mask
        from latentdiff.images import pixel_hash, to_rgb

        if record.get("latents_given"):
            raise InputError(
                "the picture was drawn from latents that were passed in, which no file keeps; draw it in Python"
            )

        def hash_of(file: str) -> str:
            return pixel_hash(to_rgb(_open(file, "image")))

        found: dict[str, Any] = {}
        for name in (name for name in ("image", "mask") if record.get(name) is not None):
            used = record[name] if isinstance(record[name], dict) else {}
            if isinstance(used.get("box"), list):
                found[name] = used["box"]
                continue
            alpha, given = used.get("alpha") is True, used.get("path")
            if alpha:
                given = found.get("image")
            elif isinstance(given, str):
                given = self._find(given, name, used.get("hash"), hash_of)
            elif isinstance(used.get("record"), dict):
                given = self.generate(used["record"], _Request.of(used["record"]), "the picture it was made of").image
            elif new := getattr(self.options, f"new_{name}"):  # it was in memory, or sent to a server
                given = self._find(new[0], name, used.get("hash"), hash_of)
            if not isinstance(given, (str, Image.Image)):
                raise InputError(
                    f"the picture was drawn from {'an' if name == 'image' else 'a'} {name} in memory, which no file "
                    f"keeps; pass --{name} if you have it, or draw it in Python"
                )
            opened = _open(given, name)
            if name == "mask" and isinstance(given, str) and not alpha:  # maybe one as OpenAI's API has them
                white = ImageOps.invert(opened.getchannel("A"))
                given, opened = (white, white) if pixel_hash(to_rgb(white)) == used.get("hash") else (given, opened)
            now = open_mask(ALPHA, opened).given["hash"] if alpha else pixel_hash(to_rgb(opened))
            what = given if isinstance(given, str) else "the picture it was drawn of, drawn again,"
            self._require(now == used.get("hash"), what, name, "made from")
            found[name] = ALPHA if alpha else given
            if name == "mask" and not alpha and not used.get("soft") and open_mask(given, opened).given.get("soft"):
                found[name] = hard_mask(opened)  # as masks with shades of grey were read once
        return found

    def _find(
        self, recorded: str, kind: str, wanted: object, hash_of: Callable[[str], str], home: Path | None = None
    ) -> str:
        """Return where a recorded file is: as given anew, else by its path from here, beside the picture or at home."""
        given = getattr(self.options, f"new_{kind}")
        for file in given:
            if len(given) == 1 or hash_of(file) == wanted:
                return str(file)
        name = Path(recorded).name
        places = (Path(recorded), self.source.parent / name, *([home / name] if home else []))
        return str(next((place for place in places if is_file(place)), recorded))

    def _require(self, same: bool, what: str, kind: str, how: str) -> None:
        if not same and not self.options.force:
            this = "this picture was" if how == "made with" else "this one was"
            raise InputError(f"{what} is no longer the {kind} {this} {how}; restore it, or add --force")


def _open(given: object, name: str) -> Image.Image:
    from latentdiff.generation.masks import open_picture

    opened = open_picture(given, name)
    if opened is None:
        raise InputError(f"{name} must be a picture, got none; pass it as --{name}")
    return opened


@contextmanager
def _threads(count: object) -> Iterator[None]:
    """Compute with as many threads as a picture was made with, where this machine has them: sums depend on it."""
    import torch

    before = torch.get_num_threads()
    if isinstance(count, int) and not isinstance(count, bool) and 1 <= count <= (os.cpu_count() or 1):
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
