"""Every error that latentdiff raises on purpose, each with the exit code of the command line.

A message is one or two lines: what was expected, what came, what to do about it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "InputError",
    "LatentDiffError",
    "MissingDependencyError",
    "ModelConfigError",
    "ModelFormatError",
    "ModelLoadError",
    "ModelMismatchError",
    "ModelPathError",
    "ModelValueError",
    "StorageError",
    "UnsafeModelError",
    "suggest",
]

LONGEST_MESSAGE = 800  # of a model that was refused, in characters


class LatentDiffError(Exception):
    """Base of all errors raised on purpose; `exit_code` is what the command line ends with."""

    exit_code = 2


class InputError(LatentDiffError, ValueError):
    """A prompt, image, number or name that cannot be used as given."""


class MissingDependencyError(LatentDiffError, ImportError):
    """An optional package is needed and absent; the message names the extra that brings it."""


class StorageError(LatentDiffError, OSError):
    """A file or folder could not be written (no space, no permission, no such place), or a remote one not be read."""

    exit_code = 4


class ModelLoadError(LatentDiffError):
    """A model folder or file was refused; the subclasses say why.

    The message is one printable line, whatever the names and values in the model that it tells of.
    """

    exit_code = 3

    def __init__(self, message: str) -> None:
        line = "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in message)
        if len(line) > LONGEST_MESSAGE:
            line = f"{line[: LONGEST_MESSAGE // 2]} ... {line[-LONGEST_MESSAGE // 4 :]}"
        super().__init__(line)


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
    near = difflib.get_close_matches(name.lower(), list(folded), n=1, cutoff=0.6)
    if near:
        return f"; did you mean '{folded[near[0]]}'?"
    return f"; choose one of {', '.join(names)}" if names else ""
