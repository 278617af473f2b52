"""The hash and size of a picture, or why it cannot be used."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from latentdiff.errors import StorageError
from latentdiff.images import decode_rgba

ImageInfo = tuple[str, int, int]  # SHA-256 of its file, width and height


def decode_image(data: bytes, name: str) -> tuple[str, Image.Image]:
    """Return the SHA-256 of an encoded picture, and the picture as RGBA.

    Args:
        name: of the picture, for messages.

    Raises:
        ValueError: it is empty, or cannot be decoded.
    """
    if not data:
        raise ValueError(f"{name} is empty (0 bytes)")
    return hashlib.sha256(data).hexdigest(), decode_rgba(data, name)


def info_of(digest: str, image: Image.Image) -> ImageInfo:
    """Return what is kept of a picture that was decoded."""
    return digest, *image.size


def try_info(look: Callable[[], ImageInfo], name: str) -> ImageInfo | str:
    """Return what is found of a picture, or why there is nothing to be found."""
    try:
        return look()
    except ValueError as error:
        return str(error).removeprefix(f"{name} ")


def make_folder(folder: Path) -> None:
    """Make a folder, with those above it.

    Raises:
        StorageError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot write to {folder}: {error.strerror}; choose another place") from error
