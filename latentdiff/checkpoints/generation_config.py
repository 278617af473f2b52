"""Defaults of generation options that a model has of its own: `generation_config.json` in its folder.

A LoRA that was trained for others than its model has carries them in its metadata. The file is not part of a model's
hash: a picture records every setting that it was made with.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from latentdiff.checkpoints.folder import parse_object, read_json

__all__ = ["FILE", "METADATA", "defaults_in", "read_defaults"]

FILE = "generation_config.json"
METADATA = "latentdiff.generation_config"  # key of the same in the metadata of a LoRA


def read_defaults(folder: Path) -> dict[str, Any]:
    """Return the defaults of the model in a folder, which `Pipeline` checks; none where it has no such file.

    Raises:
        ModelLoadError: the file cannot be read.
    """
    file = folder / FILE
    return read_json(file) if file.exists() else {}


def defaults_in(file: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return the defaults that the metadata of a LoRA file hold, which `Pipeline` checks; none where they hold none.

    Raises:
        ModelFormatError: they are no JSON object.
    """
    return parse_object(metadata[METADATA], f"{file}: {METADATA}") if METADATA in metadata else {}
