"""Every error that latentdiff raises on purpose, each with the exit code of the command line.

A message is one line: what was expected, what came, what to do about it. Whatever a file or a caller put into it, it
stays short and printable.
"""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Iterable

__all__ = [
    "ClosedError",
    "DeadlineError",
    "FilterError",
    "InputError",
    "JobCancelledError",
    "LatentDiffError",
    "MissingDependencyError",
    "ModelConfigError",
    "ModelFormatError",
    "ModelLoadError",
    "ModelMismatchError",
    "ModelPathError",
    "ModelValueError",
    "OutOfMemoryError",
    "QueueFullError",
    "RefusedError",
    "StorageError",
    "UnsafeModelError",
    "printable",
    "shown",
    "suggest",
]

LONGEST_MESSAGE = 580  # characters; with what the command line puts before it, 600
LONGEST_INTEGER = 256  # bits of what is written out in digits


def printable(text: object) -> str:
    """Return text as one line of at most `LONGEST_MESSAGE` characters that no terminal obeys.

    Line breaks become spaces, control characters, lone surrogates and marks that turn the direction of writing become
    escapes, and of what is too long the middle is left out.
    """
    raw = re.sub(r"\s*[\r\n]\s*", " ", _shortened(str(text), 4 * LONGEST_MESSAGE))
    return _shortened("".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in raw), LONGEST_MESSAGE)


def shown(value: object, most: int = 80) -> str:
    """Return the `repr` of a value for a message, short and printable whatever the value is.

    Args:
        value: anything; no more of it is looked at than is shown.
        most: characters.
    """
    values = _Values()
    values.maxstring = values.maxother = values.maxlong = most
    return _shortened(printable(values.repr(value)), most)


def _shortened(text: str, most: int) -> str:
    if len(text) <= most:
        return text
    last = most // 3
    return f"{text[: most - last - 5]} ... {text[-last:]}"


class _Values(reprlib.Repr):
    """`reprlib` that also counts the digits of whole numbers instead of writing thousands, and cuts bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 3

    def repr_int(self, value: int, level: int) -> str:
        bits = value.bit_length()
        if bits <= LONGEST_INTEGER:
            return repr(value)
        return f"a {'negative ' if value < 0 else ''}whole number of some {int(bits * 0.30103) + 1:,} digits"

    def repr_bytes(self, value: bytes, level: int) -> str:
        return repr(value[: self.maxother])


class LatentDiffError(Exception):
    """Base of all errors raised on purpose; `exit_code` is what the command line ends with.

    Args:
        message: see `printable`, which it goes through.
    """

    exit_code = 2

    def __init__(self, message: object) -> None:
        super().__init__(printable(message))


class InputError(LatentDiffError, ValueError):
    """A prompt, image, number or name that cannot be used as given."""


class MissingDependencyError(LatentDiffError, ImportError):
    """An optional package is needed and absent; the message names the extra that brings it."""


class StorageError(LatentDiffError, OSError):
    """A file or folder could not be written (no space, no permission, no such place), or a remote one not be read."""

    exit_code = 4


class QueueFullError(LatentDiffError):
    """As many jobs wait as may; one that is asked for later may be taken."""


class ClosedError(LatentDiffError):
    """A scheduler takes no more jobs, or ended before this one was done."""


class JobCancelledError(LatentDiffError):
    """A job was cancelled."""


class DeadlineError(LatentDiffError):
    """A job was not done by its deadline."""


class RefusedError(LatentDiffError):
    """A content filter refused a picture."""


class FilterError(LatentDiffError):
    """A content filter failed, so that nobody knows whether a picture may be shown."""


class OutOfMemoryError(LatentDiffError, MemoryError):
    """A picture needs more memory than the device has left."""


class ModelLoadError(LatentDiffError):
    """A model folder or file was refused; the subclasses say why."""

    exit_code = 3


class UnsafeModelError(ModelLoadError):
    """The file is a pickle, an archive or another format that is never opened."""


class ModelFormatError(ModelLoadError):
    """The file is not a well-formed safetensors or JSON file."""


class ModelPathError(ModelLoadError):
    """A file is missing, or a name in the model points outside its folder."""


class ModelMismatchError(ModelLoadError):
    """Tensor names, shapes or dtypes differ from what the configuration implies."""


class ModelValueError(ModelLoadError):
    """Weights hold NaN or infinite values."""


class ModelConfigError(ModelLoadError):
    """A configuration names an unknown class or asks for something that cannot be honoured."""


def suggest(name: str, choices: Iterable[str]) -> str:
    """Return the end of an error message that names the nearest of `choices`.

    Args:
        name: what was given.
        choices: what would have been accepted.

    Returns:
        "; did you mean 'ddim'?" when one choice is near, else "; choose one of a, b, c" (empty without choices).
    """
    names = sorted(choices)
    folded = {choice.lower(): choice for choice in names}
    longest = 2 * max(map(len, names), default=0)  # nothing longer is near, and to compare it would take long
    near = difflib.get_close_matches(name[: longest + 1].lower(), list(folded), n=1, cutoff=0.6)
    if near:
        return f"; did you mean '{folded[near[0]]}'?"
    return f"; choose one of {', '.join(names)}" if names else ""
