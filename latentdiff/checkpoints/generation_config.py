"""Defaults of generation options that a model has of its own: `generation_config.json` in its folder.

The file is not part of a model's hash: a picture records every setting that it was made with.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from latentdiff.checkpoints.folder import read_json

__all__ = ["FILE", "read_defaults"]

FILE = "generation_config.json"


def read_defaults(folder: Path) -> dict[str, Any]:
    """Return the defaults of the model in a folder, which `Pipeline` checks; none where it has no such file.

    Raises:
        ModelLoadError: the file cannot be read.
    """
    file = folder / FILE
    return read_json(file) if file.exists() else {}
