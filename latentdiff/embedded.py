"""Find the models that come with the package."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from latentdiff.errors import ModelPathError

__all__ = ["ASSETS", "EMBEDDED", "embedded_model"]

EMBEDDED = "embedded"  # what the model that comes with the package is called in settings
# All that come with it, and the folders that they are in.
ASSETS = {EMBEDDED: "emoji", "embedded-inpaint": "emoji-inpaint", "embedded-upscale": "emoji-upscale"}


@cache
def embedded_model(name: str = EMBEDDED) -> Path:
    """Return the folder of a model that comes with the package: in a checkout, or inside an installed package.

    Args:
        name: one of `ASSETS`.

    Raises:
        ModelPathError: this copy of the package came without it.
    """
    package = Path(__file__).resolve().parent
    for folder in (package.parent / "assets" / ASSETS[name], package / "_assets" / ASSETS[name]):
        if folder.is_dir():
            return folder
    raise ModelPathError(
        f"the model {name!r} is missing from this copy of latentdiff; pass another as --model, or install it again"
    )
