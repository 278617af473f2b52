"""Training: one visible loop a stage (`train_autoencoder.py`, `train_diffusion.py`) over small tested parts."""

from __future__ import annotations

from pathlib import Path

from latentdiff.files import is_file


def find_recipe(name: str) -> Path | None:
    """Return the file of a recipe that comes with the package, in a checkout or installed; None where there is none."""
    package = Path(__file__).parent
    files = (folder / "configs" / name for folder in (package, package.parent))
    return next((file for file in files if is_file(file)), None)
