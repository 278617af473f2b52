"""Hash the files that decide what a model computes, by which settings refer to it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

from torch import nn

from latentdiff.checkpoints.folder import (
    BASE,
    COMPUTED_IN,
    INDEX,
    LOW_RES,
    NETWORKS,
    child,
    read_layout,
    tokenizer_files,
    vae_folder,
    weight_files,
)
from latentdiff.errors import ModelLoadError
from latentdiff.models.tokenizer import Tokenizer

__all__ = ["model_files", "model_hash", "network_digest", "vae_hash", "weights_digest"]

LEFT_OUT = re.compile(rb'\{(\n  "' + COMPUTED_IN.encode() + rb'": "\w+",)')


def model_files(root: Path) -> dict[str, Path]:
    """Return every file that decides what the model computes, by name, in a fixed order."""
    layout, files = read_layout(root), dict[str, Path]()

    def add(home: Path, *paths: Path) -> None:
        before = "" if home == root else f"{BASE}/"
        files.update({f"{before}{path.relative_to(home).as_posix()}": path for path in paths})

    for place in (root, *([] if layout.base is None else [layout.base])):
        add(place, child(place, INDEX))
    for component in NETWORKS:
        if component not in layout.classes:
            continue
        place = layout.homes[component]
        if component == "unet" and layout.difference is not None and layout.base is not None:
            add(place, child(place, component, "config.json"), layout.difference)
            place = layout.base
        add(place, child(place, component, "config.json"), *weight_files(place, component))
    for component in ("tokenizer", "tokenizer_2"):
        if component in layout.classes:
            add(layout.homes[component], *tokenizer_files(layout.homes[component], component))
    for component in ("scheduler", LOW_RES):
        if component in layout.classes:
            add(layout.homes[component], child(layout.homes[component], component, "scheduler_config.json"))
    return files


def model_hash(root: Path) -> str:
    """Return the SHA-256 over names, sizes and contents of `model_files`, or of a single file.

    Raises:
        ModelLoadError: a file is missing or cannot be read.
    """
    return files_hash({".": root} if root.is_file() else model_files(root))


def vae_hash(path: Path) -> str:
    """Return the SHA-256 over the files that an autoencoder was loaded from.

    Raises:
        ModelLoadError: one is missing or cannot be read.
    """
    if path.is_file():
        return files_hash({".": path})
    folder = vae_folder(path)
    files = [folder / "config.json", *weight_files(folder.parent, folder.name)]
    return files_hash({file.name: file for file in files})


def files_hash(files: Mapping[str, Path]) -> str:
    """Return the SHA-256 over names, sizes and contents of files.

    Raises:
        ModelLoadError: a file is missing or cannot be read.
    """
    digest = hashlib.sha256()
    for name, path in files.items():
        try:
            left_out = _left_out(path)
            digest.update(f"{name}\0{path.stat().st_size - len(left_out)}\0".encode())
            with path.open("rb") as file:
                if left_out:
                    digest.update(file.read(1))
                    file.seek(1 + len(left_out))
                while block := file.read(2**20):
                    digest.update(block)
        except OSError as error:
            raise ModelLoadError(f"{path}: cannot be read ({error.strerror})") from error
    return digest.hexdigest()


def _left_out(path: Path) -> bytes:
    """Return what follows the first brace of a file and does not count: what only transformers reads there.

    Models that were written before it was have the same hash, so that their pictures can be drawn again.
    """
    if path.name != "config.json":
        return b""
    with path.open("rb") as file:
        found = LEFT_OUT.match(file.read(100))
    return found[1] if found else b""


def network_digest(network: nn.Module, tokenizer: Tokenizer | None = None) -> str:
    """Return a short hash of a network's config and weights, wherever they are, and of the tokenizer before it."""
    digest = hashlib.sha256(repr(network.config).encode())
    _add_weights(digest, network)
    if tokenizer is not None:
        digest.update(tokenizer.digest.encode())
    return digest.hexdigest()[:16]


def weights_digest(network: nn.Module) -> str:
    """Return a short hash of a network's weights, for one that has no config."""
    digest = hashlib.sha256()
    _add_weights(digest, network)
    return digest.hexdigest()[:16]


def _add_weights(digest: hashlib._Hash, network: nn.Module) -> None:
    for name, weight in network.state_dict().items():
        digest.update(name.encode() + weight.detach().float().cpu().numpy().tobytes())
