"""Defaults of generation options that a model has of its own: `generation_config.json` in its folder.

The file is not part of a model's hash: a picture records every setting that it was made with.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from latentdiff.checkpoints.folder import read_json
from latentdiff.errors import ModelConfigError, shown, suggest

__all__ = ["FILE", "read_defaults"]

FILE = "generation_config.json"
KINDS: dict[str, tuple[type, ...]] = {
    "num_inference_steps": (int,),
    "guidance_scale": (int, float),
    "sampler": (str,),
    "correction": (str,),
}


def read_defaults(folder: Path) -> dict[str, Any]:
    """Return the defaults of the model in a folder; none where it has no such file.

    Raises:
        ModelLoadError: the file cannot be read, or holds anything else.
    """
    file = folder / FILE
    if not file.exists():
        return {}
    found = read_json(file)
    for name, value in found.items():
        if name not in KINDS:
            raise ModelConfigError(f"{file}: {shown(name)} is no option that a model may set{suggest(name, KINDS)}")
        if not isinstance(value, KINDS[name]) or isinstance(value, bool):
            raise ModelConfigError(f"{file}: {name} must be a {KINDS[name][-1].__name__}, got {shown(value)}")
    return found
