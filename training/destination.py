"""The folder that a command which makes a model of a model writes to."""

from __future__ import annotations

from pathlib import Path

from latentdiff.checkpoints.find import find_model
from latentdiff.checkpoints.folder import INDEX
from latentdiff.errors import InputError
from latentdiff.files import is_file, make_folder


def destination(model: str, out: str) -> tuple[Path, bool]:
    """Return the folder that is written to, and whether it is that of the model itself.

    Raises:
        InputError: it holds something else.
        StorageError: it cannot be made.
    """
    folder = make_folder(out)
    own = _is_own(model, folder)
    if not own and any(folder.iterdir()) and not (folder / INDEX).is_file():
        raise InputError(f"{out} holds something that is no saved model; move it, or choose another --out")
    return folder, own


def _is_own(model: str, folder: Path) -> bool:
    """Say whether a folder is that of the model."""
    return not is_file(model) and find_model(model)[0].resolve() == folder.resolve()
