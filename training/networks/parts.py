"""Parts of a model that a config names."""

from __future__ import annotations

from pathlib import Path

from latentdiff.checkpoints import embedded_model
from latentdiff.errors import InputError, shown
from latentdiff.files import is_folder


def part_folder(key: str, value: str) -> Path:
    """Return the folder that a key of a config names, or that of the embedded model.

    Raises:
        InputError: there is none.
    """
    if value == "embedded":
        return embedded_model()
    if not is_folder(value):
        raise InputError(f"{key}: there is no folder {shown(value)}; train it first, or choose embedded")
    return Path(value)
