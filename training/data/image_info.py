"""The hash and size of a picture, or why it cannot be used."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock
from PIL import Image

from latentdiff.errors import StorageError, printable
from latentdiff.images import MAX_PIXELS, decode_rgba, image_size

from .budget import room_for

ImageInfo = tuple[str, int, int]  # SHA-256 of its file, width and height


@contextmanager
def decoded(data: bytes, name: str) -> Iterator[tuple[str, Image.Image]]:
    """Open an encoded picture: its SHA-256, and the picture as RGBA, for which there is room meanwhile.

    Args:
        name: of the picture, for messages.

    Raises:
        ValueError: it is empty, or cannot be decoded.
    """
    if not data:
        raise ValueError(f"{name} is empty (0 bytes)")
    with room_for(image_size(data, name)):
        yield hashlib.sha256(data).hexdigest(), decode_rgba(data, name)


def info_of(digest: str, image: Image.Image) -> ImageInfo:
    """Return what is kept of a picture that was decoded."""
    return digest, *image.size


def try_info(read_info: Callable[[], ImageInfo], name: str) -> ImageInfo | str:
    """Return what is found of a picture, or why there is nothing to be found."""
    try:
        return read_info()
    except ValueError as error:
        return str(error).removeprefix(f"{printable(name)} ")


def is_finding(value: object) -> bool:
    """Say whether a value that was read from a file is an `ImageInfo` or a reason."""
    if isinstance(value, str):
        return True
    if not isinstance(value, (list, tuple)) or len(value) != 3:
        return False
    digest, *size = value
    known = isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest) is not None
    return known and all(type(side) is int and 0 < side <= MAX_PIXELS for side in size)


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Hold a lock that one process has at a time.

    Raises:
        StorageError: the file of the lock cannot be written.
    """
    lock = FileLock(file)
    try:
        lock.acquire()
    except OSError as error:
        raise StorageError(f"cannot write to {file.parent}: {error.strerror}; choose another place") from error
    try:
        yield
    finally:
        lock.release()
