"""Parts that several commands share: options from declarations, models loaded, pictures named and written, messages."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NoReturn, TypedDict

from latentdiff.encoding import FORMATS
from latentdiff.errors import InputError, printable, shown, suggest
from latentdiff.files import check_writable, is_file, is_folder
from latentdiff.generation.options import options_of
from latentdiff.generation.request import Settings
from latentdiff.images import numbered
from latentdiff.interrupts import ending_at_once
from latentdiff.prompts import slug

if TYPE_CHECKING:
    import torch
    from typing_extensions import Unpack

    from latentdiff.generation.result import GeneratedImage, SaveOptions
    from latentdiff.pipeline import Pipeline

TYPES: dict[str, Any] = {"int": int, "float": float, "str": str}


def add_settings(parser: argparse.ArgumentParser, *tasks: str, leave_out: Sequence[str] = ()) -> None:
    """Add the generation options that are for models of these tasks; see `generation.request.Settings`."""
    types = {item.name: str(item.type).partition(" ")[0] for item in fields(Settings)}
    for name, declared in options_of(Settings).items():
        if declared.flag is None or name in leave_out or not set(tasks) & set(declared.tasks):
            continue
        flags, text = declared.flag.split(", "), declared.help.replace("%", "%%")
        if types[name] == "bool":
            parser.add_argument(*flags, dest=name, action=argparse.BooleanOptionalAction, default=None, help=text)
        else:
            kind = str if declared.parse else TYPES[types[name]]
            parser.add_argument(*flags, dest=name, type=kind, metavar=declared.metavar, help=text)


def given_settings(options: argparse.Namespace) -> dict[str, Any]:
    """Return the generation options that were given."""
    given = dict[str, Any]()
    for name, declared in options_of(Settings).items():
        value = getattr(options, name, None)
        if value is not None:
            given[name] = value if declared.parse is None else declared.parse(value)
    return given


def read_setting(
    flag: str,
    text: str,
    *tasks: str,
    leave_out: Sequence[str] = (),
    others: Mapping[str, Callable[[str], Any]] = MappingProxyType({}),
) -> tuple[str, Any]:
    """Return name and value of a generation option from its flag without dashes, "steps", and a text, "25".

    Args:
        others: what else may be set, by its flag: text -> value.

    Raises:
        InputError: there is no such flag, or it takes no such value.
    """
    if flag in others:
        return flag, others[flag](text)
    parser = _OneSetting(add_help=False, allow_abbrev=False)
    add_settings(parser, *tasks, leave_out=leave_out)
    known = [option[2:] for action in parser._actions for option in action.option_strings if option.startswith("--")]
    if flag not in known:
        raise InputError(f"--{flag[:80]} is no setting{suggest(flag, [*known, *others])}")
    given = given_settings(parser.parse_args([f"--{flag}={text}"]))
    return next(iter(given.items()))


class _OneSetting(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def flags() -> dict[str, str]:
    """Return what the command line calls options and inputs, for messages."""
    named = {name: declared.flag for name, declared in options_of(Settings).items() if declared.flag}
    return {name: flag.split(", ")[-1] for name, flag in named.items()} | {"image": "--image", "mask": "--mask"}


def add_size(parser: argparse.ArgumentParser) -> None:
    """Add the option that says how large pictures are."""
    parser.add_argument("--size", metavar="WxH", help="in pixels, multiples of 8; the model's own by default")


def read_size(text: str | None) -> dict[str, int]:
    """Return the settings that --size 64x48 stands for; none where it was not given."""
    if text is None:
        return {}
    width, cross, height = text.lower().partition("x")
    if not cross or not all(side.isdecimal() and len(side) < 9 for side in (width, height)):
        raise InputError(f"--size must be WIDTHxHEIGHT in pixels, got {shown(text)}; try 64x64")
    return {"width": int(width), "height": int(height)}


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which model is used, with which words and LoRAs."""
    parser.add_argument("--model", help="folder, safetensors file, or owner/name on a hub; the embedded one by default")
    add_prediction_type(parser)
    add_vae(parser)
    parser.add_argument(
        "--embedding",
        action="append",
        default=[],
        metavar="FILE[:WORD]",
        help="textual-inversion file, and the word for it in prompts (its own by default); may be given several times",
    )
    add_lora(parser)


def add_prediction_type(parser: argparse.ArgumentParser) -> None:
    """Add the option that corrects what a model is taken to predict."""
    parser.add_argument(
        "--prediction-type", help="epsilon or v_prediction, where the model's files do not say what it predicts"
    )


def add_vae(parser: argparse.ArgumentParser) -> None:
    """Add the option that names an autoencoder."""
    parser.add_argument(
        "--vae", metavar="FILE|FOLDER", help="autoencoder in place of the model's own, such as a safetensors file"
    )


def add_lora(parser: argparse.ArgumentParser) -> None:
    """Add the option that names LoRAs."""
    parser.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="FILE[:WEIGHT]",
        help="LoRA file, and how much of it (default 1), or UNET,TEXT; may be given several times",
    )


def add_lora_dir(parser: argparse.ArgumentParser) -> None:
    """Add the option that names a folder of LoRAs."""
    parser.add_argument(
        "--lora-dir",
        metavar="FOLDER",
        help="where the LoRAs are that prompts name, as in <lora:style:0.8>, which is style.safetensors there",
    )


def add_machine(parser: argparse.ArgumentParser) -> None:
    """Add the options that say where a model runs and how the result is reported."""
    parser.add_argument("--device", help="cpu, cuda, mps; the fastest there is by default")
    parser.add_argument("--dtype", help="float32, float16 or bfloat16")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")


def add_engine(parser: argparse.ArgumentParser) -> None:
    """Add the option that says what runs a model."""
    parser.add_argument(
        "--engine",
        metavar="E",
        help="what runs the networks: eager (default), compile, graphs (on NVIDIA GPUs), openvino (on a CPU; needs "
        "the extra openvino), or auto",
    )


def add_marking(parser: argparse.ArgumentParser) -> None:
    """Add the options that leave out what pictures carry besides pixels."""
    parser.add_argument(
        "--no-metadata", dest="metadata", action="store_false", help="write no prompt and no settings into pictures"
    )
    parser.add_argument(
        "--no-mark",
        dest="mark",
        action="store_false",
        help="leave out that a model made the pictures, which law may ask for",
    )


def add_writing(parser: argparse.ArgumentParser) -> None:
    """Add the options that say what pictures carry besides pixels."""
    add_marking(parser)
    parser.add_argument(
        "--sign",
        nargs=2,
        metavar=("CERT.pem", "KEY.pem"),
        help="sign pictures by C2PA with a certificate chain and its private key (needs the extra c2pa)",
    )


def writing(options: argparse.Namespace) -> SaveOptions:
    """Return what pictures carry by the options of a command.

    Raises:
        InputError, MissingDependencyError: they cannot be signed as asked for.
    """
    how: SaveOptions = {"metadata": options.metadata, "mark": options.mark}
    if options.sign is not None:
        if not options.mark:
            raise InputError("--sign says that a model made the pictures, got --no-mark; leave out one of them")
        from latentdiff.signing import load_signer

        how["signer"] = load_signer(*options.sign)
    return how


def say(message: object) -> None:
    """Print one line on stderr; where that is closed or full there is nobody to read it."""
    try:
        print(f"latentdiff: {printable(message)}", file=sys.stderr)
    except (OSError, ValueError, AttributeError):
        return


def on_terminal() -> bool:
    """Return whether somebody watches stderr."""
    try:
        return sys.stderr.isatty()
    except (AttributeError, ValueError):
        return False


def load_torch() -> None:
    """Import torch; Ctrl-C ends the process at once meanwhile, because numpy's import loses it."""
    with ending_at_once():
        import torch  # noqa: F401


class LoadOptions(TypedDict, total=False):
    """What else `Pipeline.from_pretrained` takes of a command."""

    prediction_type: str | None
    vae: str | None
    attention: str
    offload: bool
    engine: str
    local: bool


def load(
    model: str | None, device: str | None, dtype: str | torch.dtype | None, **how: Unpack[LoadOptions]
) -> Pipeline:
    """Load a model; what it warns of is a line each."""
    load_torch()
    from latentdiff.pipeline import Pipeline

    with warnings_as_lines():
        return Pipeline.from_pretrained(model, device=device, dtype=dtype, **how)


@contextmanager
def warnings_as_lines() -> Iterator[None]:
    """Print what is warned of inside as a line each, once, without the place in the source."""
    said = set[str]()

    def show(message: Warning | str, *place: object, **more: object) -> None:
        text = str(message)
        if text not in said:
            said.add(text)
            say(text)

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = show
        yield


def parse_loras(given: Sequence[str]) -> dict[str, Any]:
    """Return files with their weights of "FILE", "FILE:0.8" and "FILE:1,0.5" (U-Net, text encoders)."""
    loras: dict[str, Any] = {}
    for text in given:
        file, weight = file_and_rest(text)
        try:
            numbers = [float(number) for number in ("1" if weight is None else weight).split(",")]
        except ValueError:
            numbers = []
        if not is_file(file):
            raise InputError(f"--lora names {shown(file)}, and there is no such file; check the path")
        if len(numbers) not in (1, 2) or file in loras:
            raise InputError(
                f"--lora must be a file and maybe its weight, once, got {shown(text)}; try style.safetensors:0.8"
            )
        loras[file] = tuple(numbers) if numbers[1:] else numbers[0]
    return loras


def file_and_rest(text: str) -> tuple[str, str | None]:
    """Split "FILE:REST"; there is no rest where all of it is the name of a file."""
    file, _, rest = text.rpartition(":")
    return (text, None) if not file or is_file(text) else (file, rest)


class Output:
    """Where pictures go, by number and prompt: a file that was named is replaced, every other name is a free one.

    Args:
        out: a file (several are fox.png, fox-2.png, ...), a folder, or None for `default`.
        prompts: of the pictures, in order.
        how: they are written.
        default: the file where none was named, in a folder that was; named by the prompts when None.

    Raises:
        InputError, StorageError: nothing can be written there.
    """

    def __init__(self, out: str | None, prompts: Sequence[str], how: SaveOptions, default: Path | None = None) -> None:
        self.how = how
        self.place = Path(out or ".")
        self.replaced = out is not None and not is_folder(self.place)  # the first picture's file, if it is there
        self.one_name = self.replaced or default is not None
        if default is not None and not self.replaced:
            self.place = default if out is None else self.place / default.name
        if self.replaced and self.place.suffix.lower() not in FORMATS:
            stem = self.place.stem or "picture"
            raise InputError(
                f"-o must name a PNG, JPEG or WebP file or a folder, got {shown(out)}; try {stem[:80]}.png"
            )
        self.free: dict[Path, Iterator[Path]] = {}  # names that may be free, by the first of them
        for path in islice(numbered(self._first(prompts[0])), len(prompts) if self.one_name else 1):
            check_writable(path)

    def _first(self, prompt: str) -> Path:
        return self.place if self.one_name else self.place / f"{slug(prompt)}.png"

    def write(self, number: int, image: GeneratedImage) -> Path:
        """Write the picture with a number and return its path."""
        from latentdiff.generation.result import save_next

        first = self._first(image.prompt)
        names = self.free.setdefault(first, numbered(first))
        return save_next(image, names, replace=self.replaced and number == 0, **self.how)


class Interrupted(KeyboardInterrupt):
    """Ctrl-C after some of the work was done, which the message tells."""


def write_all(
    images: Iterable[GeneratedImage], output: Output, count: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Write pictures as they come, print their paths, and return a report.

    Raises:
        Interrupted: Ctrl-C; those that were done are written.
    """
    files: list[str] = []
    report: dict[str, Any] = {"files": files, "prompts": [], "seeds": [], "token_counts": [], "window_counts": []}
    settings: Mapping[str, Any] = {}
    notes = list[str]()
    try:
        with warnings_as_lines():
            for number, one in enumerate(images):
                files.append(str(output.write(number, one)))
                for key, value in (("prompts", one.prompt), ("seeds", one.seed)):
                    report[key].append(value)
                report["token_counts"].append(one.token_count)
                report["window_counts"].append(one.window_count)
                settings = settings or one.record
                for note in one.notes:
                    if note not in notes:
                        say(note)
                    notes.append(note)
                if not options.json:
                    print(files[-1], flush=True)
    except KeyboardInterrupt as error:
        raise Interrupted(f"interrupted; {len(files)} of {count} pictures are written") from error
    from latentdiff.generation.result import OWN

    shared = {key: value for key, value in settings.items() if key not in OWN}
    return {**report, "settings": shared, "notes": notes}


def print_report(report: Mapping[str, object], options: argparse.Namespace, **more: object) -> None:
    """Print a report as one JSON object, where that was asked for."""
    if options.json:
        print(json.dumps({**report, **more}))
