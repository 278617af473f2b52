"""Keep converted networks on disk: a folder for each, written as a whole or not at all, and checked when it is read."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from latentdiff import __version__
from latentdiff.errors import StorageError
from latentdiff.files import fingerprint

if TYPE_CHECKING:
    from torch import nn

__all__ = ["CACHE", "Damaged", "cache_folder", "load", "network_key", "store"]

CACHE = "LATENTDIFF_CACHE"  # environment variable that names the folder
CONTENTS = "contents.json"


class Damaged(Exception):  # noqa: N818
    """A conversion on disk is not what was written."""


def cache_folder() -> Path:
    """Return the folder that conversions are kept in: `LATENTDIFF_CACHE`, or else where the system has such files."""
    if named := os.environ.get(CACHE):
        return Path(named)
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData/Local"
    elif sys.platform == "darwin":
        base = Path.home() / "Library/Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "latentdiff"


def network_key(network: nn.Module, *versions: str) -> str:
    """Return a hash of all that a conversion depends on: config, weights, LoRAs in them included, and versions."""
    import torch

    digest = hashlib.sha256(repr((type(network).__name__, network.config, __version__, *versions)).encode())
    for name, weight in network.state_dict().items():
        digest.update(f"{name}\0{weight.dtype}\0{tuple(weight.shape)}\0".encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:32]


def load(place: Path) -> Path | None:
    """Return the folder of a conversion once its files are what was written; None where there is none.

    Raises:
        Damaged: they are not; says how.
    """
    if not place.is_dir():
        return None
    try:
        contents = json.loads((place / CONTENTS).read_text())
        wrong = [name for name, digest in contents.items() if _digest(place / name) != digest]
    except (OSError, ValueError, AttributeError) as error:
        raise Damaged(str(error)) from error
    if wrong or not contents:
        raise Damaged(f"{', '.join(wrong) or CONTENTS} is not what was written")
    return place


def store(place: Path, write: Callable[[Path], None]) -> None:
    """Write a conversion to a place; what is there already is replaced.

    Args:
        place: of the folder.
        write: puts its files into the folder it is given.

    Raises:
        StorageError: it cannot be written; nothing is left of it then.
    """
    half = None
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        half = Path(tempfile.mkdtemp(prefix=f".{place.name[:8]}-", dir=place.parent))
        write(half)
        contents: Mapping[str, str] = {file.name: _digest(file) for file in sorted(half.iterdir())}
        (half / CONTENTS).write_text(json.dumps(contents))
        if place.exists():
            shutil.rmtree(place)
        half.rename(place)
    except (OSError, RuntimeError) as error:  # the second from OpenVINO
        if half is not None and half.exists() and place.is_dir():
            return  # another process was first, with the same
        reason = getattr(error, "strerror", None) or error
        raise StorageError(f"cannot write to {place.parent} ({reason}); free space there or set {CACHE}") from error
    finally:
        if half is not None:
            shutil.rmtree(half, ignore_errors=True)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return fingerprint(file)[1]
