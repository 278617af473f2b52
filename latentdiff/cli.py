"""The command line: `latentdiff generate "a red fox" -o fox.png`.

Data goes to stdout, progress and errors to stderr. Exit codes: 0 done, 2 bad usage or input, 3 a model file was
refused, 4 no space or I/O, 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType, ModuleType
from typing import TYPE_CHECKING, NoReturn

from latentdiff import __version__
from latentdiff.commands import (
    batch,
    bench,
    convert,
    data,
    distill,
    evaluate,
    export,
    finetune,
    generate,
    inspect,
    plan,
    replay,
    serve,
    speedrun,
    teach,
    train,
    ui,
    upscale,
)
from latentdiff.commands.shared import say
from latentdiff.errors import InputError, LatentDiffError, shown, suggest

if TYPE_CHECKING:
    from _typeshed import SupportsWrite

NO_SPACE = 4
INTERRUPTED = 130

# Each has HELP, add_options(parser) and run(options).
COMMANDS: dict[str, ModuleType] = {
    "generate": generate,
    "batch": batch,
    "upscale": upscale,
    "replay": replay,
    "plan": plan,
    "inspect": inspect,
    "convert": convert,
    "export": export,
    "train": train,
    "finetune": finetune,
    "teach": teach,
    "distill": distill,
    "speedrun": speedrun,
    "data": data,
    "evaluate": evaluate,
    "bench": bench,
    "serve": serve,
    "ui": ui,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    _open_streams()
    with _interrupted_by_sigterm():
        try:
            try:
                options = _parser().parse_args(arguments)
                options.run(options)
            finally:
                sys.stdout.flush()
        except LatentDiffError as error:
            say(error)
            return error.exit_code
        except KeyboardInterrupt as error:
            say(error if error.args else "interrupted")
            return INTERRUPTED
        except BrokenPipeError:  # whoever read stdout has seen enough
            _drop_output()
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            say("out of memory; use fewer or smaller pictures, a smaller batch, or another precision (--dtype float16)")
            return NO_SPACE
        except OSError as error:
            if error.filename is not None:  # a file's, which has a boundary of its own
                raise
            _drop_output()
            say(f"cannot write the output: {error.strerror}; free space or choose another place")
            return NO_SPACE
    return 0


def _open_streams() -> None:
    """Give closed streams a place to go, and let those that know few characters write escapes for the others."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _drop_output() -> None:
    """Send what is still to be written to stdout nowhere."""
    with suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def _interrupted_by_sigterm() -> Iterator[None]:
    """Let SIGTERM interrupt like Ctrl-C, so that what is half-written is removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory ran out; torch has a class for that on a GPU, but only a message on a CPU."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or "not enough memory" in str(error) or "can't allocate memory" in str(error)


class _Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, with the nearest command where one was mistyped."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see `{self.prog} --help`")

    def _print_message(self, message: str, file: SupportsWrite[str] | None = None) -> None:
        if message:
            (file or sys.stderr).write(message)  # argparse would pass over a full disk

    def _check_value(self, action: argparse.Action, value: object) -> None:
        if action.choices is not None and value not in action.choices:
            raise InputError(
                f"{action.metavar or action.dest} {shown(value)} is unknown{suggest(str(value), action.choices)}"
            )


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="latentdiff",
        description="Latent text-to-image diffusion: make a model, generate with it.",
        allow_abbrev=False,  # an option is written out, so that a new one changes the meaning of none
    )
    parser.add_argument("--version", action="version", version=f"latentdiff {__version__}")
    verbs = parser.add_subparsers(metavar="command", required=True)
    for name, command in COMMANDS.items():
        added = verbs.add_parser(name, help=command.HELP, description=command.HELP, allow_abbrev=False)
        added.set_defaults(run=command.run)
        command.add_options(added)
    return parser
